"""The one read of a step: digests, norms, inner products and sketches of weights and gradients, on any device."""
