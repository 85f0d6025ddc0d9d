"""The identities that `geomprobe verify` checks."""
