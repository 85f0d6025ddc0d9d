"""The training's whole state on disk, and back."""
