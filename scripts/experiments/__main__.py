"""What `python scripts/experiments` runs."""

import sys
from pathlib import Path

# The trainings on digits, and the examples that the papers' runs are made with, lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from command_line import main

if __name__ == "__main__":
    sys.exit(main())
