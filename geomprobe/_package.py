"""What this package is: its version, and the folder that holds its files."""

from pathlib import Path

__version__ = "0.1.0"

FOLDER = Path(__file__).parent
"""The folder of geomprobe's own files, which are never the user's sources, wherever in it a module lies."""
