"""The two passes: record and replay, continue what was cut off, seal what is over."""
