"""Attackers of a linear probe on frozen features: a quadratic, solved or descended exactly."""
