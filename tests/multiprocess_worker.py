"""One of several processes that train together; run by test_training_distributed.

    python multiprocess_worker.py SETTINGS_JSON

The problem, too, lives here, so that the test can run it in its own process.
"""

import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaximm import data, immunisers
from jaximm.checkpoint import TrainCheckpoints
from jaximm.immunisers import Head, ProbeParams, Problem
from jaximm.training import DistributedConfig, MetricsLog, fit, initialise, make_parallel
from jaximm.types import Batch, PairedBatch

STEPS, LOG_EVERY, CHECKPOINT_EVERY, BATCH = 24, 4, 8, 16
ROWS = 40  # not a multiple of the batch: batches cross the borders of epochs


def linear_case():
    """condition_gap as published, regularisers of the mini-batch's rows, on a linear backbone."""
    rng = np.random.default_rng(3)

    def task(scales):
        x = rng.standard_normal((ROWS, 5)) * scales
        return Batch(jnp.asarray(x), jnp.asarray(x @ np.arange(1.0, 6.0)))

    arrays = PairedBatch(task(np.geomspace(1, 0.2, 5)), task(np.geomspace(0.3, 2, 5)))
    problem = immunisers.linear_problem(arrays, damping_primary=1e-2, damping_harmful=1e-2)
    config = immunisers.make_config(
        "condition_gap", rows="batch", primary_weight=0.05, harmful_weight=0.05
    )
    method = immunisers.make_immuniser("condition_gap", config, problem)
    return method, immunisers.init_params(5, None), arrays


def _features(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def deep_case():
    """condition_gap with a momentum optimiser on a small network."""
    rng = np.random.default_rng(4)
    task = lambda k: Batch(  # noqa: E731
        jnp.asarray(rng.standard_normal((ROWS, 6))), jnp.asarray(rng.integers(0, k, ROWS))
    )
    arrays = PairedBatch(task(3), task(2))
    problem = Problem(
        features_fn=_features,
        width=4,
        classes=3,
        harmful_classes=2,
        optimiser=optax.sgd(0.05, momentum=0.9),
    )
    config = immunisers.make_config("condition_gap", primary_weight=0.01, harmful_weight=0.1)
    method = immunisers.make_immuniser("condition_gap", config, problem)
    backbone = {
        "first": jnp.asarray(rng.standard_normal((6, 7)) / 2),
        "second": jnp.asarray(rng.standard_normal((7, 4)) / 2),
    }
    head = Head(jnp.asarray(rng.standard_normal((4, 3)) / 2), jnp.zeros(3))
    return method, ProbeParams(backbone, head), arrays


CASES = {"linear": linear_case, "deep": deep_case}


def _batch(arrays, seed, step, part=None):
    return data.paired_batch(arrays, seed, step, batch_size=BATCH, part=part)


def run(case, parallel, *, measure_fn=None, **kwargs):
    """The whole run of a case on a `Parallel`, or on one device without one."""
    method, params, arrays = CASES[case]()
    batches = jax.tree_util.Partial(_batch, arrays, jnp.uint32(7))
    return fit(
        method,
        params,
        batches,
        seed=1,
        steps=STEPS,
        log_every=LOG_EVERY,
        parallel=parallel,
        measure_fn=measure_fn,
        **kwargs,
    )


def _measure(stop_at, calls, params):
    """A number of the parameters; after the step `stop_at` it waits for the kill."""
    calls.append(1)
    if stop_at is not None and len(calls) * LOG_EVERY > stop_at:
        time.sleep(120)
    return {"norm": sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params))}


def main(settings):
    jax.config.update("jax_enable_x64", True)
    info = initialise(DistributedConfig(**settings["distributed"]))
    again = initialise()
    assert again == info._replace(how="initialised before")
    folder = Path(settings["folder"])
    shown = []
    with TrainCheckpoints(folder / "checkpoints") as checkpoints:
        result = run(
            settings["case"],
            make_parallel(settings["kind"]),
            checkpoints=checkpoints,
            checkpoint_every=CHECKPOINT_EVERY,
            log=MetricsLog(folder / "metrics.jsonl"),
            progress=lambda step, record: shown.append(step),
            measure_fn=functools.partial(_measure, settings["stop_at"], []),
            resume=settings["resume"],
        )
    leaves: dict = {f"{i}": np.asarray(one) for i, one in enumerate(jax.tree.leaves(result.params))}
    np.savez(folder / f"params-{info.process_index}.npz", **leaves)
    report = {
        "info": info,
        "shown": shown,
        "resumed_from": result.resumed_from,
        "trajectory": result.trajectory,
        "devices": jax.device_count(),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
