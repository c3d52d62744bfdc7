"""Pairs of tasks whose rows are feature vectors."""
