"""What an experiment is: the configuration that ``config.json`` holds, and the built-in ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaximm import attacks, data, immunisers, result


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A whole experiment: what ``config.json`` holds and what is read back to rerun it.

    Attributes:
      name: of the experiment.
      data: a key of `jaximm.data.REGISTRY`.
      data_fields: fields of its config that differ from the defaults.
      methods: labels: ``"condition_gap"``, or with fields ``"limit@t=1,damping=0.01"``. Plain
        ``"limit"`` chooses t, damping and shrinkage on the selection rows.
      method_fields: fields by method name, for every label of it.
      seeds: one run each.
      init: the start of the backbone, "identity" or "random".
      damping: of the measure, relative to tr(K) / d of each task's training rows.
      suite: attack budgets and grids: "quick", "standard", "full".
      attackers: names; None is all.
      log_points: records in a run's trajectory.
      checkpoint_every: steps between checkpoints; None: only the last step is saved.
      description: one line.
    """

    name: str
    data: str
    data_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    methods: tuple[str, ...] = (
        "none",
        "ill_only",
        "imma",
        "condition_gap",
        "balanced_gap",
        "direct_kappa",
        "limit",
    )
    method_fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    init: Literal["identity", "random"] = "identity"
    damping: float = 1e-3
    suite: str = "quick"
    attackers: tuple[str, ...] | None = None
    log_points: int = 50
    checkpoint_every: int | None = None
    description: str = ""

    def __post_init__(self):
        if self.data not in data.REGISTRY:
            raise ValueError(
                f"unknown data set {self.data!r}; choose from {sorted(data.REGISTRY)}."
            )
        if not self.methods:
            raise ValueError(f"methods must name at least one of {sorted(immunisers.REGISTRY)}.")
        for label in self.methods:
            method_config(label, self.method_fields)
        if not self.seeds:
            raise ValueError("seeds must name at least one; 0 is the usual.")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
                raise ValueError(f"seeds must be integers in [0, 2^31), got {seed!r}.")
        for key in ("methods", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} must differ, since each has a run directory: {values}.")
        if self.init not in ("identity", "random"):
            raise ValueError(f'init must be "identity" or "random", got {self.init!r}.')
        if not self.damping > 0:
            raise ValueError(f"damping must be > 0, got {self.damping}; 1e-3 is the measure's.")
        if self.log_points < 1:
            raise ValueError(f"log_points must be >= 1, got {self.log_points}.")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(
                f"checkpoint_every must be >= 1, or None, got {self.checkpoint_every}."
            )
        attacks.suite_attacks(self.suite, self.attackers)
        data.make_config(self.data, **self.data_fields)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return result.plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ExperimentConfig:
        """The configuration that `to_json` wrote.

        Raises:
          ValueError: an unknown key, with the known ones, a missing one, or a refused value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"unknown config key {unknown[0]!r}; choose from {known}.")
        missing = [key for key in ("name", "data") if key not in fields]
        if missing:
            raise ValueError(f"config key {missing[0]!r} is missing.")
        values = dict(fields)
        for key in ("methods", "seeds", "attackers"):
            if isinstance(values.get(key), str):
                raise ValueError(f"config key {key!r} must be a list, got {values[key]!r}.")
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        return cls(**values)


def parse_label(label: str) -> tuple[str, dict[str, Any]]:
    """Method name and fields of a label.

    >>> parse_label("limit@t=1,damping=0.01")
    ('limit', {'t': 1, 'damping': 0.01})

    Raises:
      ValueError: not ``name`` or ``name@key=value,...``, with JSON values.
    """
    name, _, tail = label.partition("@")
    fields = {}
    for part in tail.split(",") if tail else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"method label {label!r} must read name@key=value,key=value.")
        try:
            fields[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[key.strip()] = value
    return name, fields


def method_config(label: str, method_fields: Mapping[str, Mapping[str, Any]]) -> Any:
    """The config of a label, with the experiment's fields for that method under the label's own."""
    name, fields = parse_label(label)
    try:
        return immunisers.make_config(name, **{**method_fields.get(name, {}), **fields})
    except TypeError as error:  # a field of the wrong type, "t=high"
        raise ValueError(f"method label {label!r}: {error}.") from error


def read_config(path: Path) -> ExperimentConfig:
    """The experiment of a ``config.json``.

    Raises:
      ValueError: unreadable, no JSON object, or refused; names the file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a configuration: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}.")
    try:
        return ExperimentConfig.from_json(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


# The released code makes 210 updates (30 epochs of 7 batches); ours each see all rows.
# Rates: tuned on training rows of 3-8, 4-9 and 0-1, see experiments/mnist_pairs/README.md.
_DIGIT_RUNS: Mapping[str, Mapping[str, Any]] = {
    "condition_gap": {"steps": 210},
    "ill_only": {"steps": 210},
    "imma": {"steps": 210},
    "balanced_gap": {"steps": 210, "rate": 0.45, "final_rate": 0.1},
    "direct_kappa": {"steps": 210, "learning_rate": 0.01},
}

EXPERIMENTS: dict[str, ExperimentConfig] = {
    config.name: config
    for config in (
        ExperimentConfig(
            name="house_price",
            data="house_prices",
            description="House prices: lot area (primary) against sale price (harmful), d = 79.",
        ),
        ExperimentConfig(
            name="mnist_pair",
            data="mnist_pairs",
            method_fields=_DIGIT_RUNS,
            description="Images of one digit against another, constant labels, as in the paper.",
        ),
        ExperimentConfig(
            name="mnist_slant",
            data="mnist_pairs",
            data_fields={"target": "slant"},
            method_fields=_DIGIT_RUNS,
            description="The same images with a real target: the slant of the digit.",
        ),
        ExperimentConfig(
            name="mnist_one_vs_rest",
            data="mnist_pairs",
            data_fields={"target": "one_vs_rest"},
            methods=("none", "condition_gap", "limit@t=0"),
            method_fields={"condition_gap": {"steps": 30}},
            description="Two labels on the same images: conditioning cannot separate them.",
        ),
    )
}
"""Built-in experiments. Folders of `experiments/` build theirs from these."""


def load_experiment(name_or_path: str) -> ExperimentConfig:
    """A built-in experiment by name, or one from a ``config.json`` or a file with ``CONFIG``.

    Raises:
      ValueError: neither a known name nor such a file; or what the file holds is refused.
    """
    if name_or_path in EXPERIMENTS:
        return EXPERIMENTS[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".json" and path.is_file():
        return read_config(path)
    if path.suffix == ".py" and path.is_file():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
        if not isinstance(getattr(module, "CONFIG", None), ExperimentConfig):
            raise ValueError(f"{path} must define CONFIG, an ExperimentConfig.")
        return module.CONFIG
    raise ValueError(
        f"unknown experiment {name_or_path!r}; choose from {sorted(EXPERIMENTS)}, or give a "
        "config.json or a .py file that defines CONFIG."
    )
