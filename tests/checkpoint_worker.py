"""One of several processes that save and restore together; run by test_checkpoint_multiprocess.

    python checkpoint_worker.py ACTION DIRECTORY PORT PROCESSES PROCESS DEVICES

Prints one JSON object as the last line of its standard output.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaximm.checkpoint import (
    CheckpointError,
    TrainCheckpoints,
    content_hash,
    load_backbone,
    save_backbone,
)

ROWS, COLUMNS = 16, 8


def reference(step: int) -> dict:
    """The state at a step, as host arrays; every kind of placement has a leaf."""
    bits = np.asarray(jax.random.bits(jax.random.key(step), (ROWS, COLUMNS), jnp.uint32))
    return {
        "rows": bits,
        "columns": bits.T.copy(),
        "everywhere": np.arange(5, dtype=np.float32) * np.float32(step),
        "half": np.asarray(jnp.full((3,), 1.5 * step, jnp.bfloat16)),
    }


SPECS = {"rows": P("data"), "columns": P(None, "data"), "everywhere": P(), "half": P()}
OTHER_SPECS = {"rows": P(), "columns": P("data"), "everywhere": P(), "half": P()}


def place(value, sharding):
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def global_state(step: int, mesh: Mesh) -> dict:
    state = {
        name: place(value, NamedSharding(mesh, SPECS[name]))
        for name, value in reference(step).items()
    }
    key_data = np.asarray(jax.random.key_data(jax.random.key(step)))
    state["key"] = jax.random.wrap_key_data(place(key_data, NamedSharding(mesh, P())))
    state["step"] = jnp.asarray(step, jnp.int32)  # this process's own, equal on all
    state["seed"] = 7
    return state


def abstract_state(mesh: Mesh, specs: dict) -> dict:
    state: dict = {
        name: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, specs[name])
        )
        for name, value in reference(0).items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    state["key"] = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))
    state["step"] = jax.ShapeDtypeStruct((), jnp.int32)
    state["seed"] = 0
    return state


def whole(array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
        return (
            np.asarray(array.addressable_shards[0].data)
            if array.is_fully_replicated
            else (np.asarray(array))
        )
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def is_right(state: dict, step: int) -> bool:
    expected = reference(step)
    same = [
        np.array_equal(whole(state[name]).view(np.uint8), value.view(np.uint8))
        for name, value in expected.items()
    ]
    own_key = np.asarray(jax.random.key_data(state["key"]).addressable_shards[0].data)
    same += [
        np.array_equal(own_key, np.asarray(jax.random.key_data(jax.random.key(step)))),
        int(state["step"]) == step,
        state["seed"] == 7,
    ]
    return all(same)


def flip_largest(directory: Path) -> str:
    """Flips a bit in the middle of the largest file of a step."""
    path = max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: (path.stat().st_size, path.as_posix()),
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))
    return path.relative_to(directory).as_posix()


def barrier(name: str) -> None:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def save(directory: Path, mesh: Mesh) -> dict:
    """Saves, restores on another sharding, meets a damaged step, falls back, saves again."""
    report: dict = {}
    first = jax.process_index() == 0
    with TrainCheckpoints(directory / "run", keep=2, best_metric="score") as checkpoints:
        for step in (1, 2, 3):
            metrics = {"score": -float(step)}
            checkpoints.save(step, global_state(step, mesh), {"step": step}, metrics=metrics)
        checkpoints.wait()
        report["steps"] = checkpoints.all_steps()
        report["best"] = checkpoints.best_step()
        restored = checkpoints.restore_latest(abstract_state(mesh, OTHER_SPECS))
        assert restored is not None
        report["restored"] = is_right(restored.state, 3)
        report["spec"] = list(restored.state["columns"].sharding.spec)
        differing = global_state(4, mesh) | {"seed": jax.process_index()}
        try:
            checkpoints.save(4, differing)
        except ValueError as error:
            report["differing"] = str(error)
    barrier("damage")
    if first:
        report["flipped"] = flip_largest(directory / "run" / "3")
    barrier("damaged")
    with TrainCheckpoints(directory / "run", keep=2) as checkpoints:
        try:
            checkpoints.restore_latest(abstract_state(mesh, SPECS))
        except CheckpointError as error:
            report["refused"] = str(error)
        fallen = checkpoints.restore_latest(abstract_state(mesh, SPECS), strict=False)
        assert fallen is not None
        report["fell back"] = [fallen.step, list(fallen.skipped), is_right(fallen.state, 2)]
        checkpoints.save(3, global_state(3, mesh), {"step": "again"})
    report["hash"] = save_backbone(
        directory / "backbone", {"rows": global_state(3, mesh)["rows"]}, {"method": "none"}
    )
    report["content sharded"] = content_hash({"rows": global_state(3, mesh)["rows"]})
    report["content loaded"] = content_hash(load_backbone(directory / "backbone")[0])
    columns = NamedSharding(mesh, P(None, "data"))
    loaded, metadata = load_backbone(directory / "backbone", sharding=lambda *_: columns)
    report["hash read in parts"] = metadata["content_hash"]
    report["content in parts"] = content_hash(loaded)
    report["part"] = loaded["rows"].addressable_shards[0].data.shape
    return report


def read(directory: Path, mesh: Mesh) -> dict:
    """Restores in one process what several saved."""
    report: dict = {"devices": jax.device_count()}
    with TrainCheckpoints(directory / "run") as checkpoints:
        restored = checkpoints.restore_latest(abstract_state(mesh, SPECS))
        assert restored is not None
        report["restored"] = [restored.step, is_right(restored.state, 3)]
        flip_largest(directory / "run" / "3")
        try:
            checkpoints.restore_latest(abstract_state(mesh, SPECS))
        except CheckpointError as error:
            report["refused"] = str(error)
    params, metadata = load_backbone(directory / "backbone")
    report["backbone"] = bool(np.array_equal(params["rows"], reference(3)["rows"]))
    report["hash"] = metadata["content_hash"]
    return report


def main(action: str, directory: str, port: str, processes: int, process: int, devices: int):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            processes,
            process,
            initialization_timeout=60,
            heartbeat_timeout_seconds=20,
        )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    report = {"save": save, "read": read}[action](Path(directory), mesh)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
