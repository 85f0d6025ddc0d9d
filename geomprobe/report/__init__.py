"""What a run's files say, one output a file: summary, verify, diff, plot. Loads without torch."""
