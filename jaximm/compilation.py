"""How XLA compiles programs that run for less long than they take to compile, and what it keeps.

Both are settings of the process that JAX reads once, so the functions here are to be called before
JAX is first imported (the cache) or compiles its first program (the flags); they are handed on to
processes that are started later. What the user has set already stays.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import MutableMapping
from pathlib import Path

FLAGS, FOLDER = "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"


def compile_quickly(*, level: int = 1, one_thread: bool = True) -> None:
    """Few optimisations on CPUs, for the rest of the process.

    To be called before the first program is compiled. ``XLA_FLAGS`` that are set already stay
    alone.

    Args:
      level: of optimisation. At 0 programs compile fastest, but loops over elements are several
        times slower than at 1.
      one_thread: one thread a program, for several processes that keep all cores busy.
    """
    flags = [
        f"--xla_backend_optimization_level={level}",
        "--xla_llvm_disable_expensive_passes=true",
        # XLA cuts a program into 32 parts to compile them beside each other: a third more work.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if one_thread:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    version = tuple(map(int, importlib.metadata.version("jax").split(".")[:2]))
    if version < (0, 12):  # later ones do not know this flag, and end the process
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault(FLAGS, " ".join(flags))


def optimise_fully() -> None:
    """XLA's own optimisations, here and in processes that would compile quickly."""
    os.environ.setdefault(FLAGS, "")


def keep_programs(environment: MutableMapping[str, str] | None = None) -> tuple[Path | None, str]:
    """Compiled programs are kept on disk, so that the next process compiles nothing again.

    In ``JAX_COMPILATION_CACHE_DIR`` if that is set, else in ``jaximm`` below ``XDG_CACHE_HOME`` or
    ``~/.cache``. To be called before JAX is imported.

    Args:
      environment: read and changed; by default that of the process.

    Returns:
      The folder and "", or None and why nothing is kept.

    >>> keep_programs({"JAX_ENABLE_COMPILATION_CACHE": "false"})
    (None, 'JAX_ENABLE_COMPILATION_CACHE is false')
    """
    environment = os.environ if environment is None else environment
    if environment.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in ("false", "0"):
        return None, "JAX_ENABLE_COMPILATION_CACHE is false"
    base = environment.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache"))
    folder = Path(environment.get(FOLDER) or os.path.join(base, "jaximm"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        return None, f"{folder}: {error.strerror}"
    environment[FOLDER] = str(folder)
    # By default only programs that take a second to compile are kept; here most take less.
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    return folder, ""
