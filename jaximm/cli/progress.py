"""How far a command is, on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaximm.types import Fields


_clock = time.monotonic

PIPED_SECONDS = 10.0
"""Time between two lines of a run that is under way, where stderr is no terminal."""


class Progress:
    """Progress on stderr: a live bar on a terminal, and a line for each finished run everywhere.

    Where stderr is no terminal, a run that takes longer also has a line every `PIPED_SECONDS`.

    Call it as `jaximm.run` does: ``progress(label, done, total, record)``.
    """

    def __init__(self, runs: int | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, highlight=False)
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._runs, self._finished, self._last = runs, 0, _clock()
        self._said = self._last
        self._label = ""
        self._task = None

    def __enter__(self) -> Progress:
        self._bars.start()
        self._task = self._bars.add_task("preparing", total=None, note="")
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def __call__(self, label: str, done: int, total: int, record: Fields) -> None:
        """Shows how far the run `label` is."""
        assert self._task is not None
        if says := record.get("says"):
            self._console.print(f"{label}: {says}", markup=False, soft_wrap=True)
        if label != self._label:
            self._label = label
            self._bars.reset(self._task, total=total if done else None, description=label, note="")
        self._bars.update(
            self._task, completed=done, total=total if done else None, note=_log_rir(record)
        )
        if done < total:
            now = _clock()
            if not self._console.is_terminal and now - self._said >= PIPED_SECONDS:
                self._said = now
                unit = record.get("unit", "steps")
                self._console.print(
                    f"{label}: {done:,} of {total:,} {unit}, {now - self._last:.0f} s",
                    markup=False, soft_wrap=True,
                )  # fmt: skip
            return
        self._finished += 1
        place = f"[{self._finished}/{self._runs}]" if self._runs else f"[{self._finished}]"
        now = _clock()
        steps = f"{total:,} {record.get('unit', 'steps')}" if total > 1 else ""
        facts = [fact for fact in (steps, _log_rir(record), f"{now - self._last:.1f} s") if fact]
        self._last = self._said = now
        line = f"{place} {label}: {', '.join(facts)}"
        self._console.print(line, markup=False, soft_wrap=True)
        self._bars.reset(self._task, total=None, description="measuring", note="")


def _log_rir(record: Fields) -> str:
    if "log_ratio_harmful" not in record:
        return ""
    log_rir = record["log_ratio_harmful"] - record["log_ratio_primary"]
    return f"log RIR {log_rir:z.2f} (damped, training rows)"
