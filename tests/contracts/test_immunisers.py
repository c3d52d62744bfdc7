"""Every method of the registry, on a linear problem and on a network: the line is its test.

Under jit its state keeps its form and is traced once, it lowers for accelerators, many devices give
what one gives in few messages, a run that stopped goes on, it says what it is, and it refuses what
makes no sense.
"""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaximm import cli, immunisers
from jaximm.checkpoint import TrainCheckpoints
from jaximm.training import loop, make_parallel
from tests import helpers
from tests.immuniser_cases import (
    CASES,
    check_same,
    deep_arrays,
    linear_arrays,
    make,
    on_one_device,
    run,
    run_steps,
)

pytestmark = pytest.mark.heavy

KEY = jax.random.key(9)
NAMES = list(immunisers.REGISTRY)
STEPS = 3
KINDS = ("shard_map", "pmap", "jit")


@pytest.mark.versions
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_step_keeps_its_state_and_is_traced_once_and_lowered_for_accelerators(family, name):
    dtype = jnp.float32  # where a default float64 would show
    immuniser, start, arrays = make(family, name, dtype)
    chex.clear_trace_counter()  # it counts by the name of a function
    state = jax.eval_shape(immuniser.init, start, KEY)

    def update(state, batch, rng_key):  # a function, where the update is a `Partial`
        return immuniser.update(state, batch, rng_key)

    step = jax.jit(chex.assert_max_traces(update, 1))
    traced = step.trace(state, arrays, KEY)
    after, info = traced.out_info
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert {(value.shape, value.dtype) for value in info} == {((), jnp.dtype(dtype))}
    step.trace(after, arrays, KEY)  # what comes out goes in again
    traced.lower(lowering_platforms=("tpu", "cuda"))
    finished = jax.eval_shape(immuniser.finish, after)
    assert isinstance(finished, immunisers.ProbeParams)
    assert {leaf.dtype for leaf in jax.tree.leaves(finished)} == {jnp.dtype(dtype)}
    assert start.backbone.keys() <= finished.backbone.keys()  # it may end in a neck
    for path, leaf in start.backbone.items():
        assert finished.backbone[path].shape == leaf.shape


WHOLE = {"booster": 1, "vaccine": 1, "t_vaccine": 2, "repnoise": 1, "seam": 2, "ctrap": 1}
"""Batches that every device sees whole."""
SCALARS = {"repnoise", "seam"}
"""Terms of a whole batch weigh 1 beside rows, so that the sum of weights is a message."""


def expected_collectives(family, name):
    method = name.split()[0]
    if "closed_form" in immunisers.about(method).traits:  # sums of moments, the mean of a loss
        return {"all-reduce": 1}
    # Values and gradients; equal weights are summed when it is compiled.
    if method in ("npo", "rmu", "undo", "mudman", "gradient_routing", "pmp"):
        return {"all-reduce": 1}
    if method == "lox":  # the compiler does not sum a constant that is alone
        return {"all-reduce": 2}
    # Rows and labels that all see whole; weights, since a scalar's is another; values, gradients.
    if method in ("antidote", "ilu", "tar", "mlac", "sophon"):
        return {"all-gather": 2, "all-reduce": 2}
    if (family, method) == ("deep", "imma") or method in WHOLE:  # rows, labels; gradients
        reductions = 2 if method in SCALARS else 1
        return {"all-gather": 2 * WHOLE.get(method, 1), "all-reduce": reductions}
    if family == "linear":  # rows, then the same arithmetic everywhere
        return {"all-gather": 1}
    return {"all-gather": 1, "all-reduce": 1}  # features, gradients


# In the gate one method of each kind of message, as a network, and one linear form; the rest is
# slow.
SHOWN = ("limit", "erase", "condition_gap", "npo", "ilu", "imma", "repnoise", "lox", "pmp")
GATE = [
    (*case, KINDS[number % len(KINDS)], 8)
    for number, case in enumerate(CASES)
    if case in [*(("deep", name) for name in SHOWN), ("linear", "condition_gap rows=batch")]
]
GRID = [(*case, kind, count) for case in CASES for kind in KINDS for count in (1, 2, 8)]
WAYS = [*GATE, *(way for way in GRID if way not in GATE)]


@pytest.mark.parametrize(
    ("family", "name", "kind", "count"), helpers.thinned_rows(WAYS, keep=len(GATE))
)
def test_many_devices_are_one_device_in_few_messages(family, name, kind, count):
    params, infos, messages = run_steps(
        family, name, make_parallel(kind, jax.devices()[:count]), steps=STEPS
    )
    expected, expected_infos = on_one_device(family, name, steps=STEPS)
    chex.assert_tree_all_finite(expected)
    check_same(params, expected, 1e-6)
    check_same(infos, expected_infos, 1e-6)
    if kind != "jit" and count > 1:
        assert messages == expected_collectives(family, name)


# In the gate one of each kind of state: moments, a budget, a reference model, a live adversary. The
# rest is slow.
STATES = [("linear", "balanced_gap"), ("deep", "npo")]
RUNS = [*STATES, *(case for case in CASES if case not in STATES)]


@pytest.mark.parametrize(("family", "name"), helpers.thinned_rows(RUNS, keep=len(STATES)))
def test_a_run_goes_on_where_it_stopped_and_shares_its_program(family, name, tmp_path):
    made = make(family, name)
    settings = {"log_every": 2, "steps": 4}
    whole = run(family, name, None, made=made, **settings)
    compiled = loop._run_chunk._cache_size()
    rows = (linear_arrays if family == "linear" else deep_arrays)(seed=7)
    # The two factors of a linear problem are data as well.
    moved = make(family, name, arrays=rows) if family == "linear" else (*made[:2], rows)
    other = run(family, name, None, made=moved, **settings)
    assert loop._run_chunk._cache_size() == compiled
    if name != "none":
        pairs = zip(jax.tree.leaves(other.params), jax.tree.leaves(whole.params), strict=True)
        assert any(np.any(leaf != same) for leaf, same in pairs)
    with TrainCheckpoints(tmp_path) as checkpoints:
        run(family, name, None, made=made, checkpoints=checkpoints, **(settings | {"steps": 2}))
    with TrainCheckpoints(tmp_path) as checkpoints:
        resumed = run(
            family, name, None, made=made, checkpoints=checkpoints, resume=True, **settings
        )
    assert resumed.resumed_from == 2
    chex.assert_trees_all_equal(resumed.state, whole.state)
    chex.assert_trees_all_equal(resumed.params, whole.params)
    assert resumed.trajectory == whole.trajectory


def test_every_method_says_what_it_is():
    said = [immunisers.describe(name) for name in NAMES]
    for entry in said:
        assert set(entry["traits"]) <= set(immunisers.TRAITS)
        assert entry["what"].endswith(".")
        assert len(entry["what"]) <= 100
        assert 0 < len(entry["title"]) <= 36
        if "control" in entry["traits"]:
            continue
        assert "http" in entry["source"] or entry["source"].startswith("jaximm: "), entry["name"]
        assert entry["threat_model"].startswith("made against "), entry["name"]
        assert "; not against " in entry["threat_model"], entry["name"]
    for key in ("name", "title"):  # told apart
        assert len({entry[key] for entry in said}) == len(NAMES)
    assert json.loads(json.dumps(said)) == said
    assert set().union(*(entry["traits"] for entry in said)) == set(immunisers.TRAITS)
    listed = {entry["name"]: entry for entry in cli.catalogue()["methods"]}
    assert [listed[name]["title"] for name in NAMES] == [entry["title"] for entry in said]


@pytest.mark.parametrize("name", NAMES)
def test_its_configuration_is_a_frozen_value_with_defaults(name):
    config_class, _ = immunisers.REGISTRY[name]
    defaults = config_class()
    assert {"steps", "batch_size"} <= {field.name for field in dataclasses.fields(defaults)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        defaults.steps = 3
    assert hash(defaults) == hash(config_class())  # compilations are shared by its value


NAN, INFINITE = float("nan"), float("inf")
BEYOND = {  # where an interval ends, or a word is none of those there are
    "condition_gap": [
        {"primary_weight": -1.0},
        {"harmful_weight": -1.0},
        {"primary_weight": INFINITE},
        {"rows": "all"},
        {"cap": 0.0},
        {"cap": 1.0},
        {"task_rate": 1.5},
    ],
    "ill_only": [{"primary_weight": 0.1}, {"cap": 2.0}],
    "balanced_gap": [
        {"rate": 0.5},
        {"rate": 0.1, "final_rate": 0.2},
        {"final_rate": 0.0},
        {"task_rate": -0.1},
    ],
    "direct_kappa": [{"learning_rate": 0.0}, {"primary_weight": -1.0}],
    "imma": [
        {"ascent_rate": 0.0},
        {"ascent_rate": 1.0},
        {"adapter_steps": 0},
        {"adapter_rate": 0.0},
        {"adapter_rate": 1.1},
        {"task_rate": 2.0},
    ],
    "antidote": [
        {"clip": -1.0},
        {"anchor": -0.1},
        {"adversary_rate": -1.0},
        {"block": 0},
        {"rows": 0},
        {"rank": 0},
        {"width": 6},
    ],
    "limit": [{"t": 1.1}, {"damping": 0.0}, {"shrinkage": 1.0}],
    "tar": [
        {"tamper_loss": "hinge"},
        {"tamper_weight": -1.0},
        {"inner_steps": -1},
        {"every": 0},
        {"decay": -0.1},
        {"inner_optimiser": "lion"},
        {"inner_rates": ()},
        {"inner_rates": (0.0,)},
        {"inner_rows": 0},
        {"retain_first": 1.5},
        {"distance": "cosine"},
        {"beta": 0.0},
    ],
    "mlac": [
        {"harmful_weight": -1.0},
        {"inner_steps": 0},
        {"order": 3},
        {"calibration": "sort"},
        {"inner_rate": 0.0},
        {"inner_rows": 0},
    ],
    "sophon": [
        {"suppression": "hinge"},
        {"source_weight": -1.0},
        {"inner_optimiser": "lion"},
        {"inner_rates": (-1.0,)},
    ],
    "rmu": [{"steering": 0.0}, {"retain_weight": -1.0}],
    "ilu": [
        {"base": "sgd"},
        {"reading": "loss"},
        {"weight": -1.0},
        {"environment_weight": -1.0},
        {"sam_radius": INFINITE},
        {"beta": 0.0},
        {"steering": 0.0},
    ],
    "undo": [{"unlearn_steps": 600}, {"noise_share": 1.1}, {"noise_scale": -1.0}],
    "mudman": [{"unlearn_rate": 0.0}, {"retain_momentum": 1.0}, {"fork_every": 0}],
    "lox": [{"rank": 0}, {"factor": -1.0}],
}


@pytest.mark.parametrize("name", NAMES)
def test_it_refuses_what_makes_no_sense(name):
    fields = dataclasses.fields(immunisers.REGISTRY[name][0])
    no_numbers = [{field.name: NAN} for field in fields if isinstance(field.default, float)]
    counts = [{"steps": -1}, {"steps": 0}, {"batch_size": 0}, {"batch_size": -3}]
    for wrong in (*no_numbers, *counts, *BEYOND.get(name, [])):
        key = next(iter(wrong))
        with pytest.raises(ValueError, match=key.split("_")[-1]) as refusal:
            immunisers.make_config(name, **wrong)
        assert str(wrong[key]).strip("'") in str(refusal.value)
    with pytest.raises(ValueError, match=f"{name}: unknown config key 'tau'; choose from .*steps"):
        immunisers.make_config(name, tau=0.1)


def test_unknown_names_and_mixed_up_configs():
    config = immunisers.make_config("limit")
    with pytest.raises(ValueError, match=r"unknown method 'lmit'; choose from .*'limit'"):
        immunisers.make_config("lmit")
    with pytest.raises(ValueError, match="unknown method 'lmit'"):
        immunisers.make_immuniser("lmit", config, None)
    with pytest.raises(ValueError, match="'imma' needs a ImmaConfig, got LimitConfig"):
        immunisers.make_immuniser("imma", config, None)
