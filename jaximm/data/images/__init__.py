"""Pairs of tasks whose rows are images, or what a model takes in their place, with class labels."""
