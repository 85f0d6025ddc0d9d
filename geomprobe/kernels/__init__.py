"""The one read of a step: digests, norms and inner products of the weights and gradients, on any device."""
