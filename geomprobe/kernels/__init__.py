"""What is read of the tensors of a step: digests, inner products, sketches."""
