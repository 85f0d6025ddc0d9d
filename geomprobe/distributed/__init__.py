"""How one training is spread over processes, what these exchange, and which of them has failed."""
