"""Methods that align a model so that tuning it on harmful rows fails, or breaks it."""
