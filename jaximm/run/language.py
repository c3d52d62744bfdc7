"""A user's language model, immunised: a folder of the hub in, a folder of the hub out.

What is conditioned and measured are *sites*: the final hidden states, and the inputs of chosen
linear maps, whose covariance is a Kronecker factor of that map's Hessian. Rows are positions whose
next token counts in the task's loss; K is their second moment, damped as everywhere here. Beside
the harmful task stand two controls, without which no ratio is believed: another benign text in its
place, and the other half of the primary text. Training, choices and reports are parted by document.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaximm import immunisers, linalg, measures, training
from jaximm.assessment.protocol import Progress
from jaximm.carriers import carrier_file
from jaximm.data.batches import batch_indices
from jaximm.data.text import TextTask, TokenSplit, load_text, next_tokens
from jaximm.immunisers.about import MethodConfig
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.models.flat import FlatParams
from jaximm.models.llama import Language, Weights, gauge
from jaximm.models.llama.language import FEATURES
from jaximm.objectives import TokenRows
from jaximm.records import files
from jaximm.registry import parse_label
from jaximm.run.config import method_config
from jaximm.run.folders import write_json
from jaximm.run.language_measure import (
    ROWS_AT_ONCE,
    SiteRow,
    compared,
    counted_positions,
    filled,
    quality,
    some_rows,
    spectra,
)
from jaximm.training import sharding
from jaximm.training.optimiser import OptimiserConfig, make_optimiser
from jaximm.types import Batch, Fields, Json, PairedBatch
from jaximm.version import __version__

RECORD = "jaximm.json"
"""In the folder that is written: how it was made, and what was measured."""

SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct from its package, in the place of a folder."""

SCHEMA = "jaximm.language/1"
"""Of `RECORD`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageExperiment:
    """One method on one language model.

    Attributes:
      model: a folder of the Hugging Face hub, a ``.gguf`` file, or "smollm2".
      method: a label, as ``"condition_gap@harmful_weight=5"``; one of `METHODS`.
      primary: the text that the model must go on predicting, of `jaximm.data.text.TEXTS`.
      harmful: the text that it should be hard to teach.
      control: a benign text that stands in the harmful one's place, to tell what is specific to
        harm; "" for none.
      text_fields: fields of the texts' configurations by role: primary, harmful, control.
      train: what trained methods may change: "last:K" layers, "all", "lora:R" (adapters of rank R
        on every kernel of the layers, merged at the end), or a pattern of paths.
      sites: inputs of linear maps beside the final hidden states: "layers.5.down".
      steps: updates of trained methods.
      batch_size: rows of each task a step.
      optimiser: of trained methods.
      keep: weight of KL(original || model) on the primary text, in the loss of trained methods.
      length: tokens of a row.
      measured_rows: of each part of a text, at most so many are measured; 10 d tokens settle a
        spectrum of width d.
      damping: of the measure, relative to tr(K) / d of the training documents.
      compute_dtype: of the layers: "float32" or "bfloat16".
      remat: compute activations again in the backward pass: a layer's memory, a third more time.
      devices: over which parameters and rows of a trained method's steps are spread (FSDP).
      seed: of batches, adapters and drawn gauges.
    """

    model: str
    method: str = "condition_gap"
    primary: str = "text:prose"
    harmful: str = "text:secrets"
    control: str = "text:dialogue"
    text_fields: Mapping[str, Fields] = dataclasses.field(default_factory=dict)
    train: str = "last:2"
    sites: tuple[str, ...] = ()
    steps: int = 100
    batch_size: int = 8
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)
    keep: float = 1.0
    length: int = 64
    measured_rows: int = 128
    damping: float = 1e-3
    compute_dtype: str = "float32"
    remat: bool = True
    devices: int = 1
    seed: int = 0

    def __post_init__(self):
        name, _ = parse_label(self.method)
        if name not in METHODS:
            raise ValueError(
                f"{name!r} is no method for language models; choose from {list(METHODS)}."
            )
        self.method_config  # noqa: B018 (refuses what it holds)
        for key in ("steps", "batch_size", "measured_rows", "devices"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be >= 1, got {getattr(self, key)}.")
        if self.length < 2:
            raise ValueError(f"length must be >= 2, got {self.length}: a token is predicted.")
        if not (np.isfinite(self.keep) and self.keep >= 0):
            raise ValueError(f"keep must be finite and >= 0, got {self.keep}.")
        if not (np.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"damping must be finite and > 0, got {self.damping}.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f'compute_dtype must be "float32" or "bfloat16", got {self.compute_dtype!r}.'
            )
        unknown = sorted(set(self.text_fields) - {"primary", "harmful", "control"})
        if unknown:
            raise ValueError(
                f"text_fields are by role: primary, harmful, control; got {unknown[0]!r}."
            )

    @property
    def is_trained(self) -> bool:
        """Whether the method takes steps."""
        return parse_label(self.method)[0] not in ("none", "gauge")

    @property
    def method_config(self) -> MethodConfig | GaugeConfig:
        """The method's own configuration."""
        name, fields = parse_label(self.method)
        return _gauge_config(fields) if name == "gauge" else self._trained_config

    @property
    def _trained_config(self) -> MethodConfig:
        return method_config(self.method, {}, {"steps": self.steps, "batch_size": self.batch_size})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaugeConfig:
    """Other weights of the same function: a breaker's tool, and a negative result as a defence.

    Attributes:
      kind: "log_uniform" or "spike": drawn, see `jaximm.models.llama.gauge.random_gauge`;
        "activity": neurons by how much more the harmful text excites them; "limit": value and
        output heads by the closed form that makes the harmful text's covariance at the output
        kernels as ill-conditioned as any such move can, beside the primary text's.
      spread: largest over smallest factor.
      moves: of drawn kinds, separated by "+"; "" is all that leave embeddings tied.
      t: of "limit", position on the frontier, in [0, 1].
    """

    kind: Literal["log_uniform", "spike", "activity", "limit"] = "log_uniform"
    spread: float = 1e3
    moves: str = ""
    t: float = 1.0

    def __post_init__(self):
        kinds = ("log_uniform", "spike", "activity", "limit")
        if self.kind not in kinds:
            raise ValueError(f"kind must be one of {kinds}, got {self.kind!r}.")
        if not 0 <= self.t <= 1:
            raise ValueError(f"t must be in [0, 1], got {self.t}.")
        if not (np.isfinite(self.spread) and self.spread >= 1):
            raise ValueError(f"spread must be finite and >= 1, got {self.spread}.")
        unknown = sorted(set(self.names) - set(gauge.MOVES))
        if unknown:
            raise ValueError(f"unknown move {unknown[0]!r}; choose from {gauge.MOVES}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Moves of drawn kinds."""
        return tuple(self.moves.split("+")) if self.moves else gauge.KEEP_TIES


METHODS = (
    *("none", "gauge", "condition_gap", "ill_only", "balanced_gap"),
    *("npo", "rmu", "ilu", "mudman", "undo"),
    *("tar", "sophon", "mlac", "antidote"),
    *("booster", "vaccine", "repnoise", "seam", "ctrap", "pmp"),
)
"""What can be done to a language model from here."""


class Subject(NamedTuple):
    """A language model and its texts, loaded and checked.

    Attributes:
      loaded: parameters, shape and precision.
      language: its functions.
      tasks: by role: primary, harmful, and control where there is one.
    """

    loaded: llama.Loaded
    language: Language
    tasks: dict[str, TextTask]


def load_subject(config: LanguageExperiment) -> Subject:
    """The model and its texts: everything that can be refused is refused here.

    Raises:
      ValueError: naming what is wrong and the remedy: weights, tokenizer, texts, sites.
    """
    return _subject(config, llama.load)


def _subject(config: LanguageExperiment, load: Callable[[Path], llama.Loaded]) -> Subject:
    path = model_path(config.model)
    headers = llama.abstract(path)  # what headers say is refused before gigabytes are read
    tokenizer = llama.load_tokenizer(path)
    language = Language.shared(
        config=headers.config,
        compute_dtype=None if config.compute_dtype == "float32" else jnp.bfloat16,
        remat=config.remat,
        sites=config.sites,
    )
    if config.is_trained:
        abstract_part(config, headers.params)
    tasks = {}
    for role in ("primary", "harmful", "control"):
        name = getattr(config, role)
        if not name:
            continue
        fields: Json = {"length": config.length, **config.text_fields.get(role, {})}
        tasks[role] = load_text(
            name,
            tokenizer,
            vocabulary=headers.config.vocabulary,
            context=headers.config.context,
            **fields,
        )
    rows = min(len(tasks[role].train.tokens) for role in ("primary", "harmful"))
    if config.is_trained and rows < config.batch_size:
        raise ValueError(
            f"a step takes {config.batch_size} rows of each task, and one has {rows}: give a "
            "smaller batch_size, or more text."
        )
    return Subject(load(path), language, tasks)


class LanguageRecord(TypedDict):
    """What `RECORD` holds: how a model was made, and what was measured."""

    schema: str
    jaximm: str
    command: str
    config: Json  # fields of `LanguageExperiment`
    method: str
    precision: str
    texts: dict[str, str]  # descriptions by role
    utility: dict[str, dict[str, Json]]  # `Quality` and perplexity, by when and role
    change_of_logits: dict[str, float]
    conditioning: list[SiteRow]
    trajectory: list[Json]
    seconds: float


class Plan(NamedTuple):
    """What a run would do, known without loading a weight.

    Attributes:
      precision: of the weights.
      parameters: numbers of the model.
      trained: numbers that a trained method moves; 0 of one that takes no steps.
      rows: of each text by role: to train on, to choose on, to report.
      weights: bytes of the model.
      memory: of a step, a device, as XLA plans it for simulated CPU devices; None without steps.
    """

    precision: str
    parameters: int
    trained: int
    rows: dict[str, tuple[int, int, int]]
    weights: int
    memory: sharding.StepMemory | None


def plan_language(config: LanguageExperiment) -> Plan:
    """What `immunise_language` would do: everything is checked, nothing allocated, nothing written.

    Weights are read by their headers alone; the texts are turned into tokens. A step of a trained
    method is compiled for as many simulated devices as `config` names.

    Raises:
      ValueError: what `load_subject` refuses, but for weights that are not finite; fewer CPU
        devices than `config.devices` in a process that uses jax already; what
        `jaximm.training.sharding.dry_run` refuses.
    """
    _simulate(config.devices)
    subject = _subject(config, llama.abstract)
    leaves = jax.tree.leaves(subject.loaded.params)
    trained, memory = 0, None
    if config.is_trained:
        weights = abstract_part(config, subject.loaded.params)
        trained = sum(leaf.size for leaf in jax.tree.leaves((weights.trained, weights.adapters)))
        method = _method(config, subject.language)
        rows = method.batch_size or config.batch_size
        tokens: Any = jax.ShapeDtypeStruct((rows, config.length), jnp.int32)
        counted: Any = jax.ShapeDtypeStruct((rows, config.length), jnp.bool_)
        batch = Batch(tokens, TokenRows(tokens, counted))
        memory = sharding.dry_run(
            method.immuniser, weights, PairedBatch(batch, batch), _spread(config, "cpu")
        )
    return Plan(
        precision=subject.loaded.precision,
        parameters=sum(leaf.size for leaf in leaves),
        trained=trained,
        rows={
            role: (len(task.train.tokens), len(task.selection.tokens), len(task.held_out.tokens))
            for role, task in subject.tasks.items()
        },
        weights=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        memory=memory,
    )


def _simulate(devices: int) -> None:
    """As many CPU devices as asked for, where nothing has asked for devices yet."""
    if devices == 1:
        return
    with contextlib.suppress(RuntimeError):  # they are there already, few or many
        jax.config.update("jax_num_cpu_devices", devices)


def _spread(config: LanguageExperiment, backend: str | None = None) -> sharding.Sharded:
    """Parameters and rows over the devices."""
    return sharding.make_sharded(
        {"fsdp": config.devices}, sharding.FSDP, rows="fsdp", devices=jax.devices(backend)
    )


def model_path(model: str) -> Path:
    """The folder or file of a model's name."""
    return carrier_file(llama.SMOLLM2_135M) if model == SMOLLM2 else Path(model)


def immunise_language(
    config: LanguageExperiment,
    out: Path,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> LanguageRecord:
    """Runs a method on a language model and writes it in the layout that it came in.

    Args:
      config: what is to be done.
      out: a new folder: config.json, weights, tokenizer, and `RECORD`.
      command: recorded.
      progress: ``progress(label, done, total, record)``.

    Returns:
      The record, as `RECORD` holds it.

    Raises:
      ValueError: what `load_subject` refuses, or an `out` that is not empty.
    """
    out, started = Path(out), time.perf_counter()
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another --out.")
    subject = load_subject(config)
    params, shape = subject.loaded.params, subject.loaded.config
    name, _ = parse_label(config.method)
    measured = functools.partial(spectra, tasks=subject.tasks, rows=config.measured_rows)
    before = measured(subject.language, params)
    trajectory: list[Json] = []
    moved, language = params, subject.language
    if name == "gauge":
        applied = gauge.apply(params, shape, _gauge_of(config, subject))
        moved, shape = applied.params, applied.config
        language = dataclasses.replace(language, config=shape)
    elif config.is_trained:
        moved, trajectory = _trained(config, subject, progress)
    after = measured(language, moved)
    record: LanguageRecord = {
        "schema": SCHEMA,
        "jaximm": __version__,
        "command": command,
        "config": dataclasses.asdict(config),
        "method": config.method,
        "precision": subject.loaded.precision,
        "texts": {role: task.description for role, task in subject.tasks.items()},
        "utility": {
            "before": _qualities(config, subject, params, subject.language),
            "after": _qualities(config, subject, moved, language),
        },
        "change_of_logits": _change_of_logits(
            subject, (params, subject.language), (moved, language)
        ),
        "conditioning": compared(before, after, damping=config.damping),
        "trajectory": trajectory,
        "seconds": time.perf_counter() - started,
    }
    source = model_path(config.model)
    llama.save_folder(out, moved, shape, like=source if source.is_dir() else None)
    if not source.is_dir():  # a GGUF file holds it among its metadata
        llama.save_tokenizer(out, llama.load_tokenizer(source))
    record = files.plain(record)
    write_json(out / RECORD, record, of="language model")
    return record


def batch_of(split: TokenSplit) -> Batch:
    """Rows of a text as inputs and targets."""
    tokens, mask = jnp.asarray(split.tokens), jnp.asarray(split.mask)
    return Batch(tokens, next_tokens(tokens, mask))


def trained_part(config: LanguageExperiment, params: Mapping[str, jax.Array]) -> Weights:
    """What a trained method may change, as `LanguageExperiment.train` says.

    Raises:
      ValueError: a number of layers or a rank that is none, or a pattern that names nothing.
    """
    kind, _, number = config.train.partition(":")
    if config.train == "all":
        return llama.every_parameter(params)
    if kind in ("last", "lora"):
        if not number.isdecimal() or not int(number):
            raise ValueError(f"train is last:K or lora:R with a number, got {config.train!r}.")
        if kind == "last":
            return llama.last_layers(params, int(number))
        key = jax.random.key(config.seed)
        return llama.with_adapters(params, key, rank=int(number))
    return llama.named_parameters(params, config.train)


def abstract_part(config: LanguageExperiment, params: FlatParams) -> Weights:
    """`trained_part` of the shapes of parameters.

    Raises:
      ValueError: as `trained_part`.
    """
    return jax.eval_shape(functools.partial(trained_part, config), params)


class _Method(NamedTuple):
    """A trained method on a model."""

    immuniser: immunisers.Immuniser
    steps: int
    batch_size: int | None


def _method(config: LanguageExperiment, language: Language) -> _Method:
    method = config._trained_config
    with jax.numpy_dtype_promotion("standard"):
        optimiser = make_optimiser(config.optimiser, method.steps)
    problem = language_problem(language, optimiser, keep=config.keep, counted_fn=counted_positions)
    name, _ = parse_label(config.method)
    immuniser = immunisers.make_immuniser(name, method, problem)
    return _Method(immuniser, method.steps, method.batch_size)


def _trained(
    config: LanguageExperiment, subject: Subject, progress: Progress | None
) -> tuple[FlatParams, list[Json]]:
    """Parameters after a trained method, and its trajectory."""
    method = _method(config, subject.language)
    weights = trained_part(config, subject.loaded.params)
    splits = [subject.tasks[role].train for role in ("primary", "harmful")]
    fitted = training.fit(
        method.immuniser,
        weights,
        jax.tree_util.Partial(
            _batch_fn(method.batch_size),
            PairedBatch(*map(batch_of, splits)),
            jnp.uint32(config.seed),
        ),
        seed=config.seed,
        steps=method.steps,
        log_every=max(1, method.steps // 20),
        progress=None
        if progress is None
        else lambda done, record: progress(config.method, done, method.steps, record),
        parallel=None if config.devices == 1 else _spread(config),
    )
    params = jax.device_put(llama.whole(fitted.params), jax.devices()[0])
    return params, fitted.trajectory


@functools.lru_cache(maxsize=16)
def _batch_fn(batch_size: int | None):
    """One function object a batch size."""

    def batch(pair: PairedBatch, seed, step, part=None) -> PairedBatch:
        def rows(text: Batch) -> Batch:
            n = text.x.shape[0]
            places = batch_indices(seed, step, n=n, batch_size=batch_size, part=part)
            return jax.tree.map(lambda leaf: leaf[places], text)

        return PairedBatch(rows(pair.primary), rows(pair.harmful))

    return batch


def _qualities(
    config: LanguageExperiment, subject: Subject, params: FlatParams, language: Language
) -> dict[str, Json]:
    """Of each text, on held-out documents."""
    qualities = {
        role: quality(language, params, some_rows(task.held_out, config.measured_rows))
        for role, task in subject.tasks.items()
    }
    return {
        role: text._asdict() | {"perplexity": text.perplexity} for role, text in qualities.items()
    }


def _change_of_logits(subject: Subject, before, after) -> dict[str, float]:
    """The largest change of a logit, and the largest logit, on a held-out primary row."""
    tokens = jnp.asarray(subject.tasks["primary"].held_out.tokens[:1])
    logits, moved = (
        _logits(params, tokens, language.config) for params, language in (before, after)
    )
    return {
        "largest_change": float(jnp.max(jnp.abs(logits - moved))),
        "largest_logit": float(jnp.max(jnp.abs(logits))),
    }


_logits = jax.jit(llama.logits, static_argnums=2)


# --- gauges that look at texts -------------------------------------------------------------------


def _gauge_of(config: LanguageExperiment, subject: Subject) -> gauge.Gauge:
    method, shape = _gauge_config(parse_label(config.method)[1]), subject.loaded.config
    if method.kind in ("log_uniform", "spike"):
        return gauge.random_gauge(
            config.seed, shape, spread=method.spread, moves=method.names, shape=method.kind
        )
    name = "down" if method.kind == "activity" else "output"
    sites = tuple(f"layers.{layer}.{name}" for layer in range(shape.layers))
    language = dataclasses.replace(subject.language, sites=sites)
    texts = [
        some_rows(subject.tasks[role].train, config.measured_rows)
        for role in ("harmful", "primary")
    ]
    if method.kind == "activity":
        harmful, primary = _root_mean_squares(language, subject.loaded.params, texts)
        return gauge.differential_gauge(harmful, primary, spread=method.spread)
    streams = _head_triangles(language, subject.loaded.params, texts)

    def factor(stream: measures.RowStream) -> jax.Array:
        rows = measures.stream_rows(stream, damping=config.damping)
        return linalg.damped_factor(rows.x, damping=rows.damping)

    harmful, primary = (jax.vmap(jax.vmap(factor))(stream) for stream in streams)
    return gauge.limit_gauge(primary, harmful, t=method.t)


_Carry = TypeVar("_Carry")


def _over_rows(
    language: Language,
    params: FlatParams,
    texts: Sequence[TokenSplit],
    fold: Callable[[_Carry, jax.Array, jax.Array], _Carry],
    start: _Carry,
) -> list[_Carry]:
    """``fold(carry, rows of all sites, counted)`` over each text, by one program."""

    @jax.jit
    def step(carry, weights, batch):
        rows = language.activations(weights, batch.x)
        rows.pop(FEATURES)
        stacked = jnp.stack([rows[site] for site in language.sites])
        return fold(carry, stacked, counted_positions(batch))

    weights, carries = llama.every_parameter(params), []
    for split in texts:
        carry = start
        for place in range(0, len(split.tokens), ROWS_AT_ONCE):
            carry = step(carry, weights, filled(split, place))
        carries.append(carry)
    return carries


def _root_mean_squares(language: Language, params, texts: Sequence[TokenSplit]) -> list[np.ndarray]:
    """[layers, f] of the down kernels' inputs, of each text."""
    width = language.config.hidden

    def fold(carry, rows, counted):
        squares, count = carry
        rows = jnp.where(counted[None, :, None], rows, 0)
        return squares + jnp.sum(rows**2, axis=1), count + jnp.sum(counted)

    start = jnp.zeros((language.config.layers, width)), jnp.zeros(())
    sums = _over_rows(language, params, texts, fold, start)
    return [np.sqrt(np.asarray(squares) / float(count)) for squares, count in sums]


def _head_triangles(
    language: Language, params, texts: Sequence[TokenSplit]
) -> list[measures.RowStream]:
    """Of the output kernels' inputs, a triangle a layer and key head: [layers, kv_heads, h, h]."""
    shape = language.config
    empty = measures.row_stream(shape.head_width, jnp.zeros(()).dtype)
    start = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (shape.layers, shape.kv_heads, *leaf.shape)), empty
    )

    def fold(carry, rows, counted):
        # Consecutive query heads share a key head; each is a row.
        rows = rows.reshape(shape.layers, len(counted), shape.kv_heads, -1, shape.head_width)
        rows = jnp.moveaxis(rows, 1, 2)
        mask = jnp.broadcast_to(counted[None, None, :, None], rows.shape[:-1])
        return jax.vmap(jax.vmap(measures.add_rows))(carry, rows, mask)

    return _over_rows(language, params, texts, fold, start)


def _gauge_config(fields: Fields) -> GaugeConfig:
    known = {field.name for field in dataclasses.fields(GaugeConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"gauge: unknown key {unknown[0]!r}; choose from {sorted(known)}.")
    return GaugeConfig(**fields)
