"""What a command line that fails says, in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


class UsageError(ValueError):
    """Something on the command line that cannot be run: exit code 2."""


def message(error: BaseException, argv: Sequence[str]) -> str:
    """One line for a reader who wants to know what to do next."""
    if isinstance(error, KeyboardInterrupt):
        kept = getattr(error, "kept", "")  # of a run that saved where it was
        stopped = f"stopped, {kept};" if kept else "stopped;"
        if error.args:  # the command that goes on
            return f"{stopped} `{error}` goes on."
        if argv[:1] in (["immunise"], ["demo"]):
            return f"{stopped} the same with --resume goes on."
        # Their cells and runs are kept whenever one is done.
        goes_on = argv[:1] in (["attack"], ["assess"], ["suite"])
        return "stopped; the same command goes on." if goes_on else "stopped."
    text = " ".join(str(error).split())[:600]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    expected: tuple[type, ...] = (ValueError, FloatingPointError, OSError)
    checkpoint = sys.modules.get("jaximm.checkpoint")  # not loaded: then the error is not its own
    if checkpoint is not None:
        expected += (checkpoint.CheckpointError,)
    if not isinstance(error, expected):
        if missing := _missing_device():
            return missing
        return f"unexpected {type(error).__name__}: {text} (--traceback shows where)"
    return text or type(error).__name__


def _missing_device() -> str:
    """What to do where the platform that JAX was told to use has no device; else nothing.

    JAX itself raises an `AssertionError` without a word for a CUDA that is not installed.
    """
    jax, platforms = sys.modules.get("jax"), os.environ.get("JAX_PLATFORMS")
    if jax is None or not platforms:
        return ""
    try:
        jax.devices()
    except Exception:
        first = platforms.split(",")[0]
        name, package = {
            "cuda": ("CUDA", "jax[cuda]"),
            "gpu": ("GPU", "jax[cuda]"),
            "rocm": ("ROCm", "jax[rocm]"),
            "tpu": ("TPU", "jax[tpu]"),
        }.get(first, (first, ""))
        advice = f" or install {package}" if package else ""
        return f"no {name} device: unset JAX_PLATFORMS{advice}"
    return ""
