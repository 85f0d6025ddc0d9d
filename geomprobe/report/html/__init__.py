"""The HTML page of `geomprobe report`."""
