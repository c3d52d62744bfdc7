"""What an experiment is: the configuration that ``config.json`` holds."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaximm import attacks, data, immunisers, models, registry
from jaximm.immunisers.about import MethodConfig
from jaximm.measures.conditioning import DAMPING, FEATURE_DAMPING, FEATURE_RTOL
from jaximm.records import files
from jaximm.registry import parse_label
from jaximm.training.optimiser import OptimiserConfig
from jaximm.types import Fields, Json

VERSION = 2
"""Of ``config.json``. Version 1 had no number, and two kinds: of tables and of images."""

LINEAR = "linear"
"""Key in `jaximm.models.REGISTRY` of the backbone whose features are the rows."""

OWN = "python:"
"""Before the name of a model that was handed over in Python (`jaximm.models.own`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole experiment: what ``config.json`` holds and what is read back to rerun it.

    Attributes:
      name: of the experiment.
      data: a key of `jaximm.data.REGISTRY`.
      data_fields: fields of its config that differ from the defaults.
      model: a key of `jaximm.models.REGISTRY`; of a table "linear", which is its default;
        "python:NAME" of one that was handed over in Python.
      model_fields: fields of its config that differ from the defaults.
      weights: "pretrained", "random", a file, or a folder with config.json and model.safetensors.
      classifier: false: the weights' own classifier is not needed; whatever it has is left.
      prefix: of the backbone's arrays in a file that holds more: "module.", "state_dict_ema.".
      layout: of the weights, one of the backbone's; None: the first whose keys fit.
      preprocess: fields of `jaximm.models.Preprocess` in which the weights differ from the
        registered ones of the backbone.
      image_size: of the inputs; None: what the weights expect.
      train: path pattern of the parameters that trained methods may change; "neck", the default of
        linear models, is a linear map after the features, for which methods take exact steps.
      init: where the parameters start: a table's neck as "identity" or "random", other models as
        "pretrained", that is as their weights came. The default is the first that fits.
      methods: labels: ``"condition_gap"``, or with fields ``"limit@t=1,damping=0.01"``. On a table,
        plain ``"limit"`` chooses t, damping and shrinkage on the selection rows.
      method_fields: fields by method name, for every label of it.
      seeds: one run each.
      steps: updates of trained methods; a label or `method_fields` may say otherwise. None: on
        images 300, on tables each method's own.
      batch_size: rows of each task a step, over all devices; None: all there are; "auto": on images
        64, on tables all.
      optimiser: of trained methods without an exact step.
      label_smoothing: of the primary cross-entropy.
      accumulate: micro-batches a step.
      sites: layers whose inputs are regularised besides the features.
      compute_dtype: of the trained stages: "float32" or "bfloat16".
      parallel: how a step is spread over devices: "jit", "pmap", "shard_map".
      damping: of the measure, relative to tr(K) / d of each task's training rows; None: 1e-3 of a
        table's, 1e-6 of a network's features.
      tolerance: of the measure's pseudo-inverse footing, relative; None: 1e-6 of a network's
        features; of a table's rows 1e-10, or their rounding where that is coarser.
      groups: of rows, for the paper's protocol, on images.
      group_rows: rows a group.
      suite: budgets and grids of the probes that `jaximm attack` takes where no level is given: a
        key of `jaximm.attacks.SUITES`.
      attackers: labels of the probes that it takes; None is all.
      weight_attackers: labels of the attackers of the weights that it takes,
        ``"lora@rank=64,learning_rates=1e-4|1e-3"`` (`jaximm.attacks.make_attack`); None: on
        images "fine_tune_sgd" and "fine_tune_adam", on tables none.
      fine_tune_steps: their budget.
      log_points: records in a run's trajectory; None: 20 on images, 50 on tables.
      checkpoint_every: steps between checkpoints; None: by the clock alone
        (`jaximm.run.immunise.CHECKPOINT_SECONDS`), at the end and when the run is stopped.
      description: one line.
    """

    name: str
    data: str
    data_fields: Fields = dataclasses.field(default_factory=dict)
    model: str = ""
    model_fields: Fields = dataclasses.field(default_factory=dict)
    weights: str = "pretrained"
    classifier: bool = True
    prefix: str = ""
    layout: str | None = None
    preprocess: Fields = dataclasses.field(default_factory=dict)
    image_size: int | None = None
    train: str = ""
    init: Literal["", "identity", "random", "pretrained"] = ""
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
    method_fields: Mapping[str, Fields] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    batch_size: int | Literal["auto"] | None = "auto"
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)
    label_smoothing: float = 0.1
    accumulate: int = 1
    sites: tuple[str, ...] = ()
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["jit", "pmap", "shard_map"] = "jit"
    damping: float | None = None
    tolerance: float | None = None
    groups: int = 20
    group_rows: int = 100
    suite: str = "quick"
    attackers: tuple[str, ...] | None = None
    weight_attackers: tuple[str, ...] | None = None
    fine_tune_steps: int = 200
    log_points: int | None = None
    checkpoint_every: int | None = None
    description: str = ""

    def __post_init__(self):
        self._fill_in()
        _check_runs(self)
        for label in self.methods:
            self.method(label)
        _check_range(self)
        attacks.suite_attacks(self.suite, self.attackers)
        for name in self.weight_attackers or ():
            if parse_label(name)[0] not in attacks.WEIGHT_REGISTRY:
                raise ValueError(
                    f"unknown attack on weights {name!r}; choose from "
                    f"{sorted(attacks.WEIGHT_REGISTRY)}."
                )
            attacks.make_attack(name)  # refuses what a label's fields hold
        data.make_config(self.data, **self.data_fields)
        (_check_table if self.is_table else _check_images)(self)

    @property
    def is_table(self) -> bool:
        """Whether the rows are a table's, with numbers as targets."""
        return data.targets_of(self.data) == "numbers"

    def _fill_in(self) -> None:
        """The defaults that depend on the rows."""
        table = self.is_table
        defaults = {
            "model": LINEAR if table else "",
            "init": "identity" if table else "pretrained",
            "steps": None if table else 300,
            "damping": DAMPING if table else FEATURE_DAMPING,
            "tolerance": None if table else FEATURE_RTOL,
            "weight_attackers": () if table else ("fine_tune_sgd", "fine_tune_adam"),
            "log_points": 50 if table else 20,
        }
        for key, value in defaults.items():
            if getattr(self, key) in ("", None):
                object.__setattr__(self, key, value)
        if self.model == LINEAR and not self.train:
            object.__setattr__(self, "train", "neck")
        if self.batch_size == "auto":
            object.__setattr__(self, "batch_size", None if table else 64)

    def method(self, label: str) -> MethodConfig:
        """The config of a label; the experiment's steps and batch size stand behind the rest."""
        base = {}
        if not is_closed_form(label):
            defaults = {"steps": self.steps, "batch_size": self.batch_size}
            base = {key: value for key, value in defaults.items() if value is not None}
        return method_config(label, self.method_fields, base)

    def to_json(self) -> Json:
        """Plain JSON values; `from_json` reads them back."""
        return files.plain({"version": VERSION} | dataclasses.asdict(self))

    @classmethod
    def from_json(cls, fields: Fields) -> Experiment:
        """The configuration that `to_json` wrote, now or as version 1.

        Raises:
          ValueError: another version, an unknown key, with the known ones, a missing one, or a
            refused value.
        """
        values = _of_this_version(fields)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown config key {unknown[0]!r}; choose from {known}.")
        missing = [key for key in ("name", "data") if key not in values]
        if missing:
            raise ValueError(f"config key {missing[0]!r} is missing.")
        for key in _LISTS & set(values):
            if isinstance(values[key], str):
                raise ValueError(f"config key {key!r} must be a list, got {values[key]!r}.")
            if values[key] is not None:
                values[key] = tuple(values[key])
        if isinstance(values.get("optimiser"), Mapping):
            values["optimiser"] = OptimiserConfig(**values["optimiser"])
        return cls(**values)


_LISTS = {"methods", "seeds", "attackers", "weight_attackers", "sites"}

RENAMED = {
    "images": "data",
    "image_fields": "data_fields",
    "backbone": "model",
    "backbone_fields": "model_fields",
}
"""Fields of version 1, and of the command line, by what they are now."""


def _of_this_version(fields: Fields) -> Json:
    """The fields of a ``config.json`` of any version under today's names."""
    values = dict(fields)
    version = values.pop("version", 1)
    if version == VERSION:
        return values
    if version != 1:
        raise ValueError(
            f"config version {version!r} is not known here, only 1 and {VERSION}; it comes from a "
            "newer jaximm."
        )
    by_gradients = "backbone" in values
    values = {RENAMED.get(key, key): value for key, value in values.items()}
    if isinstance(values.get("methods"), Sequence) and not isinstance(values["methods"], str):
        values["methods"] = [
            label.replace("deep_primary_weight", "primary_weight").replace(
                "deep_harmful_weight", "harmful_weight"
            )
            for label in map(str, values["methods"])
        ]
    if isinstance(values.get("method_fields"), Mapping):
        values["method_fields"] = {
            method: _one_weight(dict(own), by_gradients) if isinstance(own, Mapping) else own
            for method, own in values["method_fields"].items()
        }
    return values


def _one_weight(fields: Json, by_gradients: bool) -> Json:
    """Version 1 had weights for gradients beside those of the exact step."""
    for key in ("primary_weight", "harmful_weight"):
        other = fields.pop(f"deep_{key}", None)
        if by_gradients:
            fields.pop(key, None)
            if other is not None:
                fields[key] = other
    return fields


def _check_runs(config: Experiment) -> None:
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


def _check_range(config: Experiment) -> None:
    """The numbers, wherever the rows come from."""
    for key in ("log_points", "accumulate", "groups", "group_rows"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key} must be >= 1, got {getattr(config, key)}.")
    for key in ("checkpoint_every", "steps", "batch_size"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ValueError(f"{key} must be >= 1, or None, got {value}.")
    if config.damping is None or not config.damping > 0:
        raise ValueError(f"damping must be > 0, got {config.damping}; 1e-3 is the measure's.")
    if config.tolerance is not None and not 0 < config.tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {config.tolerance}.")
    for key, known in (
        ("compute_dtype", ("float32", "bfloat16")),
        ("parallel", ("jit", "pmap", "shard_map")),
    ):
        if getattr(config, key) not in known:
            words = ", ".join(f'"{name}"' for name in known)
            raise ValueError(f"{key} must be one of {words}, got {getattr(config, key)!r}.")


_OF_IMAGES = (
    *("weights", "classifier", "prefix", "layout", "preprocess", "image_size", "model_fields"),
    *("sites", "compute_dtype", "parallel", "accumulate"),
)
"""Fields that say nothing of a table."""


def _check_table(config: Experiment) -> None:
    if (config.model, config.train) != (LINEAR, "neck"):
        raise ValueError(
            f'a table has the model "linear", of which the "neck" trains, got {config.model!r} and '
            f"{config.train!r}."
        )
    if config.init not in ("identity", "random"):
        raise ValueError(f'init must be "identity" or "random", got {config.init!r}.')
    defaults = {field.name: field for field in dataclasses.fields(Experiment)}
    for key in _OF_IMAGES:
        field = defaults[key]
        usual = {} if field.default is dataclasses.MISSING else field.default
        if getattr(config, key) != usual:
            raise ValueError(f"{key} is for images, and {config.data!r} is a table; leave it out.")


def _check_images(config: Experiment) -> None:
    if config.model not in models.REGISTRY and not config.model.startswith(OWN):
        raise ValueError(f"unknown model {config.model!r}; choose from {sorted(models.REGISTRY)}.")
    if not config.train:
        raise ValueError('train must name what trains, such as "blocks.11", "neck" or "*".')
    if config.init != "pretrained":
        raise ValueError(f'init of a network must be "pretrained", got {config.init!r}.')
    models.preprocess_fields(config.preprocess)
    if config.image_size is not None and "size" in config.preprocess:
        raise ValueError(
            f"image_size and preprocess both give a size, {config.image_size} and "
            f"{config.preprocess['size']!r}; leave one out."
        )


def is_closed_form(label: str) -> bool:
    """Whether its method trains no parameter: it sees a network's features, all rows at once."""
    return "closed_form" in immunisers.about(parse_label(label)[0]).traits


def method_config(
    label: str,
    method_fields: Mapping[str, Fields],
    base: Fields | None = None,
) -> MethodConfig:
    """The config of a label: its own fields before `method_fields`, and those before `base`."""
    name, fields = parse_label(label)
    try:
        return immunisers.make_config(
            name, **{**(base or {}), **method_fields.get(name, {}), **fields}
        )
    except (TypeError, ValueError) as error:
        if not fields or name not in immunisers.REGISTRY:
            raise
        text = str(error).removeprefix(f"{name}: ")
        raise ValueError(f"method label {label!r}: {text}") from error


def read_config(path: Path) -> Experiment:
    """The experiment of a ``config.json``.

    It runs no code: where the configuration names what a file of the user registered, `load_code`
    comes first.

    Raises:
      ValueError: unreadable, no JSON object, or refused; names the file.
    """
    fields, code = _read_file(path)
    try:
        return Experiment.from_json(fields)
    except (TypeError, ValueError) as error:
        absent = [f"{name} of {part.file or part.entry_point}" for part, name in _absent(code)]
        where = f" It uses {', '.join(absent)}: call jaximm.run.config.load_code." if absent else ""
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


def code_of(config: Experiment, source: str = "") -> list[Code]:
    """Where the code of a configuration came from, as far as it came from outside jaximm.

    Args:
      config: the experiment.
      source: the .py or .json file that `load_experiment` read it from, or "".
    """
    names = [("immuniser", parse_label(label)[0]) for label in config.methods]
    attackers = [*(config.attackers or ()), *(config.weight_attackers or ())]
    names += [("attack", parse_label(label)[0]) for label in attackers]
    names += [("model", config.model), ("data", config.data)]
    uses: dict[registry.Origin, list[str]] = {}
    path = Path(source)
    if path.suffix == ".py" and (ran := registry.last_run(path)) is not None:
        uses[ran] = []
    for family, name in dict.fromkeys(names):
        if (origin := registry.origin_of(family, name)) is not None:
            uses.setdefault(origin, []).append(f"{family}.{name}")
    code = [
        Code(**dataclasses.asdict(origin), registers=tuple(used)) for origin, used in uses.items()
    ]
    if path.suffix == ".json" and path.is_file():  # what only defined the configuration
        code += [origin for origin in read_code(path) if not origin.registers]
    return code


def read_code(path: Path) -> list[Code]:
    """What a ``config.json`` says of where its configuration's code came from.

    Raises:
      ValueError: unreadable, or not as a run writes it; names the file.
    """
    return _read_file(path)[1]


def config_json(config: Experiment, code: Iterable[Code]) -> Json:
    """What ``config.json`` holds: the fields, and where their code came from if that is known."""
    origins = [
        {key: text for key, text in dataclasses.asdict(origin).items() if text} for origin in code
    ]
    return files.plain(config.to_json() | ({CODE: origins} if origins else {}))


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
        for part in code:
            own = [name for name in part.registers if not _is_replaced(part, name)]
            if part.file and own:
                _check_unchanged(part, own, path)
        for part in code:
            absent = [name for _, name in _absent([part])]
            if absent and part.file:
                if tell is not None:
                    tell(
                        f"running {part.file}, which defines {_listed(absent)} of {path}: a .py "
                        "configuration is code that runs."
                    )
                registry.run_file(Path(part.file))
                absent = [name for _, name in _absent([part])]
            if absent:
                place, remedy = part.file, "name the code to use with --load FILE"
                if part.entry_point:
                    package = part.package or "a package"
                    place = f"entry point {part.entry_point!r} of {package}"
                    remedy = f"install {package}, or {remedy}"
                raise ValueError(
                    f"{path} uses {_listed(absent)}, which came from {place} and is not "
                    f"registered here; {remedy}."
                )


def _check_unchanged(part: Code, names: Sequence[str], path: Path) -> None:
    """Refuses a file that is not the one that the run at `path` was made with."""
    try:
        sha256 = hashlib.sha256(Path(part.file).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(
            f"{path} needs {_listed(names)} of {part.file}, which cannot be read "
            f"({error.strerror}): put it back, or name the code to use with --load FILE."
        ) from error
    if sha256 != part.sha256:
        raise ValueError(
            f"{path} needs {_listed(names)} of {part.file}, which has changed since (SHA-256 "
            f"{part.sha256[:12]}... then, {sha256[:12]}... now): put the earlier file back, or "
            "name the code to use with --load FILE."
        )


def _of_this_family(name: str) -> str:
    """``family.name`` under the family that has its entries now."""
    family, dot, entry = name.partition(".")
    return f"{registry.GONE.get(family, family)}{dot}{entry}"


def _is_registered(name: str) -> bool:
    family, _, entry = name.partition(".")
    return family in registry.FAMILIES and entry in registry.entries(family)


def _is_replaced(part: Code, name: str) -> bool:
    """Whether an entry is registered by other code than `part`: then it is the caller's choice."""
    origin = registry.origin_of(*name.split(".", 1)) if _is_registered(name) else None
    return _is_registered(name) and (origin is None or origin.file != part.file)


def _absent(code: Iterable[Code]) -> list[tuple[Code, str]]:
    """Entries that a configuration uses and nobody has registered yet."""
    return [(part, name) for part in code for name in part.registers if not _is_registered(name)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join("{} {!r}".format(*name.split(".", 1)) for name in names)


def read_fields(path: Path) -> Json:
    """The fields of a ``config.json`` as they stand there.

    Raises:
      ValueError: unreadable, damaged, or no JSON object; names the file.
    """
    return _read_file(path)[0]


def _read_file(path: Path) -> tuple[Json, list[Code]]:
    """Fields of a ``config.json``, and where their code came from.

    Raises:
      ValueError: unreadable, damaged, or no JSON object; names the file.
    """
    try:
        fields = files.parse(path)
        if isinstance(fields, dict) and files.ENVELOPE in fields:  # written by hand it has none
            fields = files.opened(fields, of="config")
    except ValueError as error:
        hint = f" (To use one that you edited, remove its key {files.ENVELOPE!r}.)"
        hint = hint if "SHA-256" in str(error) else ""
        raise ValueError(f"{path} cannot be read as a configuration: {error}{hint}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}.")
    entries = fields.pop(CODE, [])
    defaults: Json = {"registers": ()}
    try:
        code = [Code(**{**defaults, **entry}) for entry in entries]
        code = [dataclasses.replace(part, registers=tuple(part.registers)) for part in code]
        names = [name for part in code for name in part.registers]
        texts = [text for part in code for text in dataclasses.astuple(part)[:-1]]
        is_sound = all(isinstance(text, str) for text in [*names, *texts])
        is_sound = is_sound and all("." in name for name in names)
    except TypeError:
        is_sound, code = False, []
    if not is_sound:
        raise ValueError(
            f"{path}: config key {CODE!r} must be a list of files and entry points, as a run "
            f"writes it; got {str(entries)[:100]}."
        )
    return fields, [
        dataclasses.replace(part, registers=tuple(map(_of_this_family, part.registers)))
        for part in code
    ]
