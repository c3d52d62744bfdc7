r"""Moves of a decoder's weights that leave its function as it is, and what undoes them.

With every kernel [in, out] and numbers g that are not zero (residual: > 0):

attention_norm [layers, d]
    scale / g; rows of the query, key and value kernels * g.
mlp_norm [layers, d]
    scale / g; rows of the gate and up kernels * g.
neurons [layers, f]
    columns of up * g, rows of down / g: the gate's nonlinearity does not see them.
pairs [layers, kv_heads, h / 2]
    columns of query * g, of key / g, for both numbers of a rotary pair and all query heads of a key
    head. Where heads are normed (Qwen3), their scales, one g for all heads: [layers, 1, h / 2].
values [layers, kv_heads, h, h]
    A head's value kernel times A, and A^-1 times its rows of the output kernel; any invertible A.
final_norm [d]
    scale / g; columns of the unembedding * g. It unties a tied embedding.
residual []
    embedding, output and down kernels * g: the stream is g times what it was, and the norms divide
    that out, but for the `norm_eps` beside its mean square. It unties a tied embedding.

A gauge changes condition numbers of layers, the step that a rate makes, and what rounding to few
bits costs; it changes no logit. So a defence that consists of one is a shift of the attacker's
rate, and `rebalance`, which needs the weights alone, removes it. Products are formed in float64 on
the host, a layer at a time, and rounded once to the dtype of the parameters.

Such freedom in ReLU networks and its effect on gradient descent: Neyshabur, Salakhutdinov, Srebro
(2015), Path-SGD, https://arxiv.org/abs/1506.02617; norms followed by linear maps: Ashkboos et al.
(2024), SliceGPT, https://arxiv.org/abs/2401.15024, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaximm import linalg
from jaximm.models.flat import FlatParams
from jaximm.models.llama.model import LAYERS, _check, layers_of
from jaximm.models.llama.spec import LlamaConfig

Norms = Literal["one", "columns"]
Shape = Literal["log_uniform", "spike"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gauge:
    """A move by the names of the module's table; None: that part stays."""

    attention_norm: np.ndarray | None = None
    mlp_norm: np.ndarray | None = None
    neurons: np.ndarray | None = None
    pairs: np.ndarray | None = None
    values: np.ndarray | None = None
    final_norm: np.ndarray | None = None
    residual: np.ndarray | None = None

    @property
    def unties(self) -> bool:
        """Whether a model whose embedding is its unembedding gets a table of its own."""
        return self.final_norm is not None or self.residual is not None


MOVES = tuple(field.name for field in dataclasses.fields(Gauge))
"""Names of all moves."""

KEEP_TIES = ("attention_norm", "mlp_norm", "neurons", "pairs", "values")
"""Moves that need no new parameters, also where embeddings are tied, and are exact in exact
arithmetic."""

PASSES = 200
"""Of `rebalance` at most, where moves share kernels."""

_TURNED = ("query", "key")


class Moved(NamedTuple):
    """The same function in other weights; `config` differs in `tied` only, `gauge` led here.

    `passes` is how often `rebalance` went over a layer, at most.
    """

    params: FlatParams
    config: LlamaConfig
    gauge: Gauge
    passes: int = 0


class Canonical(NamedTuple):
    """A canonical form, and what it costs to go there in floating-point operations."""

    params: Mapping[str, np.ndarray]  # on the host
    flops: float


def spreads(gauge: Gauge) -> dict[str, float]:
    """Largest over smallest factor of each move that is there, in the layer where it is widest.

    Of `values`, the largest condition number of a matrix.
    """
    widest = {}
    for name in MOVES:
        move = getattr(gauge, name)
        if move is None:
            continue
        if name == "values":
            sizes = np.linalg.svd(np.asarray(move, np.float64), compute_uv=False)
        else:
            sizes = np.atleast_1d(np.abs(np.asarray(move, np.float64)))
        widest[name] = float(np.max(np.max(sizes, axis=-1) / np.min(sizes, axis=-1)))
    return widest


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each move's array."""
    layers, d, h = config.layers, config.width, config.head_width
    return {
        "attention_norm": (layers, d),
        "mlp_norm": (layers, d),
        "neurons": (layers, config.hidden),
        "pairs": (layers, 1 if config.qk_norm else config.kv_heads, h // 2),
        "values": (layers, config.kv_heads, h, h),
        "final_norm": (d,),
        "residual": (),
    }


def apply(params: Mapping[str, jax.Array], config: LlamaConfig, gauge: Gauge) -> Moved:
    """Weights of the same function, moved by a gauge.

    Args:
      params: by path, of any floating dtype.
      config: of the parameters.
      gauge: see the module; zeros and numbers that are not finite are refused.

    Raises:
      ValueError: parameters that are not the configuration's, a move of another shape, with a zero,
        with numbers that are not finite, a residual that is not positive, a matrix that
        is not invertible, or a result outside of the dtype.
    """
    _check(params, config)
    _check_gauge(gauge, config)
    moved = dict(params)
    if gauge.unties and config.tied:
        moved["unembedding.table"] = params["embedding.table"]
        config = dataclasses.replace(config, tied=False)
    factors, turns = _factors(gauge, config), _turns(gauge, config)
    for path in sorted((factors.keys() | turns.keys()) & moved.keys()):
        factor = factors.get(path, np.ones(()))
        if path.startswith(LAYERS):
            layers = []
            for index, value in enumerate(moved[path]):
                exact = np.asarray(value, np.float64) * (factor[index] if factor.ndim else factor)
                if path in turns:
                    exact = turns[path](index, exact)
                layers.append(_rounded(exact, value.dtype, path))
            moved[path] = jnp.asarray(np.stack(layers))
        else:
            exact = np.asarray(moved[path], np.float64) * factor
            moved[path] = jnp.asarray(_rounded(exact, moved[path].dtype, path))
    return Moved(moved, config, gauge)


def random_gauge(
    seed: int,
    config: LlamaConfig,
    *,
    spread: float,
    moves: Iterable[str] = KEEP_TIES,
    shape: Shape = "log_uniform",
) -> Gauge:
    """A gauge drawn at random whose largest and smallest factor are at most `spread` apart.

    Args:
      seed: of NumPy's generator.
      config: static.
      spread: >= 1. Of `values` it is the condition number of each matrix.
      moves: of `MOVES`.
      shape: "log_uniform": factors spread^u with u uniform in [-1/2, 1/2]; "spike": one factor of
        each last axis is `spread`, the others 1. Matrices have such singular values between two
        rotations.

    Raises:
      ValueError: an unknown move or shape, or a spread below 1 or not finite.
    """
    if shape not in get_args(Shape):
        raise ValueError(f"shape must be one of {get_args(Shape)}, got {shape!r}.")
    if not (np.isfinite(spread) and spread >= 1):
        raise ValueError(f"spread must be finite and >= 1, got {spread}.")
    moves = tuple(moves)
    unknown = sorted(set(moves) - set(MOVES))
    if unknown:
        raise ValueError(f"unknown move {unknown[0]!r}; choose from {MOVES}.")
    rng = np.random.default_rng(seed)
    sizes = shapes_of(config)

    def factors(size: tuple[int, ...]) -> np.ndarray:
        if shape == "log_uniform" or not size:
            return spread ** rng.uniform(-0.5, 0.5, size)
        places = rng.integers(size[-1], size=(*size[:-1], 1))
        return np.where(np.arange(size[-1]) == places, spread, 1.0)

    drawn = {}
    for name in MOVES:
        if name not in moves:
            continue
        if name == "values":
            sides = [np.linalg.qr(rng.standard_normal(sizes[name]))[0] for _ in range(2)]
            drawn[name] = sides[0] * factors(sizes[name][:-1])[..., None, :] @ sides[1]
        else:
            drawn[name] = factors(sizes[name])
    return Gauge(**drawn)


def differential_gauge(harmful: np.ndarray, benign: np.ndarray, *, spread: float) -> Gauge:
    """Neurons moved by how much more a harmful text excites them than a benign one.

    g = (harmful / benign)^p over its geometric mean, with the largest p in (0, 1] that keeps
    max g / min g at `spread` or below: rows of the down kernel shrink where the harmful text lies.

    Args:
      harmful: root mean squares of the down kernel's inputs on the harmful text, [layers, f].
      benign: the same on the benign text.
      spread: >= 1.

    Raises:
      ValueError: arrays of different shapes, not [layers, f], or with numbers that are negative or
        not finite; a spread below 1. Neurons that either text leaves at zero stay.
    """
    if not (np.isfinite(spread) and spread >= 1):
        raise ValueError(f"spread must be finite and >= 1, got {spread}.")
    sides = [np.asarray(side, np.float64) for side in (harmful, benign)]
    if sides[0].shape != sides[1].shape or sides[0].ndim != 2:
        raise ValueError(
            f"expected two arrays [layers, f], got {sides[0].shape} and {sides[1].shape}."
        )
    if not all(np.all(np.isfinite(side)) and np.all(side >= 0) for side in sides):
        raise ValueError("root mean squares must be finite and >= 0.")
    alive = (sides[0] > 0) & (sides[1] > 0)
    logs = np.log(np.where(alive, sides[0], 1.0)) - np.log(np.where(alive, sides[1], 1.0))
    logs = np.where(alive, logs - np.mean(logs, axis=1, keepdims=True), 0.0)
    width = np.ptp(logs, axis=1, keepdims=True)
    power = np.minimum(1.0, np.log(spread) / np.where(width > 0, width, 1.0))
    return Gauge(neurons=np.exp(power * logs))


def limit_gauge(primary: jax.Array, harmful: jax.Array, *, t: float = 1.0) -> Gauge:
    """Value and output heads by the closed form of the limit, each key head for itself.

    Inputs of the output kernel in a head, [rows, h], are multiplied by A, the
    `jaximm.linalg.limit_backbone` of their damped second moments K on the two texts: kappa of the
    primary text's becomes kappa(K_P)^t, and the harmful text's as large as any A makes it beside
    that.

    Args:
      primary: factors R with R^T R = K of the primary text, [layers, kv_heads, m, h], damped.
      harmful: the same of the harmful text.
      t: in [0, 1].
    """

    def head(ours: jax.Array, theirs: jax.Array) -> jax.Array:
        kappa = linalg.feature_condition_number(ours, rtol=0.0).log_kappa
        pencil = linalg.pencil_from_factors(ours, theirs)
        theta = linalg.limit_backbone(pencil, log_kappa_primary=kappa, t=t)
        return theta * (theta.shape[0] ** 0.5 / jnp.linalg.norm(theta))

    return Gauge(values=np.asarray(jax.jit(jax.vmap(jax.vmap(head)))(primary, harmful)))


def rebalance(
    params: Mapping[str, jax.Array], config: LlamaConfig, *, norms: Norms = "one"
) -> Moved:
    """A canonical member of the weights that are the same function, whatever gauge they were in.

    It is the one whose kernels are smallest, in the sum of their squares, so that

    - columns of up are as long as rows of down,
    - columns of query (all heads of a key head together) as long as those of key,
    - a head's values V and outputs O have V^T V = O O^T = S, diagonal: V O = U S W^T its product;

    given what `norms` says of the scales. Of two models that differ by a gauge the results agree up
    to rounding; of the columns of V the largest entry is positive. A head whose product lacks full
    rank stays as it is, and so do zero scales, neurons without a kernel, the scale of the residual
    stream (nothing in the weights says what it was), and the final norm where embeddings are tied
    (there is no such freedom).

    Args:
      params: by path.
      config: of the parameters.
      norms: "one": scales are folded into the rows that follow and are 1. "columns": those rows get
        one length, and the spread goes into the scales, whose geometric mean is 1; found by
        alternation, since the squares are convex in the logarithms of what is free. Which of the
        two trains better depends on the model: try both.

    Returns:
      The parameters, the configuration, and the gauge that was applied.

    Raises:
      ValueError: parameters that are not the configuration's, or another `norms`.
    """
    if norms not in get_args(Norms):
        raise ValueError(f"norms must be one of {get_args(Norms)}, got {norms!r}.")
    _check(params, config)
    of_layers, passes = zip(
        *(_balanced_layer(layer, config, norms) for layer in _layers(params)), strict=True
    )
    moves = {name: np.stack([layer[name] for layer in of_layers]) for name in KEEP_TIES}
    if not config.tied:
        scale = np.asarray(params["norm.scale"], np.float64)
        table = np.asarray(params["unembedding.table"], np.float64).T
        moves["final_norm"] = _or_one(scale) if norms == "one" else _equalising(table, scale)
    return apply(params, config, Gauge(**moves))._replace(passes=max(passes))


def canonical_forms(params: Mapping[str, jax.Array], config: LlamaConfig) -> tuple[Canonical, ...]:
    """`rebalance` in both forms, "one" and "columns", for who does not know which trains better.

    A pass over a layer counts four operations a number, and in each head two thin orthogonal
    factorisations [d, h], 6 d h^2, and a singular value decomposition [h, h], 22 h^3 (Golub and Van
    Loan, Matrix computations, 8.6). Applying the moves counts as a pass.

    Args:
      params: by path.
      config: of the parameters, but for `tied`: what they hold decides.
    """
    config = dataclasses.replace(config, tied="unembedding.table" not in params)
    h, size = config.head_width, sum(value.size for value in params.values())
    heads = sum(layers_of(params)[f"{name}.kernel"].size for name in ("value", "output"))
    one_pass = 4.0 * size + 6.0 * h * heads + 22.0 * config.layers * config.kv_heads * h**3
    forms = []
    for norms in get_args(Norms):
        moved = rebalance(params, config, norms=norms)
        on_host = {path: np.asarray(value) for path, value in moved.params.items()}
        forms.append(Canonical(on_host, (moved.passes + 1) * one_pass))
    return tuple(forms)


def _layers(params: Mapping[str, jax.Array]) -> Iterator[dict[str, np.ndarray]]:
    """Each layer's arrays in float64, one layer at a time."""
    stacked = layers_of(params)
    for index in range(len(stacked["up.kernel"])):
        yield {path: np.asarray(value[index], np.float64) for path, value in stacked.items()}


def _balanced_layer(
    layer: Mapping[str, np.ndarray], config: LlamaConfig, norms: Norms
) -> tuple[dict[str, np.ndarray], int]:
    """The moves of `KEEP_TIES` that lead one layer to its canonical form, and how many passes."""
    moves = {
        name: np.broadcast_to(np.eye(shape[-1]), shape[1:])
        if name == "values"
        else np.ones(shape[1:])
        for name, shape in shapes_of(config).items()
        if name in KEEP_TIES
    }
    passes = 0
    while passes < PASSES:
        before, passes = moves, passes + 1
        moves = _balancing_pass(layer, moves, config, norms)
        if norms == "one":  # each move has its own kernels then: one pass is exact
            break
        changes = [np.log(np.abs(moves[n] / before[n])) for n in KEEP_TIES if n != "values"]
        if max(np.max(np.abs(change)) for change in changes) < 1e-12:
            break
    return moves, passes


def _balancing_pass(
    layer: Mapping[str, np.ndarray],
    moves: Mapping[str, np.ndarray],
    config: LlamaConfig,
    norms: Norms,
) -> dict[str, np.ndarray]:
    """Each move in turn, the others given."""
    d, heads, h = config.width, config.kv_heads, config.head_width
    query, key, value = (layer[f"{name}.kernel"] for name in ("query", "key", "value"))
    up, gate = layer["up.kernel"], layer["gate.kernel"]
    if norms == "one":
        first, second = (_or_one(layer[f"{n}.scale"]) for n in ("attention_norm", "mlp_norm"))
    else:
        sides = [_outputs_times(value, moves["values"], config)]
        if config.qk_norm:
            sides += [query, key]
        else:
            both = _both_of_pair(moves["pairs"], config)
            shared = np.repeat(both, config.heads // heads, axis=0).reshape(-1)
            sides += [query * shared, key / both.reshape(-1)]
        first = _equalising(np.concatenate(sides, axis=1), layer["attention_norm.scale"])
        mlp = np.concatenate([gate, up * moves["neurons"]], axis=1)
        second = _equalising(mlp, layer["mlp_norm.scale"])
    if config.qk_norm:
        sizes = [_pair_sizes(layer[f"{n}_norm.scale"].reshape(1, 1, h), config) for n in _TURNED]
    else:
        query, key = query * first[:, None], key * first[:, None]
        split = (side.reshape(d, heads, -1, h).swapaxes(0, 1) for side in (query, key))
        sizes = [_pair_sizes(side.reshape(heads, -1, h), config) for side in split]
    outputs = np.linalg.norm(layer["down.kernel"], axis=1)
    return {
        "attention_norm": first,
        "mlp_norm": second,
        "neurons": np.sqrt(_ratio(outputs, np.linalg.norm(up * second[:, None], axis=0))),
        "pairs": np.sqrt(_ratio(sizes[1], sizes[0])),
        "values": _balancing(value * first[:, None], layer["output.kernel"], config),
    }


def _factors(gauge: Gauge, config: LlamaConfig) -> dict[str, np.ndarray]:
    """By path, what its array is multiplied with elementwise (broadcast), all moves together."""
    factors: dict[str, np.ndarray] = {}

    def times(path: str, factor: np.ndarray) -> None:
        factors[path] = factors[path] * factor if path in factors else factor

    for name, readers in (
        ("attention_norm", ("query", "key", "value")),
        ("mlp_norm", ("gate", "up")),
    ):
        move = getattr(gauge, name)
        if move is not None:
            move = np.asarray(move, np.float64)
            times(f"{LAYERS}{name}.scale", 1 / move)
            for reader in readers:
                times(f"{LAYERS}{reader}.kernel", move[:, :, None])
    if gauge.neurons is not None:
        move = np.asarray(gauge.neurons, np.float64)
        times(f"{LAYERS}up.kernel", move[:, None, :])
        times(f"{LAYERS}down.kernel", 1 / move[:, :, None])
    if gauge.pairs is not None:
        both = _both_of_pair(np.asarray(gauge.pairs, np.float64), config)  # [layers, heads, h]
        if config.qk_norm:
            times(f"{LAYERS}query_norm.scale", both[:, 0])
            times(f"{LAYERS}key_norm.scale", 1 / both[:, 0])
        else:
            shared = np.repeat(both, config.heads // config.kv_heads, axis=1)
            for name, move in (("query", shared), ("key", 1 / both)):
                flat = move.reshape(config.layers, -1)
                times(f"{LAYERS}{name}.kernel", flat[:, None, :])
                times(f"{LAYERS}{name}.bias", flat)
    if gauge.final_norm is not None:
        move = np.asarray(gauge.final_norm, np.float64)
        times("norm.scale", 1 / move)
        times("unembedding.table", move[None, :])
    if gauge.residual is not None:
        move = np.asarray(gauge.residual, np.float64)
        for path in ("embedding.table", f"{LAYERS}output.kernel", f"{LAYERS}down.kernel"):
            times(path, move)
    return factors


def _turns(gauge: Gauge, config: LlamaConfig) -> dict[str, Callable[[int, np.ndarray], np.ndarray]]:
    """By path, how the matrices of `values` act on a layer's array."""
    if gauge.values is None:
        return {}
    move = np.asarray(gauge.values, np.float64)
    inverse = np.linalg.inv(move)

    def columns(layer: int, array: np.ndarray) -> np.ndarray:
        return _outputs_times(array, move[layer], config)

    def rows(layer: int, array: np.ndarray) -> np.ndarray:
        split = array.reshape(config.kv_heads, -1, config.head_width, config.width)
        return (inverse[layer][:, None] @ split).reshape(array.shape)

    return {
        f"{LAYERS}value.kernel": columns,
        f"{LAYERS}value.bias": columns,
        f"{LAYERS}output.kernel": rows,
    }


def _both_of_pair(move: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """[..., h / 2] a pair to [..., h] a number of the head."""
    if config.rope_pairs == "halves":
        return np.concatenate([move, move], axis=-1)
    return np.repeat(move, 2, axis=-1)


def _pair_sizes(side: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Lengths [heads, h / 2] of what [heads, rows, h] holds of each rotary pair."""
    squares = np.sum(side**2, axis=1)
    if config.rope_pairs == "halves":
        return np.sqrt(squares.reshape(len(squares), 2, -1).sum(axis=1))
    return np.sqrt(squares.reshape(len(squares), -1, 2).sum(axis=2))


def _outputs_times(array: np.ndarray, move: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Each head's columns [.., h] of a kernel or bias, times its matrix."""
    split = array.reshape(-1, config.kv_heads, config.head_width)
    return np.einsum("rkh,khj->rkj", split, move).reshape(array.shape)


def _balancing(value: np.ndarray, output: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """The matrices [kv_heads, h, h] that balance values [d, kv_heads h] and outputs."""
    d, heads, h = config.width, config.kv_heads, config.head_width
    v = value.reshape(d, heads, h).swapaxes(0, 1)
    o = output.reshape(heads, -1, h, d).swapaxes(1, 2).reshape(heads, h, -1)
    if min(d, o.shape[-1]) < h:
        return np.broadcast_to(np.eye(h), (heads, h, h))
    basis, right = np.linalg.qr(v)
    left = np.linalg.qr(o.swapaxes(-1, -2))[1]
    u, s, wt = np.linalg.svd(right @ left.swapaxes(-1, -2))
    whole = s[:, -1] > np.finfo(np.float64).eps * d * s[:, 0]
    s = np.where(whole[:, None], s, 1.0)
    # V A = U S^(1/2) for A = R_o^T W S^(-1/2), where O = R_o^T Q_o^T: no inverse of V.
    move = left.swapaxes(-1, -2) @ wt.swapaxes(-1, -2) * s[:, None, :] ** -0.5
    columns = basis @ u
    largest = np.argmax(np.abs(columns), axis=1, keepdims=True)
    move = move * np.sign(np.take_along_axis(columns, largest, axis=1))
    return np.where(whole[:, None, None], move, np.eye(h))


def _or_one(scale: np.ndarray) -> np.ndarray:
    """Scales, 1 where they are zero or so small that their inverse is no number."""
    return np.where(np.abs(scale) > np.finfo(np.float32).tiny, scale, 1.0)


def _equalising(kernel: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[d]: what gives the kernel's rows one length, and scale / it a geometric mean of 1."""
    sizes = np.linalg.norm(kernel, axis=1)
    gauge = 1 / np.where(sizes > 0, sizes, 1.0)
    left = np.abs(scale[scale != 0] / gauge[scale != 0])
    return gauge * (np.exp(np.mean(np.log(left))) if left.size else 1.0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """A quotient of lengths; 1 where either is zero, since nothing is balanced by it then."""
    there = (numerator > 0) & (denominator > 0)
    return np.where(there, numerator, 1.0) / np.where(there, denominator, 1.0)


def _rounded(exact: np.ndarray, dtype: DTypeLike, path: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype)
    if not np.all(np.isfinite(rounded.astype(np.float64))):
        raise ValueError(
            f"the gauge takes {path!r} out of {dtype}: choose a smaller spread or a wider dtype."
        )
    return rounded


def _check_gauge(gauge: Gauge, config: LlamaConfig) -> None:
    for name, shape in shapes_of(config).items():
        move = getattr(gauge, name)
        if move is None:
            continue
        move = np.asarray(move)
        if move.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(move.shape)}.")
        if not np.all(np.isfinite(move)):
            raise ValueError(f"{name} holds numbers that are not finite.")
        if name == "values":
            sizes = np.linalg.svd(np.asarray(move, np.float64), compute_uv=False)
            if np.any(sizes[..., -1] <= np.finfo(np.float64).eps * shape[-1] * sizes[..., 0]):
                raise ValueError("values holds a matrix that is not invertible.")
        elif name == "residual" and move <= 0:
            raise ValueError(f"residual must be > 0, got {move}.")
        elif not np.all(move):
            raise ValueError(f"{name} must not be zero.")
