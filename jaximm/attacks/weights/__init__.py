"""Attackers of the weights themselves, in mini-batches."""
