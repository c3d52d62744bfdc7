"""Checkpoints survive kills, full disks and flipped bytes, and never hand out wrong numbers."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaximm import models
from jaximm.checkpoint import (
    CheckpointError,
    TrainCheckpoints,
    content_hash,
    load_backbone,
    load_immunised,
    save_backbone,
    save_immunised,
)
from jaximm.checkpoint.backbone import _backbone_template, _fields_from_json, _fields_to_json
from jaximm.checkpoint.disk import _record_digest
from jaximm.checkpoint.leaves import _combine_blocks, _matches, _own_blocks

pytestmark = pytest.mark.heavy


class State(NamedTuple):
    params: dict
    opt_state: optax.OptState
    rng_key: jax.Array
    step: jax.Array
    scale: float
    host: np.ndarray
    nothing: jax.Array
    half: jax.Array


def make_state(seed: int) -> State:
    """Every kind of leaf that a state may hold; every axis has its own length."""
    key = jax.random.key(seed)
    params = {"a/b": jax.random.normal(key, (3, 5)), "layers": [jnp.arange(4.0), jnp.ones(())]}
    return State(
        params=params,
        opt_state=optax.trace(0.9).init(params),
        rng_key=jax.random.split(key, 2),
        step=jnp.asarray(seed, jnp.int32),
        scale=0.1 * seed,
        host=np.arange(6, dtype=np.float32).reshape(2, 3) + np.float32(seed),
        nothing=jnp.zeros((0, 7)),
        half=jnp.full((2,), 1.5 * seed, jnp.bfloat16),
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0x10
    path.write_bytes(bytes(data))


def save_and_wait(checkpoints, step, state):
    checkpoints.save(step, state)
    checkpoints.wait()


@pytest.fixture
def three_steps(tmp_path):
    directory = tmp_path / "checkpoints"
    with TrainCheckpoints(directory) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"loss": step / 3})
    return directory


@pytest.mark.versions
def test_every_kind_of_leaf_comes_back_bit_for_bit(three_steps):
    with TrainCheckpoints(three_steps) as checkpoints:
        assert checkpoints.all_steps() == [1, 2, 3]
        restored = checkpoints.restore_latest(make_state(0))
        older = checkpoints.restore(1, make_state(0))
    assert (restored.step, restored.metadata, restored.skipped) == (3, {"loss": 1.0}, ())
    assert_same(restored.state, make_state(3))
    assert_same(older.state, make_state(1))


def test_an_abstract_state_gives_this_runs_sharding(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    value = jnp.arange(48.0).reshape(16, 3)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"w": value, "key": jax.random.key(7)})
        sharding = NamedSharding(mesh, P("data"))
        abstract = {
            "w": jax.ShapeDtypeStruct((16, 3), value.dtype, sharding=sharding),
            "key": jax.eval_shape(lambda: jax.random.key(0)),
        }
        state = checkpoints.restore_latest(abstract).state
        sharded = {"w": state["w"] * 2, "key": state["key"]}
        checkpoints.save(1, sharded)  # and a sharded array is saved and hashed whole
        again = checkpoints.restore_latest({"w": value, "key": jax.random.key(0)}).state
    assert state["w"].sharding == sharding
    assert jax.random.uniform(state["key"]) == jax.random.uniform(jax.random.key(7))
    np.testing.assert_array_equal(again["w"], 2 * value)
    assert content_hash(sharded) == content_hash(again)


def test_nothing_saved_yet_gives_none(tmp_path):
    with TrainCheckpoints(tmp_path / "new" / "deep") as checkpoints:
        assert checkpoints.all_steps() == []
        assert checkpoints.restore_latest(make_state(0)) is None
        with pytest.raises(CheckpointError, match=r"step 5 in .* does not exist"):
            checkpoints.restore(5, make_state(0))


def test_relative_directories_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with TrainCheckpoints("run/checkpoints") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)})
    save_backbone("run/backbone", {"theta": jnp.ones((2, 3))}, {"method": "none"})
    monkeypatch.chdir("run")
    with TrainCheckpoints("checkpoints") as checkpoints:
        assert checkpoints.all_steps() == [1]
    assert load_backbone("backbone")[1]["method"] == "none"


def test_only_the_newest_are_kept(tmp_path):
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in range(4):
            checkpoints.save(step, {"w": jnp.full((3,), float(step))})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 3]


def test_the_newest_the_regular_and_the_best_are_kept(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.9, 5: math.nan, 6: 0.2, 7: None, 8: 0.3}
    with TrainCheckpoints(
        tmp_path, keep=2, keep_every=3, best_metric="rir", keep_best=2
    ) as checkpoints:
        for step, score in scores.items():
            metrics = None if score is None else {"rir": score, "other": -1.0}
            checkpoints.save(step, {"w": jnp.full((2,), float(step))}, metrics=metrics)
        checkpoints.wait()
        # 3 and 6 are regular, 7 and 8 newest, 2 and 4 best.
        assert checkpoints.all_steps() == [2, 3, 4, 6, 7, 8]
        assert checkpoints.best_step() == 2  # the older of equals
        with pytest.raises(ValueError, match=r"step 9 must hold best_metric 'rir', got \['x'\]"):
            checkpoints.save(9, {"w": jnp.ones(2)}, metrics={"x": 1.0})
    # A run that is opened again knows the metrics from the records, and may rank otherwise.
    with TrainCheckpoints(
        tmp_path, keep=1, best_metric="rir", best_mode="min", keep_best=1
    ) as checkpoints:
        assert checkpoints.best_step() == 6
        found = checkpoints.restore_best({"w": jnp.zeros(2)})
        assert (found.step, found.state["w"][0]) == (6, 6.0)
        checkpoints.save(10, {"w": jnp.ones(2)}, metrics={"rir": 0.1})
        checkpoints.wait()
        assert checkpoints.all_steps() == [10]


def test_a_damaged_best_step_is_refused_or_passed_over(tmp_path):
    with TrainCheckpoints(tmp_path, keep=3, best_metric="accuracy") as checkpoints:
        assert checkpoints.best_step() is None
        assert checkpoints.restore_best({"w": jnp.zeros(300)}) is None
        for step, accuracy in ((1, 0.7), (2, 0.9), (3, 0.8)):
            noise = jax.random.bits(jax.random.key(step), (300,), jnp.uint32)
            checkpoints.save(step, {"w": noise}, metrics={"accuracy": accuracy})
    largest = max(files_of(tmp_path / "2"), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    abstract = {"w": jax.ShapeDtypeStruct((300,), jnp.uint32)}
    with TrainCheckpoints(tmp_path, best_metric="accuracy") as checkpoints:
        with pytest.raises(CheckpointError, match=rf"step 2 in .*file .*{largest.name}"):
            checkpoints.restore_best(abstract)
        found = checkpoints.restore_best(abstract, strict=False)
        assert (found.step, found.skipped) == (3, (2,))
        # Passing over the best one is no reason to set it aside: the newest is sound.
        checkpoints.save(4, {"w": jnp.zeros(300, jnp.uint32)}, metrics={"accuracy": 0.1})
    assert not (tmp_path / "2.damaged").exists()
    with TrainCheckpoints(tmp_path) as checkpoints:
        for call in (checkpoints.best_step, lambda: checkpoints.restore_best(abstract)):
            with pytest.raises(ValueError, match="best_metric"):
                call()


@pytest.mark.versions
def test_a_state_moves_from_eight_devices_to_two_to_one(tmp_path):
    """Parameters, optimiser, statistics, step, key and data position, sharded and replicated."""

    def shardings(count):
        mesh = jax.make_mesh(
            (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
        )
        return NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    params = {"blocks.0.kernel": jnp.arange(48.0).reshape(16, 3), "blocks.0.bias": jnp.ones(3)}
    state = {
        "params": params,
        "opt_state": optax.trace(0.9).init(params),
        "stats": {"norm.mean": jnp.arange(3.0)},
        "step": jnp.asarray(11, jnp.int32),
        "key": jax.random.key(5),
        "data_position": np.frombuffer(b"iterator at 352", np.uint8),
    }

    def specs(tree, count):
        rows, whole = shardings(count)

        def one(leaf):
            if not isinstance(leaf, jax.Array):
                return leaf
            return jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=rows if leaf.shape == (16, 3) else whole
            )

        return jax.tree.map(one, tree)

    def placed(tree, count):
        return jax.tree.map(
            lambda leaf, like: (
                jax.device_put(leaf, like.sharding) if isinstance(leaf, jax.Array) else leaf
            ),
            tree,
            specs(tree, count),
        )

    moved = placed(state, 8)
    for step, count in ((1, 2), (2, 1), (3, 8)):
        with TrainCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(step, moved, {"devices": count})
        with TrainCheckpoints(tmp_path) as checkpoints:
            moved = checkpoints.restore_latest(specs(state, count)).state
        kernel = moved["params"]["blocks.0.kernel"]
        assert len(kernel.sharding.device_set) == count
        assert kernel.addressable_shards[0].data.shape == (16 // count, 3)
        assert len(moved["key"].sharding.device_set) == count
        assert_same(jax.tree.map(jnp.asarray, moved["params"]), params)
        assert_same(moved["opt_state"], placed(state, count)["opt_state"])
        np.testing.assert_array_equal(moved["data_position"], state["data_position"])
        assert jax.random.uniform(moved["key"]) == jax.random.uniform(jax.random.key(5))


def test_donating_right_after_save_keeps_the_saved_values(tmp_path):
    double = jax.jit(lambda w: w * 2, donate_argnums=0)
    w = jnp.arange(200_000.0)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(0, w)
        for _ in range(5):
            w = double(w)
        restored = checkpoints.restore_latest(w).state
    np.testing.assert_array_equal(restored, np.arange(200_000.0))


def test_a_step_is_saved_or_an_error_is_raised(three_steps):
    with TrainCheckpoints(three_steps) as checkpoints:
        for step in (2, 3):
            with pytest.raises(ValueError, match=f"step {step} is not newer than step 3"):
                checkpoints.save(step, make_state(1))
        with pytest.raises(ValueError, match="no leaves"):
            checkpoints.save(4, {})
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(4, make_state(1), {"array": jnp.ones(2)})
        with pytest.raises(ValueError, match="dtype"):
            checkpoints.save(4, {"name": "theta"})
    with pytest.raises(RuntimeError, match="with"):
        checkpoints.save(4, make_state(1))
    with pytest.raises(ValueError, match="keep"):
        TrainCheckpoints(three_steps, keep=0)


def test_an_exception_in_the_block_still_commits_the_step(tmp_path):

    def interrupted():
        with TrainCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {"w": jnp.ones(300_000)})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest({"w": jnp.zeros(300_000)}).step == 1


def test_a_state_that_does_not_fit_is_not_taken_for_damage(three_steps):
    state = make_state(0)
    with TrainCheckpoints(three_steps) as checkpoints:
        wrong = state._replace(half=jnp.zeros(2, jnp.float32))
        with pytest.raises(ValueError, match=r"half'?.*bfloat16\[2\].*float32\[2\]"):
            checkpoints.restore_latest(wrong, strict=False)
        with pytest.raises(ValueError, match=r"int32\[\].*int32\[4\]"):
            checkpoints.restore_latest(state._replace(step=jnp.zeros(4, jnp.int32)), strict=False)
        with pytest.raises(ValueError, match=r"missing there .*extra"):
            checkpoints.restore_latest(state._replace(params={"extra": jnp.ones(2)}))
        other = state._replace(rng_key=jax.random.split(jax.random.key(0, impl="rbg"), 2))
        with pytest.raises(ValueError, match="rng_key"):
            checkpoints.restore_latest(other)


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_no_damaged_file_of_a_step_is_loaded_as_other_numbers(tmp_path, kind):
    """Each file of a step in turn: the restore gives the saved bits or refuses, nothing between."""
    source, refused = tmp_path / "source", set()
    state = {"w": jax.random.normal(jax.random.key(0), (64, 40)), "b": jnp.arange(3.0)}
    with TrainCheckpoints(source) as checkpoints:
        checkpoints.save(10, state, {"note": "kept"})
    for path in files_of(source / "10"):
        relative = path.relative_to(source)
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        if kind == "flip":
            flip(copy / relative, path.stat().st_size * 2 // 3)
        else:
            os.truncate(copy / relative, path.stat().st_size // 2)
        with TrainCheckpoints(copy) as checkpoints:
            try:
                restored, problem = checkpoints.restore_latest(state), None
            except CheckpointError as error:
                restored, problem = None, str(error)
        if restored is None:
            assert problem.startswith("step 10 in ")
            assert "\n" not in problem
            assert f"file {path.relative_to(source / '10')} " in problem
            refused.add(path.name)
        else:
            assert_same(restored.state, state)
            assert restored.metadata == {"note": "kept"}
    # Only the file into which Orbax writes the time of the commit, after ours, may be damaged.
    everything = {path.name for path in files_of(source / "10")}
    assert everything - refused == {"_CHECKPOINT_METADATA"}


@pytest.mark.versions
def test_a_missing_file_is_named_and_the_first_format_is_read(three_steps):
    manifest = three_steps / "3" / "files.json"
    listed = json.loads(manifest.read_text())
    gone = three_steps / "3" / "arrays" / "_METADATA"
    assert listed["files"]["arrays/_METADATA"]["bytes"] == gone.stat().st_size
    text = gone.read_bytes()
    gone.unlink()
    with TrainCheckpoints(three_steps) as checkpoints:
        with pytest.raises(CheckpointError, match=r"file arrays/_METADATA is missing"):
            checkpoints.restore(3, make_state(0))
        gone.write_bytes(text)
        manifest.unlink()
        with pytest.raises(CheckpointError, match=r"file files\.json is missing"):
            checkpoints.restore(3, make_state(0))
        # The first format had no manifest; its digests of leaves are the same.
        path = three_steps / "3" / "record" / "metadata"
        record = json.loads(path.read_text())
        record["format"] = "jaximm.checkpoint/1"
        record["sha256"] = _record_digest(record)
        path.write_text(json.dumps(record))
        assert_same(checkpoints.restore(3, make_state(0)).state, make_state(3))
        record["format"] = "jaximm.checkpoint/9"
        record["sha256"] = _record_digest(record)
        path.write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match=r"has format 'jaximm\.checkpoint/9'"):
            checkpoints.restore(3, make_state(0))


def test_a_flipped_byte_that_orbax_restores_silently_is_refused(tmp_path):
    # Random bits do not compress, so zstd stores them raw and has nothing to notice.
    state = {"w": jax.random.bits(jax.random.key(0), (512, 512), jnp.uint32)}
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    largest = max(files_of(tmp_path / "1"), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    # Plain Orbax hands out wrong numbers here: that is what the digests are for.
    target = {"0000.w": np.empty((512, 512), np.uint32)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as plain:
        silent = plain.restore(
            tmp_path / "1", args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        ).arrays["0000.w"]
    assert np.any(silent != np.asarray(state["w"]))
    with (
        TrainCheckpoints(tmp_path) as checkpoints,
        pytest.raises(
            CheckpointError,
            match=rf"step 1 in .* file .*{largest.name} does not match .*leaf 0000\.w changed",
        ),
    ):
        checkpoints.restore_latest(state)


def test_a_damaged_newest_step_is_refused_or_skipped_as_asked(three_steps):
    shutil.rmtree(three_steps / "3" / "arrays")
    largest = max(files_of(three_steps / "2"), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    with TrainCheckpoints(three_steps) as checkpoints:
        with pytest.raises(CheckpointError, match=r"step 3 in .*strict=False"):
            checkpoints.restore_latest(make_state(0))
        restored = checkpoints.restore_latest(make_state(0), strict=False)
        assert (restored.step, restored.skipped) == (1, (3, 2))
        assert_same(restored.state, make_state(1))
        checkpoints.save(2, make_state(20))  # the rerun writes the skipped numbers again
        checkpoints.save(3, make_state(30))
    assert (three_steps / "2.damaged").is_dir()
    with TrainCheckpoints(three_steps) as checkpoints:
        assert checkpoints.all_steps() == [1, 2, 3]
        assert_same(checkpoints.restore_latest(make_state(0)).state, make_state(30))


def test_all_steps_damaged_is_one_clear_error(three_steps):
    for step in (1, 2, 3):
        shutil.rmtree(three_steps / str(step) / "record")
    with (
        TrainCheckpoints(three_steps) as checkpoints,
        pytest.raises(CheckpointError, match=r"no sound checkpoint .*\[3, 2, 1\]"),
    ):
        checkpoints.restore_latest(make_state(0), strict=False)


KILLED = """
import sys, jax, jax.numpy as jnp
from jaximm.checkpoint import TrainCheckpoints
with TrainCheckpoints(sys.argv[1]) as checkpoints:
    state = {"w": jnp.arange(20_000_000.0, dtype=jnp.float32)}
    checkpoints.save(1, state)
    checkpoints.wait()
    checkpoints.save(2, state)
    print("saving", flush=True)
    checkpoints.wait()
    print("saved", flush=True)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_last_complete_step(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "saving\n"
    os.kill(child.pid, signal.SIGKILL)
    assert child.stdout.read() == ""  # it died before step 2 was on disk
    child.wait()
    state = {"w": jnp.zeros(20_000_000, jnp.float32)}
    with TrainCheckpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(state)
        assert restored.step == 1
        assert restored.state["w"][-1] == 20_000_000.0 - 1
        checkpoints.save(2, {"w": jnp.ones(3)})  # the number is free again
        assert checkpoints.restore(2, {"w": jnp.zeros(3)}).step == 2


KILLED_BACKBONE = """
import sys, jax.numpy as jnp
from jaximm.checkpoint import save_backbone
arrays = {"w": jnp.arange(5_000_000.0, dtype=jnp.float32)}
for version in range(1, 1000):
    save_backbone(sys.argv[1], arrays, {"version": version})
    print(version, flush=True)
"""


@pytest.mark.slow
def test_kill_in_the_middle_of_replacing_a_backbone_leaves_a_whole_one(tmp_path):
    path = tmp_path / "backbone"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED_BACKBONE, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "1\n"
    while not list(tmp_path.glob(".backbone.*.tmp*")):  # it is writing the second one
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    printed = child.stdout.read().split()
    child.wait()
    params, metadata = load_backbone(path)
    assert metadata["version"] in range(1, int(printed[-1] if printed else 1) + 2)
    assert params["w"][-1] == 5_000_000 - 1
    save_backbone(path, {"w": jnp.ones(3)}, {"version": 0})
    assert load_backbone(path)[1]["version"] == 0


def test_a_full_disk_is_one_line_and_costs_no_earlier_step(tmp_path, monkeypatch, capfd):
    """The write fails in the background, as it does on a full disk, after save() has returned."""
    directory, state = tmp_path / "run", {"w": jnp.ones(1000)}
    with TrainCheckpoints(directory) as checkpoints:
        checkpoints.save(1, state)
    handler, real = ocp.StandardCheckpointHandler, ocp.StandardCheckpointHandler.async_save

    class Full:
        def result(self, timeout=None):
            raise OSError(28, "No space left on device")

    async def full(*args, **kwargs):
        return [*(await real(*args, **kwargs) or []), Full()]

    with TrainCheckpoints(directory) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(handler, "async_save", full)
            with pytest.raises(CheckpointError, match=r"step 2 was not saved.*no space left"):
                save_and_wait(checkpoints, 2, state)
        assert checkpoints.all_steps() == [1]
        checkpoints.save(2, state)  # with space again, the same step can be saved
        checkpoints.wait()
        assert checkpoints.restore_latest(state).step == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_really_full_disk(small_disk):
    noise = jax.random.normal(jax.random.key(0), (300_000,))  # 2.4 MB, does not compress
    small = {"w": jnp.arange(10.0)}
    save_backbone(small_disk / "backbone", small, {"version": 1})
    with TrainCheckpoints(small_disk / "run") as checkpoints:
        checkpoints.save(1, small)
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"step 2 was not saved.*no space left"):
            save_and_wait(checkpoints, 2, {"w": noise})
        with pytest.raises(CheckpointError, match=r"was not saved.*no space left"):
            save_backbone(small_disk / "backbone", {"w": noise})
        assert_same(checkpoints.restore_latest(small).state, small)
        checkpoints.save(2, small)
    params, metadata = load_backbone(small_disk / "backbone")
    np.testing.assert_array_equal(params["w"], np.arange(10.0))
    assert metadata["version"] == 1
    assert sorted(path.name for path in small_disk.iterdir()) == ["backbone", "run"]


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot open the checkpoint directory .*file/run"):
        TrainCheckpoints(tmp_path / "file" / "run").__enter__()
    with pytest.raises(CheckpointError, match=r"not saved at .*file/backbone"):
        save_backbone(tmp_path / "file" / "backbone", jnp.ones(2))


def test_a_backbone_comes_back_without_a_target(tmp_path):
    params = {
        "z": (jnp.arange(3.0), [jnp.ones((2, 5), jnp.float32), 4]),
        "a": {0: np.asarray(-0.0), 1: jnp.zeros((0, 2))},
    }
    metadata = {"method": "limit", "conditioning": {"log_rir": 7.5, "upper": float("inf")}}
    digest = save_backbone(tmp_path / "backbone", params, metadata)
    loaded, read = load_backbone(tmp_path / "backbone")
    assert read == {**metadata, "content_hash": digest}
    assert digest == content_hash(params) == content_hash(loaded)
    assert_same(loaded, jax.tree.map(np.asarray, params))
    array, _ = load_backbone((save_backbone(tmp_path / "one", params["z"][0]), tmp_path / "one")[1])
    np.testing.assert_array_equal(array, np.arange(3.0))


def test_float64_survives_where_x64_is_off(tmp_path):
    value = np.asarray([1.0 + 2**-40])
    save_backbone(tmp_path / "backbone", {"theta": value})
    with jax.enable_x64(False):
        loaded, _ = load_backbone(tmp_path / "backbone")
    assert loaded["theta"].dtype == np.float64
    assert loaded["theta"][0] == value[0]


def test_a_backbone_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "backbone"
    save_backbone(path, {"theta": jnp.ones(3)}, {"version": 1})
    save_backbone(path, {"theta": jnp.zeros(3)}, {"version": 2})
    assert load_backbone(path)[1]["version"] == 2
    real = Path.rename

    def killed(self, target):
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt  # stands for a kill between the two renames
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_backbone(path, {"theta": jnp.ones(3)}, {"version": 3})
    monkeypatch.undo()
    assert not path.exists()
    assert load_backbone(path)[1]["version"] == 2
    save_backbone(path, {"theta": jnp.ones(3)}, {"version": 3})
    assert load_backbone(path)[1]["version"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["backbone"]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_damaged_backbone_is_refused(tmp_path, fraction):
    path = tmp_path / "backbone"
    save_backbone(path, {"theta": jax.random.normal(jax.random.key(1), (300, 70))}, {"seed": 1})
    largest = max(files_of(path), key=lambda file: file.stat().st_size)
    flip(largest, int(largest.stat().st_size * fraction))
    with pytest.raises(CheckpointError, match=r"the backbone at .* is damaged"):
        load_backbone(path)


def test_changed_metadata_of_a_backbone_is_refused(tmp_path):
    save_backbone(tmp_path / "backbone", jnp.ones(2), {"log_rir": 1.0})
    record = tmp_path / "backbone" / "record" / "metadata"
    text = json.loads(record.read_text())
    text["user"]["log_rir"] = 9.0
    record.write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="file record/metadata does not match"):
        load_backbone(tmp_path / "backbone")


def test_what_is_no_backbone_is_refused(tmp_path, three_steps):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_backbone(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_backbone(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="training state, not a backbone"):
        load_backbone(three_steps / "3")
    for bad in (make_state(1), {"key": jax.random.key(0)}, {"a": None}, {(1, 2): jnp.ones(2)}):
        with pytest.raises(ValueError, match="backbone"):
            save_backbone(tmp_path / "bad", bad)
    with pytest.raises(ValueError, match="no leaves"):
        save_backbone(tmp_path / "bad", {})


def test_the_content_hash_sees_names_dtypes_shapes_and_signs():
    base = {"w": np.zeros((2, 3))}
    others = [
        {"v": np.zeros((2, 3))},
        {"w": np.zeros((3, 2))},
        {"w": np.zeros((2, 3), np.float32)},
        {"w": -np.zeros((2, 3))},
        {"w": np.zeros((2, 3)), "x": np.zeros(0)},
    ]
    hashes = [content_hash(tree) for tree in [base, *others]]
    assert len(set(hashes)) == len(hashes)
    assert content_hash({"w": jnp.zeros((2, 3))}) == hashes[0]
    assert content_hash({"w": np.zeros((3, 2)).T}) == hashes[0]  # memory order is no content


@pytest.fixture(scope="module")
def perceptron():
    backbone = models.create(
        "mlp", input_shape=(6,), widths=(5, 4), classes=3, rng_key=jax.random.key(0)
    )
    neck = {"neck.kernel": jnp.arange(8.0, dtype=jnp.float32).reshape(4, 2)}
    return backbone.replace(neck)


class Head(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@pytest.mark.versions
def test_an_immunised_backbone_comes_back_ready_to_run(tmp_path, perceptron):
    head = Head(jnp.ones((2, 3), jnp.float32), jnp.zeros(3, jnp.float32))
    conditioning = {"log_rir": 3.5, "harmful": {"log_kappa": math.inf}}
    digest = save_immunised(
        tmp_path / "out",
        dataclasses.replace(
            perceptron, preprocess=dataclasses.replace(perceptron.preprocess, size=24)
        ),
        head,
        method="condition_gap",
        config=models.MLPConfig(widths=(2,)),  # any dataclass
        conditioning=conditioning,
    )
    found = load_immunised(tmp_path / "out")
    assert found.backbone.config == perceptron.config
    assert found.backbone.width == 2
    assert found.backbone.preprocess.size == 24
    assert found.backbone.stage_names == perceptron.stage_names
    assert_same(found.backbone.params, perceptron.params)
    assert_same(found.head, head._asdict())
    assert found.metadata["content_hash"] == digest
    assert found.metadata["model"] == "mlp"
    assert found.metadata["config"]["widths"] == [2]
    assert found.metadata["conditioning"] == conditioning
    inputs = jax.random.normal(jax.random.key(1), (7, 6), jnp.float32)
    np.testing.assert_array_equal(
        found.backbone.features(found.backbone.params, inputs),
        perceptron.features(perceptron.params, inputs),
    )
    params, _ = load_backbone(tmp_path / "out")
    assert set(params) == {"params", "stats", "head"}
    assert "layers.0.kernel" in params["params"]


@pytest.mark.slow
def test_batch_norm_statistics_come_back(tmp_path):
    spec = models.REGISTRY["efficientnet_lite0"]
    described = {
        "model": "efficientnet_lite0",
        "model_config": _fields_to_json(spec.config, "config"),
        "width": spec.width,
    }
    shapes = _backbone_template(described, "here")
    assert shapes.stats  # the moving means and variances
    rng = np.random.default_rng(0)

    def fill(tree):
        return {
            path: jnp.asarray(rng.integers(0, 9, like.shape), like.dtype)
            for path, like in tree.items()
        }

    backbone = dataclasses.replace(shapes, params=fill(shapes.params), stats=fill(shapes.stats))
    save_immunised(tmp_path / "out", backbone, method="none")
    found = load_immunised(tmp_path / "out")
    assert found.head is None
    assert found.backbone.width == 1280
    assert found.backbone.graphdef == backbone.graphdef
    assert_same(found.backbone.stats, backbone.stats)
    assert_same(found.backbone.params, backbone.params)


def test_a_model_outside_the_registry_needs_a_template(tmp_path, perceptron):
    mine = dataclasses.replace(perceptron, name="my_model")
    save_immunised(tmp_path / "out", mine, method="none")
    with pytest.raises(ValueError, match=r"is a 'my_model'.*choose from .*template="):
        load_immunised(tmp_path / "out")
    with pytest.raises(ValueError, match="is a my_model, the template a mlp"):
        load_immunised(tmp_path / "out", template=perceptron)
    zeros = {name: jnp.zeros_like(value) for name, value in mine.params.items()}
    del zeros["neck.kernel"]
    blank = dataclasses.replace(mine, params=zeros, width=4)
    found = load_immunised(tmp_path / "out", template=blank).backbone
    assert_same(found.params, mine.params)
    assert found.width == 2  # that of the neck, which only the checkpoint has


def test_what_does_not_fit_the_model_here_is_named(tmp_path, perceptron):
    path = tmp_path / "out"
    plain = {"kind": "immunised backbone", "model": "mlp", "width": 4, "preprocess": {}}
    config = {"input_shape": [6], "widths": [5, 4], "activation": "relu", "classes": 3}
    params = {name: value for name, value in perceptron.params.items() if "neck" not in name}
    cases = [
        ({"model_config": config | {"depth": 3}}, params, r"unknown field 'depth' .*config of mlp"),
        ({"model_config": config | {"widths": []}}, params, r"config of mlp: widths must be"),
        ({"model_config": config | {"widths": [5, 3]}}, params, r"classifier\.kernel has shape"),
        ({"model_config": config | {"widths": [5]}}, params, r"layers\.1.*not the model's"),
        ({"model_config": config, "preprocess": {"hue": 1}}, params, r"'hue' in the preprocess"),
        ({"model_config": config}, {"layers.0.bias": params["layers.0.bias"]}, "are missing"),
    ]
    for fields, arrays, message in cases:
        save_backbone(path, {"params": arrays, "stats": {}}, plain | fields)
        with pytest.raises(ValueError, match=message):
            load_immunised(path)
    save_backbone(path, {"w": jnp.ones(2)})
    with pytest.raises(CheckpointError, match="not saved by save_immunised"):
        load_immunised(path)
    with pytest.raises(ValueError, match=r"a head has a kernel .*\['bias'\]"):
        save_immunised(path, perceptron, {"bias": jnp.ones(2)}, method="limit")

    @dataclasses.dataclass(frozen=True)
    class Odd:
        function: object = print

    with pytest.raises(ValueError, match="field 'function' of config is no JSON value"):
        save_immunised(path, perceptron, method="limit", config=Odd())


def test_dtypes_and_nested_fields_of_a_configuration_survive():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        sizes: tuple = (1, 2)

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        kind: object = jnp.float32
        dtype: object = np.dtype("float32")
        name: str = "float32"

    value = Outer(Inner((3, (4, 5))), jnp.bfloat16, np.dtype("float64"), "int8")
    stored = json.loads(json.dumps(_fields_to_json(value, "config")))
    back = _fields_from_json(Outer(), stored, "config")
    assert back.inner == value.inner
    assert (back.name, back.dtype) == ("int8", np.dtype("float64"))
    assert jnp.zeros(1, back.kind).dtype == jnp.bfloat16


def test_digests_of_shards_verify_the_whole_array():
    """What several processes record of an array that none of them holds whole."""
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
    value = np.arange(48.0).reshape(8, 6)
    array = jax.device_put(value, NamedSharding(mesh, P(("y", "x"), "z")))
    blocks = sorted(_own_blocks(array))
    assert [block[:2] for block in blocks] == [
        [[i, j], [i + 2, j + 3]] for i in range(0, 8, 2) for j in range(0, 6, 3)
    ]
    row = {"blocks": blocks, "sha256": _combine_blocks(blocks)}
    assert _matches(value, row)
    for position in ((0, 0), (7, 5), (3, 2)):
        changed = value.copy()
        changed[position] += 1
        assert not _matches(changed, row)
    assert not _matches(value, {**row, "sha256": "0" * 64})
    replicated = jax.device_put(value, NamedSharding(mesh, P("x")))  # four copies of each half
    assert [block[:2] for block in _own_blocks(replicated)] == [[[0, 0], [4, 6]], [[4, 0], [8, 6]]]
