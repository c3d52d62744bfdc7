"""The result file: one experiment, one method, one seed, as JSON with a checked schema.

Every number that the reports print comes out of such a file. The schema is the constant `SCHEMA`,
a JSON Schema (draft 2020-12); `write` and `read` both check against it, so a file that can be read
is a file that every table and figure can use.

Conventions
  * Logarithms are natural logarithms, times are seconds, accuracies and R^2 are fractions.
  * NaN and +-inf are not JSON. `write` stores them as ``null``; in a field that may be ``null``,
    ``null`` means "infinite, unbounded or not defined". `read` refuses the bare tokens.

What attackers reach and what it costs them is not here but in `jaximm.records.assessment`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaximm.records import files
from jaximm.records.files import (
    COUNT,
    MAYBE,
    NAME,
    TEXT,
    ResultError,
    check_schema,
    record,
)

SCHEMA_VERSION = "jaximm.result/3"
"""Name and version of the schema, the value of the key ``schema``."""

EARLIER = "jaximm.result/1"
"""The first version, which is read without what the assessment says now: see `read`."""

UNSEALED = (EARLIER, "jaximm.result/2")
"""Versions of before files had envelopes; the second is otherwise the third."""

_MOVED = ("attacks", "certificates")
_MOVED_FLAGS = ("informed_attacker_wins", "still_falling", "edge_of_grid", "attack_diverged")

FOOTINGS = ("damped", "shipped", "pseudo_inverse", "reference")
"""The footings on which a condition number is taken; the first is the measure."""

SPLITS = ("train", "held_out")
"""The two sets of rows on which everything is measured."""

TARGETS = ("1e-1", "1e-2", "1e-3")
"""The relative targets to which attack costs are given."""


def _pair(item: dict, keys: Sequence[str]) -> dict:
    return record(dict.fromkeys(keys, item), closed=True)


_KAPPA = record(
    {
        "log_kappa": MAYBE,
        "lower": MAYBE,
        "upper": MAYBE,
        "rank": COUNT,
        "tolerance": MAYBE,
        "dtype": NAME,
        "dominated_by": {"enum": ["none", "damping", "rounding"]},
    },
    closed=True,
)

_CONDITIONING_ROW = record(
    {
        "primary": _pair({"$ref": "#/$defs/kappa"}, ("before", "after")),
        "harmful": _pair({"$ref": "#/$defs/kappa"}, ("before", "after")),
        "log_ratio_harmful": MAYBE,
        "log_ratio_primary": MAYBE,
        "log_rir": MAYBE,
        "log_rir_lower": MAYBE,
        "log_rir_upper": MAYBE,
        "log_rir_limit": MAYBE,
        "log_fraction": MAYBE,
        "damping_primary": MAYBE,
        "damping_harmful": MAYBE,
        "definition": TEXT,
    },
    closed=True,
)

_UTILITY = {
    "anyOf": [
        {"type": "null"},
        record(
            {
                "metric": {"enum": ["r2", "accuracy"]},
                "before": _pair(MAYBE, SPLITS),
                "after": _pair(MAYBE, SPLITS),
            },
            closed=True,
        ),
    ]
}

_TASK_DATA = record(
    {
        "name": NAME,
        "kind": {"enum": ["regression", "constant", "binary", "classes"]},
        "n_train": COUNT,
        "n_held_out": COUNT,
        "d": COUNT,
    }
)

_MEAN_SD = record({"mean": MAYBE, "sd": MAYBE}, closed=True)

_GROUPS = record(
    {
        "groups": COUNT,
        "rows": COUNT,
        **dict.fromkeys(("log_ratio_harmful", "log_ratio_primary", "log_rir"), _MEAN_SD),
    },
    closed=True,
)

_SPECTRUM = {"type": "array", "items": MAYBE}

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": SCHEMA_VERSION,
    **record(
        {
            "schema": {"enum": [*UNSEALED, SCHEMA_VERSION]},
            "experiment": NAME,
            "method": NAME,
            "seed": {"type": "integer"},
            "init": {"enum": ["identity", "random", "pretrained"]},
            "config": {"type": "object"},
            "command": TEXT,
            "versions": {
                "type": "object",
                "required": ["python", "jax", "jaximm"],
                "additionalProperties": TEXT,
            },
            "device": record({"platform": NAME, "kind": NAME, "count": COUNT}),
            "dtype": NAME,
            "data": record(
                {
                    "name": NAME,
                    "description": TEXT,
                    "source": TEXT,
                    "primary": _TASK_DATA,
                    "harmful": _TASK_DATA,
                    "inputs_shared": {"type": "boolean"},
                }
            ),
            "backbone": record(
                {"model": NAME, "trained": TEXT, "hash_before": NAME, "hash_after": NAME}
            ),
            "groups": _pair(_GROUPS, SPLITS),
            "logits_change": MAYBE,
            "conditioning": {
                "type": "object",
                "propertyNames": {"enum": list(FOOTINGS)},
                "minProperties": 1,
                "additionalProperties": {
                    "type": "object",
                    "propertyNames": {"enum": list(SPLITS)},
                    "minProperties": 1,
                    "additionalProperties": {"$ref": "#/$defs/conditioning_row"},
                },
            },
            "spectra": _pair(_pair(_SPECTRUM, ("before", "after")), ("primary", "harmful")),
            "trajectory": {
                "type": "array",
                "items": record(
                    {
                        "step": COUNT,
                        "log_kappa_primary": MAYBE,
                        "log_kappa_harmful": MAYBE,
                        "log_ratio_harmful": MAYBE,
                        "log_ratio_primary": MAYBE,
                        "rank_primary": COUNT,
                        "rank_harmful": COUNT,
                        "task_loss": MAYBE,
                        "scale_primary": MAYBE,
                        "scale_harmful": MAYBE,
                    },
                    optional=("task_loss", "scale_primary", "scale_harmful"),
                ),
            },
            "utility": _UTILITY,
            "harmful_utility": _UTILITY,
            "flags": {
                "type": "array",
                "items": record(
                    {
                        "code": NAME,
                        "severity": {"enum": ["info", "warning"]},
                        "message": NAME,
                        "caps": {"type": "boolean"},
                    },
                    optional=("caps",),  # earlier results have none
                ),
            },
            "timing": record(
                {
                    "immunise_s": MAYBE,
                    "measure_s": MAYBE,
                    "total_s": MAYBE,
                    "steps": COUNT,
                    "s_per_step": MAYBE,
                }
            ),
        },
        optional=("backbone", "groups", "logits_change"),
        closed=True,
    ),
    "$defs": {"kappa": _KAPPA, "conditioning_row": _CONDITIONING_ROW},
}
"""JSON Schema of a result."""


def validate(result: Mapping[str, Any]) -> None:
    """Checks `result` against `SCHEMA` and against itself.

    Beyond the schema: log RIR is (i) - (ii) to within rounding, inside its own interval. In a
    result of version 1 the sections that are left out by `read` may be there, unchecked.

    Raises:
      ResultError: one line with the place in the result and what is wrong there.
    """
    version = SCHEMA_VERSION
    if isinstance(result, Mapping) and result.get("schema") in UNSEALED:
        version = result["schema"]
    if version == EARLIER:
        result = {key: value for key, value in result.items() if key not in _MOVED}
    check_schema(result, SCHEMA, version)
    _check_ratios(result["conditioning"])


def _check_ratios(conditioning: Mapping[str, Any]) -> None:
    for footing, splits in conditioning.items():
        for split, row in splits.items():
            place = f"conditioning.{footing}.{split}"
            harmful, primary, rir = (
                row[key] for key in ("log_ratio_harmful", "log_ratio_primary", "log_rir")
            )
            if None in (harmful, primary, rir):
                continue
            # float32 logs of kappas up to 1e38 carry about 1e-5; a swapped sign or a log10 is far.
            slack = 1e-4 * (1.0 + abs(harmful) + abs(primary))
            if abs(rir - (harmful - primary)) > slack:
                raise ResultError(
                    f"{place}: log_rir is {rir:.6g}, but log_ratio_harmful - log_ratio_primary is "
                    f"{harmful - primary:.6g}."
                )
            lower, upper = row["log_rir_lower"], row["log_rir_upper"]
            if (lower is not None and lower > rir + slack) or (
                upper is not None and upper < rir - slack
            ):
                raise ResultError(f"{place}: log_rir {rir:.6g} is outside [{lower}, {upper}].")


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a result, whole or not at all; see `jaximm.records.files.write`."""
    files.write(path, content, check=validate, of="result")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a result; see `jaximm.records.files.read`.

    Of version 1 without its attack rows and certificates, and the flags that were raised of these:
    the assessment has them now, by another rule of selection.
    """
    result = files.read(path, check=validate, of="result", unsealed=UNSEALED)
    if result["schema"] == EARLIER:
        result = {key: value for key, value in result.items() if key not in _MOVED}
        result["flags"] = [flag for flag in result["flags"] if flag["code"] not in _MOVED_FLAGS]
    return result
