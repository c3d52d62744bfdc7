"""How XLA compiles programs that run for less long than they take to compile."""

from __future__ import annotations

import os

import jax


def compile_quickly(*, level: int = 1, one_thread: bool = True) -> None:
    """Few optimisations on CPUs, for the rest of the process.

    To be called before the first program is compiled, and handed on to processes that are started
    later. ``XLA_FLAGS`` that are set already stay alone.

    Args:
      level: of optimisation. At 0 programs compile fastest, but loops over elements are several
        times slower than at 1.
      one_thread: one thread a program, for several processes that keep all cores busy.
    """
    flags = [
        f"--xla_backend_optimization_level={level}",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    if one_thread:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    if jax.__version_info__ < (0, 12):  # later ones do not know this flag, and end the process
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
