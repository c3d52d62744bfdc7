"""Test-wide settings: float64, strict promotion, eight simulated devices, one BLAS thread."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("jaximm", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("jaximm")
