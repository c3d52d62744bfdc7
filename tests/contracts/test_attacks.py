"""Every attacker of both registries: what it says of itself, refuses, and does under jit."""

import inspect
import json

import chex
import jax
import jax.numpy as jnp
import pytest

from jaximm import assessment, attacks, cli, registry
from jaximm.attacks.weights.problem import Access, Functions
from jaximm.report import page
from jaximm.types import Batch, Head
from tests import assessment_worker

NAMES = (*attacks.REGISTRY, *attacks.WEIGHT_REGISTRY)
N, D_IN, D, K = 9, 4, 5, 3
KERNEL, SCALE, MEAN = "blocks.0.kernel", "blocks.0.norm.scale", "blocks.0.norm.mean"


def _features_fn(params, x):
    hidden = x @ params[KERNEL] * params[SCALE][None, :]
    return hidden - params[MEAN][None, :] if MEAN in params else hidden


def _refresh_fn(params, x):
    return params | {MEAN: jnp.mean(x @ params[KERNEL], axis=0)}


def _arrays(attack, dtype):
    """What `init` gets beside hyper-parameters, and what `update` gets beside those and a state."""
    x = jnp.arange(N * D_IN).astype(dtype).reshape(N, D_IN) % 7 - 3
    if isinstance(attack, attacks.Attack):
        return (attacks.probe_problem(x, x[:, 0]),), ()
    rows = Batch(x, jnp.arange(N) % K)
    params = {KERNEL: jnp.ones((D_IN, D), dtype), SCALE: jnp.ones((D,), dtype)}
    head = Head(jnp.ones((D, K), dtype), jnp.zeros((K,), dtype))
    features = Batch(_features_fn(params, x), rows.y)
    weights = attacks.ModelWeights(params, head, head)
    held = (weights, features, features, params, jnp.int32(0), rows, (params, params))
    return held, (rows, rows, jax.random.key(0), jnp.int32(0))


def _functions(attack):
    """`init(arrays, hyper)` and `update(state, arrays, drawn, hyper)`, of arrays alone."""
    if isinstance(attack, attacks.Attack):
        return (
            lambda held, hyper: attack.init(*held, hyper),
            lambda state, held, drawn, hyper: attack.update(state, *held, hyper),
        )

    def access(weights, features, benign_features, public, seed, inputs, canonical):
        functions = Functions(_features_fn, _refresh_fn)
        return Access(
            weights, features, benign_features, public, seed, inputs, functions, canonical
        )

    return (
        lambda held, hyper: attack.init(access(*held), hyper),
        lambda state, held, drawn, hyper: attack.update(
            state, attacks.Batches(*drawn), access(*held), hyper
        ),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_step_keeps_its_state_and_is_traced_once_and_lowered_for_accelerators(name):
    chex.clear_trace_counter()  # it counts by the name of a function
    attack = attacks.make_attack(name)
    held, drawn = _arrays(attack, jnp.float32)
    hyper = {key: jnp.float32(value) for key, value in (attack.grid or ({},))[0].items()}
    init, update = _functions(attack)
    state = jax.jit(init).eval_shape(held, hyper)
    step = jax.jit(chex.assert_max_traces(update, 1))
    traced = step.trace(state, held, drawn, hyper)
    chex.assert_trees_all_equal_structs(state, traced.out_info)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, traced.out_info)
    step.trace(traced.out_info, held, drawn, hyper)  # what comes out goes in again
    assert hasattr(state, "weights")
    traced.lower(lowering_platforms=("tpu", "cuda"))


@pytest.mark.parametrize("name", attacks.REGISTRY)
def test_a_probe_keeps_the_other_precision_too(name):
    attack = attacks.make_attack(name)
    held, drawn = _arrays(attack, jnp.float64)
    hyper = {key: jnp.float64(value) for key, value in (attack.grid or ({},))[0].items()}
    init, update = _functions(attack)
    state = jax.eval_shape(init, held, hyper)
    after = jax.eval_shape(update, state, held, drawn, hyper)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert after.weights.dtype == jnp.float64


def test_every_attacker_says_what_it_is():
    said = [attacks.describe(name) for name in NAMES]
    for entry in said:
        assert entry["kind"] in attacks.KINDS
        assert set(entry["traits"]) <= set(attacks.TRAITS)
        assert entry["what"].endswith(".")
        assert "\n" not in entry["what"]
        assert "http" in entry["source"], entry["name"]
        assert entry["threat_model"].startswith("has the ")
        assert len(entry["title"]) <= 36
        if entry["kind"] == "closed-form":
            assert "solves" in entry["traits"]
    for key in ("name", "title"):  # told apart
        assert len({entry[key] for entry in said}) == len(NAMES)
    assert json.loads(json.dumps(said)) == said
    assert set().union(*(entry["traits"] for entry in said)) == set(attacks.TRAITS)
    assert {entry["kind"] for entry in said} == set(attacks.KINDS)


def _of(trait):
    return {name for name in NAMES if trait in attacks.make_attack(name).traits}


def test_traits_are_those_of_the_lists_that_they_stand_for():
    assert _of("textbook") == {"gd"}
    assert _of("solves") == {"ridge", "solved_head", "tapped_head"}
    assert _of("warm_head") == {"fine_tune_sgd", "fine_tune_adam"}
    assert _of("plain_user") == {"gd_best_step", "adam", "fine_tune_adam", "lora"}
    assert _of("new_head") == {
        "fresh_head_sgd", "fresh_head_adam", "logit_rescale", "probe_then_fine_tune", "solved_head",
        "tapped_head", "spsa", "fresh_top",
    }  # fmt: skip
    assert _of("opens") == {"tapped_head", "opened", "revive"}
    assert _of("undoes_defence") == {
        "ridge", "whitened_gd", "probe_then_fine_tune", "solved_head", "factor_insert",
        "spectral_rebalance", "rebalance", "rebalance_sgd", "from_scratch", "fresh_top",
        "delta_strip", "tapped_head", "opened", "revive",
    }  # fmt: skip
    kinds = {"preconditioned", "undo"}
    assert _of("preconditions") - {"opened", "revive"} == {
        n for n in NAMES if attacks.make_attack(n).kind in kinds
    }
    kinds = {"first-order", "momentum", "adaptive", "fine-tuning"}
    assert _of("plain_descent") == {n for n in NAMES if attacks.make_attack(n).kind in kinds}


@pytest.mark.parametrize("name", NAMES)
def test_it_refuses_what_makes_no_sense(name):
    factory = {**attacks.REGISTRY, **attacks.WEIGHT_REGISTRY}[name]
    defaults = {key: one.default for key, one in inspect.signature(factory).parameters.items()}
    if name in attacks.WEIGHT_REGISTRY:
        defaults["learning_rates"] = ()
    for key, default in defaults.items():
        wrong = [(float("nan"),), (), ("a",), (-1.0,)]
        if isinstance(default, int) and not isinstance(default, bool):
            wrong = [0, 1.5]
        elif isinstance(default, float):
            wrong = [float("nan"), 0.0]
        elif not isinstance(default, tuple):
            continue
        for value in wrong:
            with pytest.raises(ValueError, match=r"expected .*, at least one, got"):
                attacks.make_attack(name, **{key: value})
    with pytest.raises(ValueError, match="speeds"):
        attacks.make_attack(name, speeds=(1.0,))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gd", {"step_scales": (0.0,)}, r"step_scale: expected numbers in \(0, inf\), at least"),
        ("gd", {"step_scales": 0.5}, "step_scale: expected numbers .* got 0.5"),
        ("gd", {"step_scales": (True,)}, "got .True,"),
        ("gd", {"step_scales": (float("inf"),)}, "got .inf,"),
        ("heavy_ball", {"curvatures": (1.5,)}, r"curvature: expected numbers in \[0, 1\]"),
        ("adam", {"second_decays": (1.0,)}, r"second_decay: expected numbers in \[0, 1\)"),
        ("lbfgs", {"memories": (0,)}, r"memory: expected whole numbers in \[1, inf\)"),
        ("fine_tune_sgd", {"momenta": (1.0,)}, r"momentum: expected numbers in \[0, 1\)"),
        ("fresh_head_adam", {"weight_decays": (-1.0,)}, "weight_decay: expected"),
        ("latent_perturbation", {"head_scales": (-1,)}, "head_scale: expected"),
        ("lora", {"rank": 0}, r"rank: expected whole numbers in \[1, inf\), at least one, got .0"),
        ("lora", {"targets": " , "}, "targets must be"),
        ("policy_gradient", {"samples": 1}, r"samples: expected whole numbers in \[2, inf\)"),
        ("shampoo", {"betas": (1.0,)}, r"beta: expected numbers in \[0, 1\)"),
        ("poison_mix", {"fractions": (0.0,)}, r"fraction: expected numbers in \(0, 1\]"),
        ("benign_drift", {"drift_steps": (2.5,)}, r"drift_steps: expected whole numbers in \[0,"),
        ("spectral_rebalance", {"strengths": (1.5,)}, r"strength: expected numbers in \(0, 1\]"),
        ("solved_head", {"penalties": (0.0,)}, r"penalty: expected numbers in \(0, inf\)"),
        ("quantise_then_tune", {"bits": (1,)}, r"bits: expected whole numbers in \[2, 16\]"),
        ("prune_then_tune", {"fractions": (1.0,)}, r"fraction: expected numbers in \[0, 1\)"),
        ("merge_with_public", {"mixes": (1.1,)}, r"mix: expected numbers in \[0, 1\]"),
        ("rebalance", {"forms": (2,)}, r"form: expected whole numbers in \[0, 1\]"),
        ("rebalance_sgd", {"forms": (0.5,)}, r"form: expected whole numbers in \[0, 1\]"),
        ("grpo", {"samples": 3}, r"samples: expected whole numbers in \[4, inf\)"),
        ("grpo", {"anchors": (-1.0,)}, r"anchor: expected numbers in \[0, inf\)"),
        ("muon", {"iterations": 0}, r"iterations: expected whole numbers in \[1, inf\)"),
        ("fresh_top", {"k": 0}, r"k: expected whole numbers in \[1, inf\)"),
        ("delta_strip", {"energies": (1.1,)}, r"energy: expected numbers in \(0, 1\]"),
        ("spsa", {"samples": 0}, r"samples: expected whole numbers in \[1, inf\)"),
        ("opened", {"penalties": (0.0,)}, r"penalty: expected numbers in \(0, inf\)"),
        ("refresh_statistics", {"rows": 1}, r"rows: expected whole numbers in \[2, inf\)"),
    ],
)
def test_intervals_end_where_they_should(name, options, message):
    with pytest.raises(ValueError, match=message):
        attacks.make_attack(name, **options)


TOY = """
import typing
import jax
import jaximm
from jaximm.attacks import Attack, Cost, WeightAttack
State = typing.NamedTuple("State", [("weights", typing.Any)])
down = lambda w, slopes, hyper: State(jax.tree.map(lambda a, b: a - hyper["step"] * b, w, slopes))
mine = {"kind": "first-order", "title": "my descent", "grid": ({"step": 0.5},)}
jaximm.register("attack", "toy_probe", Attack(
    init=lambda problem, hyper: State(problem.initial_weights), flops=lambda n, d: Cost(0.0, 4.0 * n * d),
    update=lambda s, problem, hyper: down(s.weights, problem.gradient(s.weights), hyper), **mine))
jaximm.register("attack", "toy_weights", WeightAttack(
    init=lambda access, hyper: State(access.weights), grid=({"step": 0.5},), traits={"plain_user"},
    update=lambda s, b, a, hyper: down(s.weights, jax.grad(a.loss_fn)(s.weights, b.harmful), hyper)))
"""  # noqa: E501


@pytest.mark.heavy
def test_a_toy_of_each_family_is_one_file(tmp_path, monkeypatch):
    assert len(TOY.strip().splitlines()) <= 15
    for name in ("REGISTRY", "WEIGHT_REGISTRY"):
        monkeypatch.setattr(attacks, name, dict(getattr(attacks, name)))
    (tmp_path / "toy.py").write_text(TOY)
    registry.run_file(tmp_path / "toy.py")
    toys = ["toy_probe", "toy_weights"]
    listed = cli.catalogue()
    entries = [*listed["attacks"], *listed["attacks on weights"]]
    (probe, weights) = [entry for entry in entries if entry["name"] in toys]
    assert (probe["title"], weights["title"]) == ("my descent", "toy weights")
    assert weights["threat_model"] == "has the weights and labelled rows of the harmful task"
    assert probe["source"].startswith("module toy_")
    assert "toy_probe" in attacks.suite_attacks("quick")
    document = assessment.assess(
        assessment_worker.bench(),
        assessment_worker.models()[:1],
        level=assessment_worker.LEVEL,
        attackers=toys,
    )
    met = {(row["attacker"], row["task"]) for row in document["rows"] if row["status"] == "done"}
    assert {("toy_probe", "harmful"), ("toy_weights", "harmful")} <= met
    # Its traits alone say what else it meets.
    assert ("toy_weights", "benign:other") in met
    assert ("toy_probe", "benign:other") not in met
    text = page.render_assessment(document)
    assert "my descent" in text
    assert "toy weights" in text
