"""``python -m geomprobe``, which is how torchrun starts it."""

import os
import sys

from geomprobe.cli import main

code = main()
if code == 0 and os.environ.get("WORLD_SIZE", "1") != "1" and "torch.distributed" in sys.modules:
    from geomprobe.distributed.ranks import end_process_group

    end_process_group()
sys.exit(code)
