"""Data sets that draw from torch's random numbers only and never depend on a file system's order."""
