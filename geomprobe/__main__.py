"""``python -m geomprobe``, which is how torchrun starts it."""

import sys

from geomprobe.cli import main

sys.exit(main())
