"""Numbers as a reader sees them: factors, condition numbers, steps, FLOPs, mean and spread."""

from __future__ import annotations

import math

from jaximm.report.groups import Moments

MISSING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_FLOP_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))


def power_of_ten(exponent: int) -> str:
    """
    >>> power_of_ten(-3)
    '10⁻³'
    """
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def from_log(log_value: float | None) -> str:
    """exp(log_value) to three digits, without overflow: kappas have no upper end.

    >>> from_log(math.log(149.2)), from_log(math.log(0.0533)), from_log(1000.0), from_log(None)
    ('149', '0.0533', '1.97 × 10⁴³⁴', '–')
    """
    if log_value is None or not math.isfinite(log_value):
        return MISSING
    exponent = math.floor(log_value / math.log(10) + 1e-12)
    if -3 <= exponent < 5:
        return significant(math.exp(log_value))
    mantissa = f"{math.exp(log_value - exponent * math.log(10)):.2f}"
    if mantissa == "10.00":
        mantissa, exponent = "1.00", exponent + 1
    return f"{mantissa} × {power_of_ten(exponent)}"


def factor(log_value: float | None) -> str:
    """`from_log` as a multiple: '149×'."""
    text = from_log(log_value)
    return text if text == MISSING else f"{text}×"


def significant(value: float, digits: int = 3) -> str:
    """Three significant digits, thousands separated, no exponent.

    >>> significant(7322.4), significant(1.0), significant(0.05331), significant(0)
    ('7,322', '1.00', '0.0533', '0')
    """
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    return f"{value:,.{places}f}"


def multiple(ratio: float, bound: str = "") -> str:
    """A ratio of costs, with its bound sign: '> 410×'."""
    if math.isnan(ratio):
        return MISSING
    text = factor(math.log(ratio)) if ratio > 0 else "0×"
    return f"{bound} {text}" if bound else text


def decimal(value: float | None, places: int = 3) -> str:
    """Fixed places; a minus sign, not a hyphen."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:.{places}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def mean_sd(spread: Moments | None, places: int = 2) -> str:
    """
    >>> mean_sd(Moments(1.25, 0.5, 3)), mean_sd(Moments(1.25, None, 1)), mean_sd(None)
    ('1.25 ± 0.50', '1.25', '–')
    """
    if spread is None:
        return MISSING
    text = decimal(spread.mean, places)
    return text if spread.sd is None else f"{text} ± {decimal(spread.sd, places)}"


def steps(count: float, budget: int) -> str:
    """
    >>> steps(7322.0, 10**5), steps(math.inf, 20000), steps(math.nan, 1)
    ('7,322', '> 20,000', '–')
    """
    if math.isnan(count):
        return MISSING
    if math.isinf(count):
        return f"> {budget:,}"
    return f"{count:,.0f}" if count == int(count) else f"{count:,.1f}"


def flops(value: float) -> str:
    """
    >>> flops(3.21e9), flops(120.0), flops(math.inf)
    ('3.21 GFLOP', '120 FLOP', '> budget')
    """
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "> budget"
    for size, unit in _FLOP_UNITS:
        if value >= size:
            return f"{significant(value / size)} {unit}"
    return f"{value:.0f} FLOP"


def name(identifier: str) -> str:
    """A registry name in running text.

    >>> name("edge_of_grid")
    'edge of grid'
    """
    return identifier.replace("_", " ")
