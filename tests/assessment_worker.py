"""An assessment of a small bench in a folder, for a test that kills it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaximm import assessment
from jaximm.records import assessment as assessment_record
from jaximm.types import Batch, Head

ATTACKERS = ("gd", "ridge", "fine_tune_adam", "fresh_head_adam", "norm_only")


def linear(params, x):
    return x @ params["theta"]


def rows(n, seed, column):
    x = jax.random.normal(jax.random.key(seed), (n, 6))
    return Batch(x, (x[:, column] + 0.3 * x[:, 5] > 0).astype(jnp.int32))


def task(column, seed=0):
    splits = (rows(n, 10 * column + seed + k, column) for k, n in enumerate((80, 40, 50)))
    return assessment.TaskSplits(*splits, classes=2)


def bench():
    return assessment.Bench(
        name="signs",
        features_fn=linear,
        harmful=task(0),
        primary=task(1),
        benign={"other": task(2)},
        unseen={"third": task(3)},
    )


def models():
    """The undefended model, one whose harmful direction is scaled down, one without it."""
    kernel = jnp.zeros((6, 2)).at[1].set(jnp.array([-1.0, 1.0]))
    head = Head(kernel, jnp.zeros(2))
    scales = {"none": 1.0, "scaled": 1e-3, "removed": 0.0}
    return [
        assessment.Model(
            label=method,
            method=method,
            params={"theta": jnp.eye(6).at[0, 0].set(scale)},
            benign_head=head,
        )
        for method, scale in scales.items()
    ]


def rebuilt():
    """What a worker computes on."""
    return bench(), models()


LEVEL = assessment.Level(probes="quick", weight_steps=20, batch_size=16, record=4, trial=False)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    out = Path(sys.argv[1])

    def tell(label, done, total, record):
        print(done, flush=True)

    found = assessment.assess(
        bench(), models(), level=LEVEL, attackers=ATTACKERS, out=out, progress=tell
    )
    assessment_record.write(out / "assessment.json", found)
