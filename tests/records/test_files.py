"""Files that stay: envelopes, folders that are held, and what gives way to a new file."""

import json
import os
import time
import warnings

import assessment_fixture
import pytest

from jaximm.records import assessment, files
from jaximm.records.files import FileWarning, ResultError
from jaximm.records.lease import LOCK, held


def test_an_envelope_opens_on_its_own_content_and_address_alone():
    content = {"b": [1, None, "\u00e9"], "a": {"x": 0.1}}
    sealed = files.sealed(content, of="cell 7")
    assert files.opened(sealed) == files.opened(sealed, of="cell 7") == content
    again = json.loads(json.dumps(sealed, indent=3, sort_keys=True))
    assert files.opened(again) == content  # layout does not count
    for key, value in (("a", {"x": 0.2}), ("c", 1), ("b", [1, 0, "\u00e9"])):
        with pytest.raises(ResultError, match="not what was written"):
            files.opened({**sealed, key: value})
    with pytest.raises(ResultError, match="the file of 'cell 7', not of 'cell 8'"):
        files.opened(sealed, of="cell 8")
    moved = {**sealed, "envelope": {**sealed["envelope"], "of": "cell 8"}}
    with pytest.raises(ResultError, match="not what was written"):
        files.opened(moved, of="cell 8")
    with pytest.raises(ResultError, match="no envelope"):
        files.opened(content)


def test_a_folder_is_held_by_one_process(tmp_path):
    folder = tmp_path / "run"
    said = rf"in use by process {os.getpid()} on "
    with held(folder), pytest.raises(ValueError, match=said), held(folder):
        raise AssertionError("held twice")
    with held(folder):  # and again, once it was let go
        pass
    assert (folder / LOCK).read_text() == ""


def test_drafts_that_nobody_finishes_are_swept(tmp_path):
    old, new, mine = (tmp_path / name for name in (".a.json.x-1.tmp", ".b.json.y-2.tmp", "c.tmp"))
    for path in (old, new, mine):
        path.touch()
    ago = time.time() - 2 * files.STALE_SECONDS
    os.utime(old, (ago, ago))
    os.utime(mine, (ago, ago))
    assert files.sweep(tmp_path) == [old]
    assert sorted(tmp_path.iterdir()) == [new, mine]


def edited(document, **protocol):
    return {**document, "protocol": {**document["protocol"], **protocol}}


def test_an_assessment_that_says_less_or_other_things_replaces_nothing(tmp_path):
    path, document = (
        tmp_path / "assessment.json",
        assessment_fixture.make_assessment(
            ("none", "limit@t=1"), ("gd", "ridge", "fine_tune_sgd"), ("harmful",)
        ),
    )
    more = document["attackers"][0]["name"]
    smaller = {
        **document,
        "rows": [row for row in document["rows"] if row["attacker"] != more],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assessment.write(path, smaller)
        assessment.write(path, document)  # all of it and more
        assessment.write(path, document)
    assert [file.name for file in tmp_path.iterdir()] == ["assessment.json"]
    for number, other in enumerate((smaller, edited(document, report_seeds=[77])), 1):
        assessment.write(path, document) if number == 1 else None
        with pytest.warns(FileWarning, match=f"assessment.earlier-{number}.json"):
            assessment.write(path, other)
        assert assessment.read(path) == other
    kept = assessment.read(tmp_path / "assessment.earlier-1.json")
    assert kept == document
    path.write_text("{")
    with pytest.warns(FileWarning, match="earlier-3"):
        assessment.write(path, document)
    assert (tmp_path / "assessment.earlier-3.json").read_text() == "{"
