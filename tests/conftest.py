"""Test-wide settings: float64, strict promotion, eight simulated devices, one BLAS thread.

Most of the time of these tests is XLA compiling programs that run once, so they are compiled with
few optimisations, here and in the processes that tests start; ``XLA_FLAGS=" "`` keeps XLA's own.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false",
)

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("jaximm", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("jaximm")
