"""What `geomprobe inspect` says of a run."""
