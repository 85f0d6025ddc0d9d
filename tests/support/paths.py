"""Where things lie in this repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
EXAMPLES = SCRIPTS / "examples"
EXPERIMENTS = SCRIPTS / "experiments"
SUPPORT = ROOT / "tests" / "support"
STRESS = ROOT / "tests" / "stress"
