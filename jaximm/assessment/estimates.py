"""How long and how large a run will be, in words: said before it begins, from a measured step."""

from __future__ import annotations

SAID_SECONDS = 10.0
"""Shorter work is not announced."""


def about(seconds: float) -> str:
    """A time in words, as precise as an estimate is.

    >>> about(34.2), about(700.0), about(9_400.0)
    ('about 35 s', 'about 12 min', 'about 2 h 40 min')
    """
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    tens = 10 * round(seconds / 600)
    return f"about {tens // 60} h {tens % 60} min"


def size(count: float) -> str:
    """Bytes in words.

    >>> size(1_430_000_000), size(37_500_000), size(12)
    ('1.4 GB', '38 MB', '0 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
