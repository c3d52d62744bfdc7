"""What an experiment is: the configuration that ``config.json`` holds, and the built-in ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaximm import attacks, data, immunisers, registry, result
from jaximm.training.optimiser import OptimiserConfig


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
        _check_runs(self)
        for label in self.methods:
            method_config(label, self.method_fields)
        if self.init not in ("identity", "random"):
            raise ValueError(f'init must be "identity" or "random", got {self.init!r}.')
        if not self.damping > 0:
            raise ValueError(f"damping must be > 0, got {self.damping}; 1e-3 is the measure's.")
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
        return cls(**_read_fields(cls, fields, ("name", "data")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepConfig:
    """An experiment on a deep backbone: what its ``config.json`` holds.

    Attributes:
      name: of the experiment.
      images: a key of `jaximm.data.images.IMAGE_REGISTRY`.
      image_fields: fields of its config that differ from the defaults.
      backbone: a key of `jaximm.models.REGISTRY`.
      backbone_fields: fields of its config that differ from the defaults.
      weights: "pretrained", a file, or "random".
      image_size: of the inputs; None: what the weights expect.
      train: path pattern of the parameters that trained methods may change.
      methods: labels, as in `ExperimentConfig`.
      method_fields: fields by method name.
      seeds: one run each.
      steps: updates of trained methods; a label or `method_fields` may say otherwise.
      batch_size: rows of each task a step, over all devices; None: all there are.
      optimiser: of trained methods.
      label_smoothing: of the primary cross-entropy.
      accumulate: micro-batches a step.
      sites: layers whose inputs are regularised besides the features.
      compute_dtype: of the trained stages: "float32" or "bfloat16".
      parallel: how a step is spread over devices: "jit", "pmap", "shard_map".
      groups: of rows, for the paper's protocol.
      group_rows: rows a group.
      suite: budgets and grids of the probe attackers.
      attackers: probe attackers; None is all.
      weight_attackers: attackers that fine-tune the trained blocks.
      fine_tune_steps: their budget.
      log_points: records in a run's trajectory.
      checkpoint_every: steps between checkpoints; None: only the last step is saved.
      description: one line.
    """

    name: str
    images: str
    image_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    backbone: str
    backbone_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: str = "pretrained"
    image_size: int | None = None
    train: str
    methods: tuple[str, ...] = (
        "none",
        "ill_only",
        "imma",
        "condition_gap",
        "balanced_gap",
        "direct_kappa",
        "limit",
        "erase",
    )
    method_fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    steps: int = 300
    batch_size: int | None = 64
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)
    label_smoothing: float = 0.1
    accumulate: int = 1
    sites: tuple[str, ...] = ()
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["jit", "pmap", "shard_map"] = "jit"
    groups: int = 20
    group_rows: int = 100
    suite: str = "quick"
    attackers: tuple[str, ...] | None = None
    weight_attackers: tuple[str, ...] = ("fine_tune_sgd", "fine_tune_adam")
    fine_tune_steps: int = 200
    log_points: int = 20
    checkpoint_every: int | None = None
    description: str = ""

    def __post_init__(self):
        from jaximm.data import images

        images.make_image_config(self.images, **self.image_fields)
        _check_runs(self)
        for label in self.methods:
            deep_method_config(label, self)
        for key in ("steps", "accumulate", "groups", "group_rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be >= 1, got {getattr(self, key)}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, or None, got {self.batch_size}.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f'compute_dtype must be "float32" or "bfloat16", got {self.compute_dtype!r}.'
            )
        if self.parallel not in ("jit", "pmap", "shard_map"):
            raise ValueError(
                f'parallel must be "jit", "pmap" or "shard_map", got {self.parallel!r}.'
            )
        attacks.suite_attacks(self.suite, self.attackers)
        for name in self.weight_attackers:
            attacks.make_weight_attack(name)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return result.plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DeepConfig:
        """The configuration that `to_json` wrote.

        Raises:
          ValueError: an unknown key, with the known ones, a missing one, or a refused value.
        """
        values = _read_fields(cls, fields, ("name", "images", "backbone", "train"))
        if isinstance(values.get("optimiser"), Mapping):
            values["optimiser"] = OptimiserConfig(**values["optimiser"])
        return cls(**values)


CLOSED_FORM = ("none", "limit", "erase")
"""Methods that train no parameter: on a deep backbone they see its features, all rows at once."""


def deep_method_config(label: str, config: DeepConfig) -> Any:
    """The config of a label; the steps and batch size of the experiment stand behind the rest."""
    name, _ = parse_label(label)
    closed = name in CLOSED_FORM
    base = {
        "steps": 1 if closed else config.steps,
        "batch_size": None if closed else config.batch_size,
    }
    fields = {**config.method_fields, name: {**base, **config.method_fields.get(name, {})}}
    return method_config(label, fields)


def _read_fields(cls: type, fields: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """Fields of a configuration as its class takes them: lists become tuples."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown config key {unknown[0]!r}; choose from {list(known)}.")
    missing = [key for key in required if key not in fields]
    if missing:
        raise ValueError(f"config key {missing[0]!r} is missing.")
    values = dict(fields)
    for key in _LISTS & set(values):
        if isinstance(values[key], str):
            raise ValueError(f"config key {key!r} must be a list, got {values[key]!r}.")
        if values[key] is not None:
            values[key] = tuple(values[key])
    return values


_LISTS = {"methods", "seeds", "attackers", "weight_attackers", "sites"}


def _check_runs(config: ExperimentConfig | DeepConfig) -> None:
    """Methods and seeds: what names the run directories."""
    if not config.methods:
        raise ValueError(f"methods must name at least one of {sorted(immunisers.REGISTRY)}.")
    if not config.seeds:
        raise ValueError("seeds must name at least one; 0 is the usual.")
    for seed in config.seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"seeds must be integers in [0, 2^31), got {seed!r}.")
    for key in ("methods", "seeds"):
        values = getattr(config, key)
        if len(set(values)) < len(values):
            raise ValueError(f"{key} must differ, since each has a run directory: {values}.")
    if config.log_points < 1:
        raise ValueError(f"log_points must be >= 1, got {config.log_points}.")
    if config.checkpoint_every is not None and config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be >= 1, or None, got {config.checkpoint_every}.")


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
    except (TypeError, ValueError) as error:
        if not fields or name not in immunisers.REGISTRY:
            raise
        text = str(error).removeprefix(f"{name}: ")
        raise ValueError(f"method label {label!r}: {text}") from error


def read_config(path: Path) -> ExperimentConfig | DeepConfig:
    """The experiment of a ``config.json``; one with a backbone is a deep one.

    It runs no code: where the configuration names what a file of the user registered, `load_code`
    comes first.

    Raises:
      ValueError: unreadable, no JSON object, or refused; names the file.
    """
    fields, code = _read_file(path)
    try:
        return (DeepConfig if "backbone" in fields else ExperimentConfig).from_json(fields)
    except (TypeError, ValueError) as error:
        absent = [f"{name} of {one.file or one.entry_point}" for one, name in _absent(code)]
        where = f" It uses {', '.join(absent)}: call jaximm.config.load_code." if absent else ""
        raise ValueError(f"{path}: {error}{where}") from error


CODE = "code"
"""Key of a ``config.json`` under which it says where its configuration's code came from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code(registry.Origin):
    """A file or entry point, and what a configuration uses of it.

    Attributes:
      registers: registry entries as ``family.name``; none: the file only defines the configuration.
    """

    registers: tuple[str, ...] = ()


def code_of(config: ExperimentConfig | DeepConfig, source: str = "") -> list[Code]:
    """Where the code of a configuration came from, as far as it came from outside jaximm.

    Args:
      config: the experiment.
      source: the .py or .json file that `load_experiment` read it from, or "".
    """
    names = [("immuniser", parse_label(label)[0]) for label in config.methods]
    names += [("attack", name) for name in config.attackers or ()]
    if isinstance(config, DeepConfig):
        names += [("model", config.backbone), ("images", config.images)]
        names += [("weight_attack", name) for name in config.weight_attackers]
    else:
        names.append(("data", config.data))
    uses: dict[registry.Origin, list[str]] = {}
    path = Path(source)
    if path.suffix == ".py" and (ran := registry.last_run(path)) is not None:
        uses[ran] = []
    for family, name in dict.fromkeys(names):
        if (origin := registry.origin_of(family, name)) is not None:
            uses.setdefault(origin, []).append(f"{family}.{name}")
    found = [
        Code(**dataclasses.asdict(origin), registers=tuple(used)) for origin, used in uses.items()
    ]
    if path.suffix == ".json" and path.is_file():  # what only defined the configuration
        found += [one for one in read_code(path) if not one.registers]
    return found


def read_code(path: Path) -> list[Code]:
    """What a ``config.json`` says of where its configuration's code came from.

    Raises:
      ValueError: unreadable, or not as a run writes it; names the file.
    """
    return _read_file(path)[1]


def config_json(config: ExperimentConfig | DeepConfig, code: Iterable[Code]) -> dict[str, Any]:
    """What ``config.json`` holds: the fields, and where their code came from if that is known."""
    origins = [
        {key: value for key, value in dataclasses.asdict(one).items() if value} for one in code
    ]
    return result.plain(config.to_json() | ({CODE: origins} if origins else {}))


def load_code(paths: Iterable[Path], *, tell: Callable[[str], None] | None = None) -> None:
    """Runs the files whose registered entries the configurations at `paths` use.

    A configuration that came from a ``.py`` file is code: this runs that file again, once its
    content is known to be the recorded one. What is registered already, by an earlier call or by
    code of the caller's choice, is left as it is, and then the file is not run.

    Args:
      paths: of ``config.json`` files.
      tell: gets one line before a file is run.

    Raises:
      ValueError: a file is gone, has changed, or fails; an entry point is not installed; or a
        ``config.json`` cannot be read.
    """
    for path in map(Path, paths):
        code = read_code(path)
        for one in code:
            own = [name for name in one.registers if not _is_replaced(one, name)]
            if one.file and own:
                _check_unchanged(one, own, path)
        for one in code:
            absent = [name for _, name in _absent([one])]
            if absent and one.file:
                if tell is not None:
                    tell(
                        f"running {one.file}, which defines {_listed(absent)} of {path}: a .py "
                        "configuration is code that runs."
                    )
                registry.run_file(Path(one.file))
                absent = [name for _, name in _absent([one])]
            if absent:
                place, remedy = one.file, "name the code to use with --load FILE"
                if one.entry_point:
                    package = one.package or "a package"
                    place = f"entry point {one.entry_point!r} of {package}"
                    remedy = f"install {package}, or {remedy}"
                raise ValueError(
                    f"{path} uses {_listed(absent)}, which came from {place} and is not "
                    f"registered here; {remedy}."
                )


def _check_unchanged(one: Code, names: Sequence[str], path: Path) -> None:
    """Refuses a file that is not the one that the run at `path` was made with."""
    try:
        sha256 = hashlib.sha256(Path(one.file).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(
            f"{path} needs {_listed(names)} of {one.file}, which cannot be read "
            f"({error.strerror}): put it back, or name the code to use with --load FILE."
        ) from error
    if sha256 != one.sha256:
        raise ValueError(
            f"{path} needs {_listed(names)} of {one.file}, which has changed since (SHA-256 "
            f"{one.sha256[:12]}... then, {sha256[:12]}... now): put the earlier file back, or name "
            "the code to use with --load FILE."
        )


def _is_registered(name: str) -> bool:
    family, _, entry = name.partition(".")
    return family in registry.FAMILIES and entry in registry.entries(family)


def _is_replaced(one: Code, name: str) -> bool:
    """Whether an entry is registered by other code than `one`: then it is the caller's choice."""
    origin = registry.origin_of(*name.split(".", 1)) if _is_registered(name) else None
    return _is_registered(name) and (origin is None or origin.file != one.file)


def _absent(code: Iterable[Code]) -> list[tuple[Code, str]]:
    """Entries that a configuration uses and nobody has registered yet."""
    return [(one, name) for one in code for name in one.registers if not _is_registered(name)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join("{} {!r}".format(*name.split(".", 1)) for name in names)


def _read_file(path: Path) -> tuple[dict[str, Any], list[Code]]:
    """Fields of a ``config.json``, and where their code came from.

    Raises:
      ValueError: unreadable, or no JSON object; names the file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a configuration: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}.")
    entries = fields.pop(CODE, [])
    try:
        code = [Code(**{"registers": (), **entry}) for entry in entries]
        code = [dataclasses.replace(one, registers=tuple(one.registers)) for one in code]
        names = [name for one in code for name in one.registers]
        texts = [text for one in code for text in dataclasses.astuple(one)[:-1]]
        is_sound = all(isinstance(text, str) for text in [*names, *texts])
        is_sound = is_sound and all("." in name for name in names)
    except TypeError:
        is_sound, code = False, []
    if not is_sound:
        raise ValueError(
            f"{path}: config key {CODE!r} must be a list of files and entry points, as a run "
            f"writes it; got {str(entries)[:100]}."
        )
    return fields, code


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


def load_experiment(name_or_path: str) -> ExperimentConfig | DeepConfig:
    """A built-in experiment by name, or one from a ``config.json`` or a file with ``CONFIG``.

    A ``.py`` file is code, and runs (`jaximm.registry.run_file`); a ``config.json`` runs none.

    Raises:
      ValueError: neither a known name nor such a file; or what the file holds is refused.
    """
    if name_or_path in EXPERIMENTS:
        return EXPERIMENTS[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".json" and path.is_file():
        return read_config(path)
    if path.suffix == ".py" and path.is_file():
        config = registry.run_file(path)[0].get("CONFIG")
        if not isinstance(config, ExperimentConfig | DeepConfig):
            raise ValueError(f"{path} must define CONFIG, an ExperimentConfig or a DeepConfig.")
        return config
    raise ValueError(
        f"unknown experiment {name_or_path!r}; choose from {sorted(EXPERIMENTS)}, or give a "
        "config.json or a .py file that defines CONFIG."
    )
