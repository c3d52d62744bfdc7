"""Readers of data files on damaged ones: read, or refused by name, within bounds (fuzz_worker)."""

import gzip
import io
import struct
import zipfile
import zlib

import fuzz_worker
import numpy as np
import pytest
from fuzz_worker import Job, flip, mutants
from PIL import Image

from jaximm.data import files
from jaximm.data.images import image_folder
from jaximm.data.tables import arrays, house_prices

# What the worker calls, with the path of a mutant.


def read_npz(path):
    arrays.load(arrays.ArraysConfig(path=str(path)))


def read_csv(path):
    arrays.load(arrays.ArraysConfig(path=str(path), harmful_path=str(path)))


def read_house_prices(path):
    house_prices.read_encoded(path)


def read_image(path):
    image_folder.FileSource(files=(path,), labels=(0,), size=16, resize=20)[0]


def read_idx(path):
    files.read_idx(path)


# Sound files and damages that keep the outer form, so that the inner one is reached.


def npz_files():
    rng = np.random.default_rng(0)
    tasks = {
        f"{task}_{axis}": rng.normal(size=(12, 3) if axis == "x" else 12)
        for task in ("primary", "harmful")
        for axis in "xy"
    }
    made = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, **tasks)
        made.append(stream.getvalue())
    return made


def damaged_npz(content, rng):
    """Bytes at random, or a member or its header damaged inside a sound archive."""
    if rng.random() < 0.4:
        return flip(content, rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(stream, "w") as made:
        victim = rng.choice(archive.namelist())
        for name in archive.namelist():
            member = archive.read(name)
            if name == victim:
                inner = rng.random() < 0.5
                member = flip(member[:128], rng) + member[128:] if inner else npy(rng)
            made.writestr(zipfile.ZipInfo(name), member)  # a name would be stored with the time
    return stream.getvalue()


def npy(rng):
    """An array with a header that may say anything."""
    descr = rng.choice(
        ["'<f8'", "'>f4'", "'|O'", "'<U9'", "[('a','<f8')]", "'<m8[s]'", "'f16'", "9"]
    )
    length = rng.choice([0, 1, 3, -1, 2**31, 2**63, 10**30, "'a'", "None", "True"])
    shape = rng.choice([f"({length},)", f"({length}, 3)", f"(12, {length})", "()", "7", "(" * 300])
    order = rng.choice(["True", "False", "0", "'x'"])
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    version = rng.choice([b"\1\0", b"\2\0", b"\3\0", b"\xff\0"])
    size = struct.pack("<I" if version != b"\1\0" else "<H", len(text))
    return (
        b"\x93NUMPY" + version + size + text.encode() + rng.randbytes(rng.choice([0, 8, 96, 288]))
    )


def csv_files():
    rows = "\n".join(f"{a},{b},{a * b + 0.5}" for a in range(9) for b in range(3))
    return [f"a,b,y\n{rows}\n".encode(), b'\xef\xbb\xbf"a","b b",y\r\n1,2,3.5\r\n"4","5",6\r\n']


def house_files():
    rows = "\n".join(f"{i},{'RL' if i % 2 else 'RM'},NA,{i}.5,{100 * i}" for i in range(9))
    return [f"Id,MSZoning,Street,LotArea,SalePrice\n{rows}\n".encode()]


def damaged_text(content, rng):
    made = flip(content, rng)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(made) + 1)
        token = rng.choice([b'"', b",", b"\n", b"\r", b"\0", b"nan", b"1e999", b"_", b"\xff", b";"])
        made = made[:at] + token * rng.choice([1, 2, 1000]) + made[at:]
    return made


def image_files():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3)).astype(np.uint8)
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "camera", 72.0
    wide = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    made = []
    for image, kind, options in (
        (picture, "JPEG", {"exif": exif}),
        (picture, "JPEG", {"exif": exif, "progressive": True}),
        (picture.convert("CMYK"), "JPEG", {"icc_profile": b"x" * 200}),
        (picture, "PNG", {"exif": exif, "dpi": (72, 72)}),
        (picture.quantize(9), "PNG", {"transparency": b"\0\x80"}),
        (wide, "PNG", {}),
        (picture, "PNG", {"save_all": True, "append_images": [picture]}),
    ):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        made.append(stream.getvalue())
    return made


def damaged_image(content, rng):
    """Bytes at random, more often near the beginning; the checksums of a PNG set right again."""
    if rng.random() < 0.5:
        head = rng.choice([40, 120, 300])
        made = flip(content[:head], rng) + content[head:]
    else:
        made = flip(content, rng)
    return checksums(made) if made[:4] == b"\x89PNG" and rng.random() < 0.8 else made


def checksums(content):
    made, at = bytearray(content), 8
    while at + 12 <= len(made):
        length = int.from_bytes(made[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(made):
            break
        made[end : end + 4] = zlib.crc32(made[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(made)


def idx_files():
    plain = b"\0\0\x08\3" + struct.pack(">3I", 4, 5, 6) + bytes(range(120))
    return [plain, gzip.compress(plain, mtime=0)]


def damaged_idx(content, rng):
    head = rng.choice([4, 16, len(content)])
    made = flip(content[:head], rng) + content[head:]
    return gzip.compress(made, mtime=0) if rng.random() < 0.3 else made


READERS = {
    "npz": ("read_npz", ".npz", npz_files, damaged_npz),
    "csv": ("read_csv", ".csv", csv_files, damaged_text),
    "house_prices": ("read_house_prices", ".csv", house_files, damaged_text),
    "image": ("read_image", ".jpg", image_files, damaged_image),
    "idx": ("read_idx", ".idx", idx_files, damaged_idx),
}


def check(folder, count, seed):
    jobs = {
        name: Job(
            f"tests.data.test_fuzz:{function}",
            suffix,
            [*sound(), *mutants(sound(), count, seed=seed, by=damage)],
        )
        for name, (function, suffix, sound, damage) in READERS.items()
    }
    reports = fuzz_worker.run_jobs(jobs, folder, timeout=1200)
    for name, report in reports.items():
        whole = len(READERS[name][2]())
        assert report.outcomes[:whole] == [["read"]] * whole, (name, report.messages[:whole])
        assert not report.others("ValueError"), (name, report.others("ValueError")[:5])
        assert max(report.seconds) < fuzz_worker.SECONDS
        assert report.grown < fuzz_worker.MEMORY
        unnamed = [
            text for text in report.messages if text and f"{name}{READERS[name][1]}" not in text
        ]
        assert not unnamed, (name, unnamed[:5])
        assert report.refused("ValueError") > count / 4, name
    return reports


def test_a_hundred_damaged_files_a_reader(tmp_path):
    check(tmp_path, 100, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_thousands_of_damaged_files_a_reader(tmp_path, seed):
    for name, report in check(tmp_path, 4000, seed=seed).items():
        print(name, report.refused("ValueError"), max(report.seconds), report.grown >> 20)


def test_the_damages_are_fixed_by_their_seed():
    for _, _, sound, damage in READERS.values():
        made = [mutants(sound(), 20, seed=seed, by=damage) for seed in (1, 1, 2)]
        assert made[0] == made[1] != made[2]
