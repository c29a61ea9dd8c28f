"""From ranked candidates to preference pairs, and from pairs to packed batches."""
