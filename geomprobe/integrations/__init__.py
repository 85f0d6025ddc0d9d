"""Training frameworks: each module finds the raw optimizer inside one, and calls `geomprobe.attach` on it."""
