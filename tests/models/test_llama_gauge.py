"""Gauge moves leave the function as it is, and the canonical form undoes them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import thinned

from jaximm.cli import main
from jaximm.models import llama
from jaximm.models.llama import gauge

BASE = llama.LlamaConfig(
    vocabulary=31, width=16, layers=2, heads=4, kv_heads=2, head_width=4, hidden=24, norm_eps=1e-6
)
CONFIGS = {
    "llama": BASE,
    "interleaved": dataclasses.replace(BASE, rope_pairs="interleaved", tied=True),
    "qwen2": dataclasses.replace(BASE, qkv_bias=True),
    "qwen3": dataclasses.replace(BASE, qk_norm=True, tied=True),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)))
EXACT = tuple(move for move in gauge.MOVES if move != "residual")


@functools.cache
def params_of(name, dtype="float64"):
    """Random ones with scales and biases that are not 1 and 0, as after training."""
    drawn = llama.init(jax.random.key(3), CONFIGS[name], dtype=jnp.float64)
    rng = np.random.default_rng(5)

    def shaken(path, value):
        if path.endswith((".scale", ".bias")):
            value = value + rng.uniform(0.2, 0.8, value.shape) * rng.choice([-1, 1], value.shape)
        return value.astype(dtype)

    return {path: shaken(path, value) for path, value in drawn.items()}


@functools.partial(jax.jit, static_argnames="config")
def logits(params, config):
    return llama.logits(params, TOKENS, config)


@pytest.mark.heavy
@pytest.mark.parametrize("name", thinned(CONFIGS, keep=2))
def test_every_move_leaves_the_logits_and_moves_what_it_says(name):
    config, params = CONFIGS[name], params_of(name)
    before = logits(params, config)
    assert float(jnp.max(jnp.abs(before))) > 1
    for move in EXACT:
        drawn = gauge.random_gauge(1, config, spread=100.0, moves=(move,))
        moved = gauge.apply(params, config, drawn)
        changed = {path for path in params if not np.array_equal(params[path], moved.params[path])}
        assert changed or moved.config != config, move
        np.testing.assert_allclose(
            logits(moved.params, moved.config), before, rtol=0, atol=1e-9, err_msg=move
        )
        assert moved.config.tied == (config.tied and move != "final_norm")
    with_all = gauge.random_gauge(2, config, spread=30.0, moves=EXACT, shape="spike")
    together = gauge.apply(params, config, with_all)
    np.testing.assert_allclose(logits(together.params, together.config), before, rtol=0, atol=1e-9)


def test_the_residual_stream_may_be_scaled_up_to_the_norms_eps():
    config, params = CONFIGS["interleaved"], params_of("interleaved")
    before = logits(params, config)
    for scale, most in ((100.0, 1e-3), (0.01, 3.0)):
        moved = gauge.apply(params, config, gauge.Gauge(residual=np.asarray(scale)))
        change = float(jnp.max(jnp.abs(logits(moved.params, moved.config) - before)))
        assert change < most
        assert not moved.config.tied
    assert change > 1e-3  # eps is felt where the stream is small


def test_float32_keeps_the_tolerances_of_wide_spreads():
    """One rounding: diagonal moves at a spread of 1e6, head matrices at 1e3."""
    config, params = BASE, params_of("llama", "float32")
    before = logits(params, config)
    diagonal = tuple(move for move in gauge.KEEP_TIES if move != "values")
    for moves, spread, most in ((diagonal, 1e6, 1e-3), (("values",), 1e3, 5e-3)):
        for shape in ("log_uniform", "spike"):
            drawn = gauge.random_gauge(4, config, spread=spread, moves=moves, shape=shape)
            moved = gauge.apply(params, config, drawn)
            assert moved.params["layers.up.kernel"].dtype == jnp.float32
            change = jnp.max(jnp.abs(logits(moved.params, config) - before))
            assert float(change) <= most
    sizes = np.linalg.svd(drawn.values, compute_uv=False)
    np.testing.assert_allclose(sizes[..., 0] / sizes[..., -1], 1e3, rtol=1e-9)


@pytest.mark.parametrize("norms", ["one", "columns"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rebalanced_models_of_one_function_agree(name, norms):
    config, params = CONFIGS[name], params_of(name)
    moves = EXACT if not config.tied else gauge.KEEP_TIES
    moved = gauge.apply(params, config, gauge.random_gauge(7, config, spread=100.0, moves=moves))
    ours = gauge.rebalance(params, config, norms=norms)
    theirs = gauge.rebalance(moved.params, moved.config, norms=norms)
    assert ours.config == theirs.config == config
    for path, value in ours.params.items():
        np.testing.assert_allclose(theirs.params[path], value, rtol=1e-8, atol=1e-9, err_msg=path)
    np.testing.assert_allclose(
        logits(ours.params, config), logits(params, config), rtol=0, atol=1e-9
    )
    again = gauge.rebalance(ours.params, config, norms=norms)
    for path, value in ours.params.items():
        np.testing.assert_allclose(again.params[path], value, rtol=1e-8, atol=1e-9, err_msg=path)
    layer = {
        path: np.asarray(value[0]) for path, value in llama.model.layers_of(ours.params).items()
    }
    np.testing.assert_allclose(
        np.linalg.norm(layer["up.kernel"], axis=0), np.linalg.norm(layer["down.kernel"], axis=1)
    )
    if norms == "one":
        np.testing.assert_allclose(layer["mlp_norm.scale"], 1)
    else:
        rows = np.concatenate([layer["gate.kernel"], layer["up.kernel"]], axis=1)
        sizes = np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(sizes, sizes[0], rtol=1e-9)
        np.testing.assert_allclose(np.mean(np.log(np.abs(layer["mlp_norm.scale"]))), 0, atol=1e-12)


def test_heads_without_full_rank_dead_neurons_and_zero_scales_stay():
    config, params = BASE, dict(params_of("llama"))
    params["layers.value.kernel"] = params["layers.value.kernel"].at[0, :, :4].set(0.0)
    params["layers.down.kernel"] = params["layers.down.kernel"].at[1, 3].set(0.0)
    params["layers.mlp_norm.scale"] = params["layers.mlp_norm.scale"].at[0, 2].set(0.0)
    for norms in ("one", "columns"):
        moved = gauge.rebalance(params, config, norms=norms)
        np.testing.assert_array_equal(moved.gauge.values[0, 0], np.eye(4))
        assert moved.gauge.neurons[1, 3] == 1
        np.testing.assert_allclose(
            logits(moved.params, config), logits(params, config), rtol=0, atol=1e-9
        )
    assert gauge.rebalance(params, config).params["layers.mlp_norm.scale"][0, 2] == 0


def test_neurons_by_activity_shrink_where_the_harmful_text_lies():
    rng = np.random.default_rng(0)
    benign, ratio = rng.uniform(0.5, 2, (2, 24)), 10 ** rng.uniform(-3, 3, (2, 24))
    found = gauge.differential_gauge(benign * ratio, benign, spread=100.0).neurons
    np.testing.assert_allclose(np.max(found, 1) / np.min(found, 1), 100.0)
    assert np.all(np.argsort(found, 1) == np.argsort(ratio, 1))
    np.testing.assert_allclose(np.mean(np.log(found), 1), 0, atol=1e-12)
    narrow = gauge.differential_gauge(benign * 2 * ratio**0.1, benign, spread=1e9).neurons
    centred = np.log(ratio**0.1) - np.mean(np.log(ratio**0.1), 1, keepdims=True)
    np.testing.assert_allclose(np.log(narrow), centred, atol=1e-12)
    benign[0, 0] = 0
    assert np.all(np.isfinite(gauge.differential_gauge(ratio, benign, spread=10.0).neurons))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gauge.random_gauge(0, BASE, spread=0.5), "spread must be finite and >= 1"),
        (lambda: gauge.random_gauge(0, BASE, spread=2.0, moves=("heads",)), "unknown move 'heads'"),
        (lambda: gauge.random_gauge(0, BASE, spread=2.0, shape="flat"), "shape must be one of"),
        (lambda: moved(neurons=np.ones((2, 7))), r"neurons must be \[2, 24\], got \[2, 7\]"),
        (lambda: moved(neurons=np.zeros((2, 24))), "neurons must not be zero"),
        (lambda: moved(final_norm=np.full(16, np.nan)), "final_norm holds numbers"),
        (lambda: moved(residual=np.asarray(-1.0)), "residual must be > 0"),
        (lambda: moved(values=np.ones((2, 2, 4, 4))), "not invertible"),
        (lambda: moved(dtype="float16", residual=np.asarray(1e6)), "out of float16"),
        (lambda: gauge.rebalance(params_of("llama"), BASE, norms="rows"), "norms must be one of"),
        (lambda: gauge.rebalance(params_of("llama"), CONFIGS["qwen2"]), "differ in"),
        (lambda: gauge.differential_gauge(np.ones(3), np.ones(3), spread=2), "two arrays"),
        (lambda: gauge.differential_gauge(-np.ones((1, 3)), np.ones((1, 3)), spread=2), ">= 0"),
    ],
)
def test_senseless_moves_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def moved(dtype="float64", **moves):
    return gauge.apply(params_of("llama", dtype), BASE, gauge.Gauge(**moves))


@pytest.mark.slow
def test_a_folder_is_rebalanced_from_the_command_line(tmp_path, capsys):
    params, config = params_of("qwen2", "float32"), CONFIGS["qwen2"]
    spread = gauge.random_gauge(7, config, spread=1e3, moves=gauge.KEEP_TIES)
    llama.save_folder(tmp_path / "plain", params, config)
    llama.save_folder(tmp_path / "spread", gauge.apply(params, config, spread).params, config)
    (tmp_path / "spread" / "tokenizer.json").write_text("{}")
    for name in ("plain", "spread"):
        arguments = ["rebalance", str(tmp_path / name), "--out", str(tmp_path / f"{name}-out")]
        assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "weights that came in: float32 weights" in said
    assert "largest change of a logit: " in said
    plain, undone = (llama.load_folder(tmp_path / f"{name}-out") for name in ("plain", "spread"))
    assert undone.config == plain.config
    for path, value in plain.params.items():
        np.testing.assert_allclose(undone.params[path], value, rtol=1e-3, atol=1e-4, err_msg=path)
    assert (tmp_path / "spread-out" / "tokenizer.json").exists()
    assert main(arguments) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["rebalance", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 1
    assert "neither a folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
