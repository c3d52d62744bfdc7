"""Methods that take the harmful task out of a model, and leave the rest."""
