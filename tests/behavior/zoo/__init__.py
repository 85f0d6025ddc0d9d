"""Training loops that people write, each with its own truth: a row of the trace is right, or absent with a reason."""
