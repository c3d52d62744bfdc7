"""The result file: one experiment, one method, one seed, as JSON with a checked schema.

Every number that the reports print comes out of such a file. The schema is the constant `SCHEMA`,
a JSON Schema (draft 2020-12); `write` and `read` both check against it, so a file that can be read
is a file that every table and figure can use.

Conventions
  * Logarithms are natural logarithms, times are seconds, accuracies and R^2 are fractions.
  * NaN and +-inf are not JSON. `write` stores them as ``null``; in a field that may be ``null``,
    ``null`` means "infinite, unbounded or not defined". `read` refuses the bare tokens.
  * A number of steps is -1 where the target was not reached within ``steps_budget``.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA_VERSION = "jaximm.result/1"
"""Name and version of the schema, the value of the key ``schema``."""

FOOTINGS = ("damped", "pseudo_inverse", "reference")
"""The footings on which a condition number is taken; the first is the measure."""

SPLITS = ("train", "held_out")
"""The two sets of rows on which everything is measured."""

TARGETS = ("1e-1", "1e-2", "1e-3")
"""The relative targets to which attack costs are given."""


class ResultError(ValueError):
    """A result that cannot be written or read. The message is one line and names the file."""


NUMBER = {"type": "number"}
MAYBE = {"type": ["number", "null"]}
TEXT = {"type": "string"}
NAME = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
STEPS = {"type": "integer", "minimum": -1}
_TASK = {"enum": ["primary", "harmful"]}
_BACKBONE = {"enum": ["before", "after"]}


def record(properties: dict, *, optional: Sequence[str] = (), closed: bool = False) -> dict:
    """Schema of an object whose properties are required unless named in `optional`."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": [key for key in properties if key not in optional],
    }
    return {**schema, "additionalProperties": False} if closed else schema


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

_LABEL_TASKS = {
    "final_held_out_accuracy": MAYBE,
    "final_held_out_loss": MAYBE,
    "final_train_loss": MAYBE,
    "accuracy_target": MAYBE,
    "steps_to_accuracy": STEPS,
    "flops_to_accuracy": MAYBE,
    "batch_size": COUNT,
}

_ATTACK = record(
    {
        "attacker": NAME,
        "kind": NAME,
        "task": _TASK,
        "backbone": _BACKBONE,
        "seed": {"type": "integer"},
        "hyper_parameters": {"type": "object"},
        "grid": {"type": "array", "items": {"type": "object"}},
        "edge_of_grid": {"type": "boolean"},
        "steps_budget": COUNT,
        "curve": record(
            {
                "step": {"type": "array", "items": COUNT},
                "relative_excess_loss": {"type": "array", "items": MAYBE},
                "relative_parameter_error": {"type": "array", "items": MAYBE},
                "train_loss": {"type": "array", "items": MAYBE},
                "held_out_loss": {"type": "array", "items": MAYBE},
                "held_out_accuracy": {"type": "array", "items": MAYBE},
            },
            optional=("train_loss", "held_out_loss", "held_out_accuracy"),
        ),
        "steps_to_parameter_error": record(dict.fromkeys(TARGETS, STEPS)),
        "steps_to_loss_gap": record(dict.fromkeys(TARGETS, STEPS)),
        "flops_per_step": MAYBE,
        "setup_flops": MAYBE,
        "flops_to_loss_gap": record(dict.fromkeys(TARGETS, MAYBE), optional=("1e-1", "1e-3")),
        "final_relative_excess_loss": MAYBE,
        "diverged": {"type": "boolean"},
        "still_falling": {"type": "boolean"},
        **_LABEL_TASKS,
    },
    optional=tuple(_LABEL_TASKS),
)

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": SCHEMA_VERSION,
    **record(
        {
            "schema": {"const": SCHEMA_VERSION},
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
            "attacks": {"type": "array", "items": _ATTACK},
            "certificates": {
                "type": "array",
                "items": record(
                    {
                        "name": NAME,
                        "threat_model": TEXT,
                        "value": MAYBE,
                        "unit": TEXT,
                        "task": _TASK,
                        "backbone": _BACKBONE,
                        "target": {"type": ["string", "number", "null"]},
                    }
                ),
            },
            "flags": {
                "type": "array",
                "items": record(
                    {
                        "code": NAME,
                        "severity": {"enum": ["info", "warning"]},
                        "message": NAME,
                    }
                ),
            },
            "timing": record(
                {
                    "immunise_s": MAYBE,
                    "measure_s": MAYBE,
                    "attack_s": MAYBE,
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


def plain(value: Any) -> Any:
    """`value` as plain JSON values: arrays become lists, NaN and +-inf become None.

    Takes dictionaries, sequences, NumPy and JAX scalars and arrays, paths, and what JSON knows.

    >>> plain({"a": (1, float("inf")), 2: "b"})
    {'a': [1, None], '2': 'b'}

    Raises:
      ResultError: for any other type, naming it.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX, scalars and arrays
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ResultError(f"a result holds plain data, got {type(value).__name__}: {_short(value)}.")


def validate(result: Mapping[str, Any]) -> None:
    """Checks `result` against `SCHEMA` and against itself.

    Beyond the schema: the points of a curve have one step each, and log RIR is (i) - (ii) to
    within rounding, inside its own interval.

    Raises:
      ResultError: one line with the place in the result and what is wrong there.
    """
    check_schema(result, SCHEMA, SCHEMA_VERSION)
    _check_ratios(result["conditioning"])
    _check_curves(result["attacks"])


def check_schema(content: Mapping[str, Any], schema: Mapping[str, Any], version: str) -> None:
    """Checks plain JSON against a schema whose documents name their version.

    Raises:
      ResultError: another version, or one line with the place and what is wrong there.
    """
    if not isinstance(content, Mapping):
        raise ResultError(f"a result is a JSON object, got {type(content).__name__}.")
    found = content.get("schema")
    if found != version:
        what = "no schema version" if found is None else f"schema {_short(found)}"
        raise ResultError(
            f"{what}, this jaximm reads {version!r}; rerun the experiment, or use the "
            "jaximm that wrote it."
        )
    from jsonschema import Draft202012Validator  # 0.1 s: only those who need it pay for it
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        raise ResultError(f"{_place(error.absolute_path)}: {_one_line(error.message)}")


def write(
    path: str | os.PathLike[str],
    result: Mapping[str, Any],
    *,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Writes `result` to `path`, whole or not at all.

    The text goes to a new file in the same folder, is flushed to the disk, and then takes the place
    of `path` in one move: whoever reads `path` finds the old result or the new one, and a write
    that fails leaves the old one. Arrays become lists; NaN and +-inf become ``null``.

    Args:
      path: the file.
      result: what `check` accepts.
      check: raises ResultError for what is not to be written; `validate` if None.

    Raises:
      ResultError: if the result does not fit the schema, or the file cannot be written.
    """
    path = Path(path)
    try:
        content = plain(result)
        (check or validate)(content)
    except ResultError as error:
        raise ResultError(f"{path}: not written: {error}") from None
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n"
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # A path that is not UTF-8 holds surrogates, which become JSON's own escapes here.
        with open(draft, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResultError(
            f"{path}: not written: {reason}; a result that was there before is untouched."
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str], *, check: Callable[[Mapping[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Reads and checks the result in `path`; `check` as in `write`.

    Raises:
      ResultError: if there is no such file, it is damaged or half written, of another schema
        version, or does not fit the schema. One line: which file, and what is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ResultError(f"{path}: not UTF-8 text; the file is damaged.") from None
    if not text.strip():
        raise ResultError(f"{path}: the file is empty; it was cut short or never written.")
    try:
        result = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ResultError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
            "the file is damaged or half written."
        ) from None
    except (ResultError, RecursionError) as error:
        raise ResultError(f"{path}: {_one_line(str(error))}") from None
    try:
        (check or validate)(result)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    return result


def _refuse(token: str) -> float:
    raise ResultError(f"{token} is not JSON; a result stores null there.")


def _finite(token: str) -> float:
    value = float(token)
    return value if math.isfinite(value) else _refuse(token)


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


def _check_curves(attacks: Sequence[Mapping[str, Any]]) -> None:
    for index, attack in enumerate(attacks):
        curve = attack["curve"]
        steps = len(curve["step"])
        for key in ("relative_excess_loss", "relative_parameter_error"):
            # A method that has no parameters to compare leaves the second list empty.
            if len(curve[key]) not in (
                (steps, 0) if key == "relative_parameter_error" else (steps,)
            ):
                raise ResultError(
                    f"attacks[{index}].curve.{key}: {len(curve[key])} values for {steps} steps."
                )


def _place(path: Sequence[str | int]) -> str:
    """A JSON path as a reader writes it: attacks[3].curve.step."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".") or "top level"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    # jsonschema quotes the whole value; the end of its sentence says what is wrong.
    return text if len(text) <= limit else f"{text[:90]} ... {text[-(limit - 100) :]}"
