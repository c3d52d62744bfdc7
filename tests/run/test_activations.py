"""Activations at the cut: in few passes, kept by content, bounded, and found when damaged."""

import json
import os
import re
import time

import jax
import numpy as np
import pytest

from jaximm import models
from jaximm.records.files import FileWarning
from jaximm.run import activations
from jaximm.run.activations import Store, at_cut

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)


def trainable(seed=0, **fields):
    """A perceptron with the cut after its first layer; its rows are 64 bytes."""
    own = {"input_shape": (4, 4, 3), "widths": (16, 4), **fields}
    return models.create("mlp", rng_key=jax.random.key(seed), **own).split_at("layers.1")


def expected(cut, pixels=PIXELS):
    return cut.prefix_fn(cut.backbone.preprocess(jax.numpy.asarray(pixels)))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of a cache that keeps everything."""
    monkeypatch.setenv("JAXIMM_DATA", str(tmp_path))
    monkeypatch.setenv("JAXIMM_CACHE_GB", "1")
    monkeypatch.setattr(activations, "IN_MEMORY", 0)
    return tmp_path / "activations"


@pytest.fixture
def passes(monkeypatch):
    """The shapes of the blocks that went through the frozen stages."""
    seen = []
    compiled = activations._Program.compiled.func

    def counted(self):
        run = compiled(self)
        return lambda *args: seen.append(args[-1].shape) or run(*args)

    monkeypatch.setattr(activations._Program, "compiled", property(counted))
    return seen


def test_all_parts_go_through_one_stream_of_even_blocks(monkeypatch, passes):
    monkeypatch.setattr(activations, "ROWS", 4)
    cut = trainable()
    parts = [PIXELS[:1], PIXELS[1:1], PIXELS[1:6], PIXELS[6:]]
    found = at_cut(cut, parts)
    assert [len(part) for part in found] == [1, 0, 5, 1]
    np.testing.assert_allclose(np.concatenate(found), expected(cut), rtol=1e-5, atol=1e-6)
    assert passes == [(4, 4, 4, 3)] * 2  # 8 rows for 7


def test_few_rows_are_computed_as_they_are(passes):
    cut = trainable()
    at_cut(cut, [PIXELS[:3], PIXELS[3:5]])
    assert passes == [(5, 4, 4, 3)]


def test_parts_of_other_sizes_are_each_what_they_are():
    cut = trainable()
    scaled = np.repeat(np.repeat(PIXELS[:2], 2, axis=1), 2, axis=2)
    small, large = at_cut(cut, [PIXELS, scaled])
    np.testing.assert_allclose(small, expected(cut), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(large, expected(cut, scaled), rtol=1e-5, atol=1e-6)


def test_what_was_computed_is_mapped_from_its_file(kept, passes):
    parts = [PIXELS[:2], PIXELS[2:]]
    first = at_cut(trainable(), parts)
    assert len(passes) == 1
    assert sorted(path.suffix for path in kept.iterdir()) == [".json", ".npy"]
    again = at_cut(trainable(), parts)
    assert len(passes) == 1
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    with open("/proc/self/maps") as lines:  # no copy: the arrays are the file
        assert any(str(kept) in line for line in lines)


@pytest.mark.parametrize("change", ["weights", "pixels", "size", "preprocess"])
def test_whatever_decides_the_numbers_is_in_the_address(kept, passes, change):
    at_cut(trainable(), [PIXELS])
    cut, pixels = trainable(seed=int(change == "weights")), PIXELS
    if change == "pixels":
        pixels = PIXELS.copy()
        pixels[-1, -1, -1, -1] ^= 1
    if change == "size":
        pixels = PIXELS[:-1]
    if change == "preprocess":
        own = {"input_shape": (4, 4, 3), "widths": (16, 4), "preprocess": {"mean": (1.0, 2.0, 3.0)}}
        cut = models.create("mlp", rng_key=jax.random.key(0), **own).split_at("layers.1")
    (found,) = at_cut(cut, [pixels])
    assert len(passes) == 2
    np.testing.assert_allclose(found, expected(cut, pixels), rtol=1e-5, atol=1e-6)


def test_what_lies_after_the_cut_is_not_in_the_address(kept, passes):
    cut = trainable()
    at_cut(cut, [PIXELS])
    moved = cut.backbone.replace({"layers.1.bias": cut.params["layers.1.bias"] + 1})
    at_cut(moved.split_at("layers.1"), [PIXELS])
    assert len(passes) == 1


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "record", "swap"])
def test_a_damaged_file_is_computed_again(kept, passes, damage):
    first = np.array(at_cut(trainable(), [PIXELS])[0])  # else it is the file
    (array,), (record,) = kept.glob("*.npy"), kept.glob("*.json")
    content = bytearray(array.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
        array.write_bytes(content)
    elif damage == "cut":
        array.write_bytes(content[:-4])
    elif damage == "gone":
        array.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:20])
    else:
        at_cut(trainable(seed=1), [PIXELS])
        other = next(path for path in kept.glob("*.npy") if path != array)
        os.replace(other, array)
        os.replace(other.with_suffix(".json"), record)
        passes.pop()
    with pytest.warns(FileWarning, match="computed again"):
        (again,) = at_cut(trainable(), [PIXELS])
    assert len(passes) == 2
    np.testing.assert_array_equal(again, first)
    assert json.loads(record.read_text())["envelope"]["of"] == record.stem


def test_the_least_recently_used_go_when_there_is_no_room(tmp_path):
    store, row = Store(tmp_path, 3000), np.ones((250,), np.float32)

    def write(address):
        return store.write(address, (1, 250), np.dtype(np.float32), iter([row[None]]))

    assert not write("a").flags.writeable
    write("b")
    os.utime(tmp_path / "a.json", (1, 1))
    os.utime(tmp_path / "b.json", (2, 2))
    first = store.read("a", (1, 250), np.dtype(np.float32))  # used now
    write("c")
    assert {path.stem for path in tmp_path.glob("*.npy")} == {"a", "c"}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.npy")) <= 3000
    np.testing.assert_array_equal(first, row[None])
    with pytest.raises(ValueError, match="JAXIMM_CACHE_GB allows"):
        store.write("d", (4, 250), np.dtype(np.float32), iter([]))


def _resident(path):
    """Kilobytes of a mapped file that count as this process's."""
    with open("/proc/self/smaps") as lines:
        mine = False
        for line in lines:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                mine = str(path) in line
            elif mine and line.startswith("Rss:"):
                return int(line.split()[1])
    return None


def test_what_was_read_of_a_mapped_file_is_given_back(tmp_path):
    shape = (64, 2**16)
    rows = np.ones(shape, np.float32)
    array = Store(tmp_path, 10**9).write("a", shape, rows.dtype, iter([rows]))
    for _ in range(2):  # and read again when it is wanted again
        assert array.sum() == rows.size
        deadline = time.monotonic() + 5
        while _resident(tmp_path) > 1000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _resident(tmp_path) <= 1000  # of 16,384
    del array
    assert _resident(tmp_path) is None


def test_a_stopped_write_leaves_nothing(tmp_path):
    def blocks():
        yield np.ones((1, 3), np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, 10**6).write("a", (2, 3), np.dtype(np.float32), blocks())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("JAXIMM_CACHE_GB", text)
    with pytest.raises(ValueError, match="JAXIMM_CACHE_GB must be a number of GB"):
        at_cut(trainable(), [PIXELS])


def test_long_work_is_announced_from_a_measured_block(kept, monkeypatch):
    monkeypatch.setattr(activations, "SAID_SECONDS", 0.0)
    monkeypatch.setattr(activations, "ROWS", 3)
    said = []
    at_cut(trainable(), [PIXELS], progress=lambda *row: said.append(row))
    label, done, total, record = said[0]
    assert (label, done, total, record["unit"]) == ("frozen stages", 0, 7, "images")
    assert record["says"].startswith("about 5 s, 0 MB, kept in ")
    assert record["says"].endswith("for 7 images at 4 px through the frozen stages")
    assert [row[1] for row in said[1:]] == [3, 6]
