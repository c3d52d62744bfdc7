"""Backbones that lie in parts: written and read part by part, on other meshes, checked."""

import jax.numpy as jnp
import language
import numpy as np
import pytest

from jaximm.checkpoint import CheckpointError, content_hash, load_backbone, save_backbone
from jaximm.training import FSDP, TENSOR, make_sharded

pytestmark = pytest.mark.heavy

PARAMS = language.params(dtype=jnp.float32) | {"count": jnp.int32(3)}
QUERY = "layers.query.kernel"


def mesh_of(devices, rules=FSDP):
    axis = {FSDP: "fsdp", TENSOR: "tensor"}[rules]
    return make_sharded({axis: devices}, rules, rows=None)


def is_gathered(array):
    return (
        array._npy_value is not None
    )  # NumPy's view of the whole, which jax keeps once it is made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "backbone"
    spread = mesh_of(8).put(PARAMS)
    digest = save_backbone(path, {"params": spread}, {"method": "none"})
    assert not is_gathered(spread[QUERY])
    return path, digest


@pytest.mark.parametrize(
    ("devices", "rules", "part"),
    [
        (8, FSDP, (2, 2, 16)),
        (4, FSDP, (2, 4, 16)),
        (8, TENSOR, (2, 16, 2)),
        (1, FSDP, (2, 16, 16)),
    ],
)
def test_it_is_restored_onto_another_mesh_and_held_in_parts(saved, devices, rules, part):
    path, digest = saved
    loaded, metadata = load_backbone(path, sharding=mesh_of(devices, rules).sharding)
    assert (metadata["method"], metadata["content_hash"]) == ("none", digest)
    params = loaded["params"]
    assert params[QUERY].addressable_shards[0].data.shape == part
    assert len(params[QUERY].sharding.device_set) == devices
    if devices > 1:
        assert not is_gathered(params[QUERY])
    assert content_hash(params) == content_hash(PARAMS)


def test_eight_four_one_is_the_same_model(saved, tmp_path):
    path = saved[0]
    for devices in (4, 1):
        loaded, _ = load_backbone(path, sharding=mesh_of(devices).sharding)
        path = tmp_path / str(devices)
        save_backbone(path, loaded)
    whole, metadata = load_backbone(path)
    assert isinstance(whole["params"][QUERY], np.ndarray)
    assert content_hash(whole["params"]) == content_hash(PARAMS)
    assert metadata["content_hash"] == content_hash(whole)  # one device: no parts


@pytest.mark.parametrize("devices", [None, 8, 4])
def test_a_flipped_bit_is_refused_however_it_is_read(saved, tmp_path, devices):
    path = tmp_path / "backbone"
    save_backbone(path, {"params": mesh_of(8).put(PARAMS)})
    largest = max(
        (file for file in path.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        load_backbone(path, sharding=None if devices is None else mesh_of(devices).sharding)


def test_a_wrong_block_is_told_from_the_numbers_alone(saved):
    from jaximm.checkpoint.leaves import _describe, _flatten, _matches

    spread = mesh_of(8).put({QUERY: PARAMS[QUERY]})
    (row,) = _describe(_flatten(spread))
    assert len(row["blocks"]) == 8
    for devices, rules in ((8, FSDP), (4, FSDP), (1, FSDP)):
        other = mesh_of(devices, rules).put({QUERY: PARAMS[QUERY]})[QUERY]
        assert _matches(other, row)
        changed = mesh_of(devices, rules).put({QUERY: PARAMS[QUERY].at[1, 9, 3].add(1)})[QUERY]
        assert not _matches(changed, row)


def test_a_failed_save_leaves_what_was_there(tmp_path):
    path = tmp_path / "backbone"
    save_backbone(path, {"params": mesh_of(8).put(PARAMS)}, {"version": 1})
    (path.parent / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="was not saved"):
        save_backbone(path.parent / "file" / "backbone", {"params": mesh_of(8).put(PARAMS)})
    assert load_backbone(path)[1]["version"] == 1
    save_backbone(path, {"params": mesh_of(4).put(PARAMS)}, {"version": 2})
    assert load_backbone(path)[1]["version"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backbone", "file"]
