"""The live view of `geomprobe watch`."""
