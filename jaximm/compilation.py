"""How XLA compiles programs that run for less long than they take to compile."""

from __future__ import annotations

import os

import jax


def compile_quickly() -> None:
    """Few optimisations and one thread a program on CPUs, for the rest of the process.

    At level 0 loops over elements are several times slower, and compile no faster. To be called
    before the first program is compiled, and handed on to processes that are started later.
    ``XLA_FLAGS`` that are set already stay alone.
    """
    flags = [
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_multi_thread_eigen=false",
    ]
    if jax.__version_info__ < (0, 12):  # later ones do not know this flag, and end the process
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
