"""What a training loop calls, and the hooks that see what it does."""
