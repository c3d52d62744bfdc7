"""Locks: a part or a key is kept back. Only absent information is secret; the rest is speed.

Methods of the registry train a model: `gradient_routing`, `pmp`. The others are maps of parameter
trees that are applied to a model that is trained, `lock(params, key) -> params` with its way back;
a lock that adds parameters is a re-parametrisation, ``features_fn(fuse(params), inputs)``. Who
holds all weights of a released model may change any of them, by gradients or otherwise.
"""
