"""How one training lies across processes, how these processes talk, and who among them has failed."""
