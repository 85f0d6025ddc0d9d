"""What makes two runs the same run, and proves it."""
