"""Ctrl-C and SIGTERM while a run is under way: noted, so that it ends where it can go on from."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, after its last step was saved.

    Attributes:
      kept: what is on the disk, in words.
      signal: its number.
    """

    def __init__(self, kept: str, number: int) -> None:
        super().__init__()
        self.kept, self.signal = kept, number


class Noting:
    """Inside of its block the first SIGINT or SIGTERM is noted; a second one acts as ever.

    A signal that is ignored stays so, and outside of the main thread nothing is noted: only that
    thread may say what signals do.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, active: bool = True) -> None:
        self.number = 0
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Noting:
        if self._active:
            for number in self.SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: not set from Python
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


def largest(*numbers: int) -> list[int]:
    """The largest of every number over all processes, the same on each."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental import multihost_utils

    return np.max(multihost_utils.process_allgather(np.asarray(numbers)), axis=0).tolist()
