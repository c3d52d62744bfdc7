"""Many rows of a table: the numbers are those of all of them, and files may exceed the memory."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import thinned

import jaximm
from jaximm.data.rows import MANY

N, D, TIMES = 300, 3, MANY // 300 + 1
RNG = np.random.default_rng(3)


def task(labels):
    x = RNG.standard_normal((N, D)) * [1.0, 0.3, 2.0]
    y = x @ RNG.standard_normal(D) + 0.5 * RNG.standard_normal(N)
    return x, np.sign(y) if labels else y


def immunised(primary, harmful, held_out, times, method, **fields):
    (x, y), (x_harmful, y_harmful) = (
        (np.tile(rows, (times, 1)), np.tile(targets, times)) for rows, targets in (primary, harmful)
    )
    return jaximm.immunise(
        (x, y), harmful=(x_harmful, y_harmful), method=method,
        held_out=held_out[0], harmful_held_out=held_out[1], **fields,
    )  # fmt: skip


def numbers_of(document):
    """Every number in a document, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(document)
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, int | float)
    }


def same(found, expected, *, but=()):
    """Whether two sections say the same, but for rounding."""
    found, expected = (
        {key: value for key, value in numbers_of(part).items() if not any(b in key for b in but)}
        for part in (found, expected)
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize(
    ("labels", "method", "fields"),
    [
        (False, "erase", {}),
        (True, "limit", {}),
        (False, "condition_gap", {"steps": 30}),
        pytest.param(True, "erase", {"centred": True}, marks=pytest.mark.heavy),
        pytest.param(False, "limit", {"t": 0.5}, marks=pytest.mark.heavy),
        pytest.param(True, "condition_gap", {"steps": 30}, marks=pytest.mark.heavy),
    ],
)
def test_rows_that_come_many_times_are_the_same_problem(labels, method, fields):
    given = task(labels), task(labels), [task(labels), task(labels)]
    once, often = (immunised(*given, times, method, **fields) for times in (1, TIMES))
    assert [one.prepared.train.primary.x.shape[0] for one in (once, often)] == [N, D + 2]
    # But for the order and the signs of the features, where the limit leaves them open.
    grams = [one.model @ one.model.T for one in (often, once)]
    np.testing.assert_allclose(*grams, rtol=1e-6, atol=1e-9)
    for section in ("conditioning", "spectra", "utility", "harmful_utility"):
        # Of singular values of all rows, and bounds that are rounding's.
        same(often.document[section], once.document[section], but=("tolerance", "lower", "upper"))
    assert often.document["data"]["harmful"]["n_train"] == N * TIMES
    plain = once.document["conditioning"]["pseudo_inverse"]["train"]["primary"]["after"]
    tiled = often.document["conditioning"]["pseudo_inverse"]["train"]["primary"]["after"]
    assert tiled["tolerance"] == pytest.approx(plain["tolerance"] * TIMES**0.5, rel=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("labels", thinned([True, False]))
def test_attackers_meet_the_same_problem_at_the_price_of_all_rows(labels):
    given = task(labels), task(labels), [task(labels), task(labels)]
    once, often = (
        jaximm.attack(immunised(*given, times, "none"), attackers=["ridge", "gd", "adam"]).document
        for times in (1, TIMES)
    )
    assert {row["attacker"] for row in often["rows"]} == {"ridge", "gd", "adam"}
    for found, expected in zip(often["rows"], once["rows"], strict=True):
        assert found["status"] == expected["status"] == "done"
        for section in ("fit", "quality", "hyper_parameters"):
            same(found[section], expected[section], but=("curve", "steps_to"))
        # An attacker has all rows to read: nearly all that a step takes.
        assert found["step_flops"] / expected["step_flops"] == pytest.approx(TIMES, rel=0.1)


LIMITED = """
import json, resource, sys
import jax, jaximm, jaximm.face
folder = sys.argv[1]
held = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line)
allowed = held * 1024 + 800 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
done = jaximm.immunise(
    (f"{folder}/primary_x", f"{folder}/primary_y"),
    harmful=(f"{folder}/harmful_x.npy", f"{folder}/harmful_y.npy"),
    method="erase",
)
found = jaximm.attack(done, attackers=["ridge"])
print(json.dumps([allowed, done.document["data"]["primary"], done.document["utility"],
                  found.document["rows"][0]["status"]]))
"""


@pytest.mark.slow
def test_a_file_larger_than_the_memory_that_is_allowed(tmp_path):
    n, d, times = 200_000, 100, 10
    x = RNG.standard_normal((n, d))
    y = x[:, 0] + 0.5 * RNG.standard_normal(n)
    for name, values in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", values)
        (tmp_path / f"primary_{name}").mkdir()
        for part in range(times):  # one file under ten names: 1.6 GB to read, a tenth on the disk
            (tmp_path / f"primary_{name}" / f"part-{part:03d}.npy").symlink_to(
                tmp_path / f"{name}.npy"
            )
    np.save(tmp_path / "harmful_x.npy", x * np.geomspace(1, 0.1, d))
    np.save(tmp_path / "harmful_y.npy", x[:, 1] + 0.5 * RNG.standard_normal(n))
    size = times * (tmp_path / "x.npy").stat().st_size
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    allowed, rows, utility, status = json.loads(ran.stdout.splitlines()[-1])
    assert allowed < 0.75 * size
    assert rows["n_train"] == n * times * 3 // 4
    assert utility["after"]["held_out"] == pytest.approx(0.8, abs=0.02)
    assert status == "done"
    # The limit is one: all rows at once are not to be had.
    whole = LIMITED.replace(
        "done =", "jaximm.data.rows.opened(f'{folder}/primary_x').__array__(); done ="
    )
    ran = subprocess.run(
        [sys.executable, "-c", whole, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert "MemoryError" in ran.stderr
