"""The files: what a pass streams and seals, and what opens them again. Nothing here imports torch."""
