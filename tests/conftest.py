"""Test-wide settings: float64, strict promotion, eight simulated devices, one BLAS thread.

Most of the time of these tests is XLA compiling programs that run once, so they are compiled with
few optimisations, here and in the processes that tests start; an empty ``XLA_FLAGS`` keeps
XLA's own.
"""

import functools
import gc
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["JAXIMM_CACHE_GB"] = "0"  # activations stay in memory, out of the user's cache
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # nor in the user's own cache
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir

from jaximm.compilation import compile_quickly

compile_quickly(level=0, one_thread=False)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Traced programs are many long-lived objects, which full collections go through again and again.
gc.set_threshold(20_000, 20, 100)

# JAX loads all dialects again for each program that it lowers, 6 ms a time and thousands of times.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

hypothesis.settings.register_profile("jaximm", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("jaximm")


def pytest_collection_finish():
    """What collecting has made stays: collections need not go through it again and again."""
    gc.collect()
    gc.freeze()


MAPPED = 35_000
"""Linux gives a process 65,530 mappings; a compiled program takes several, and XLA ends in a
segmentation fault when there are no more."""


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Drops compiled programs after a module once there are many; the cache on disk keeps them."""
    yield
    mlir.make_ir_context.cache_clear()  # with the constants of the module's programs
    try:
        with open("/proc/self/maps") as lines:
            mapped = sum(1 for _ in lines)
    except OSError:  # not Linux
        return
    if mapped > MAPPED:
        jax.clear_caches()
