"""Training frameworks: each module finds the raw optimizer inside one framework, and calls `geomprobe.attach` on it."""
