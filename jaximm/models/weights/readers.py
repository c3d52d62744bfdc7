"""Weight files to flat dicts of NumPy arrays, chosen by content; no torch anywhere."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaximm.models.weights.archives import Archive
from jaximm.models.weights.errors import Refusal, WeightFileError, reading, shown
from jaximm.models.weights.folders import find_weights, read_shards
from jaximm.models.weights.gguf import read_gguf
from jaximm.models.weights.pickles import (
    is_data_pickle,
    is_torch_legacy,
    read_numpy_pickle,
    read_torch_legacy,
    read_torch_zip,
)
from jaximm.models.weights.standins import PLAIN_DTYPES
from jaximm.models.weights.trees import select

_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_weights(path: str | Path, *, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a weight file by their names in it.

    The format is told by the content: safetensors, torch's zip and legacy formats, ``.npz``, ONNX,
    GGUF, or a pickle of NumPy arrays; or a folder in the layout of the Hugging Face hub,
    ``config.json`` beside ``model.safetensors`` or its shards. Pickles run nothing: see
    `jaximm.models.weights.machine`.

    Args:
      path: the file or folder.
      prefix: for a network that holds the wanted one as a part, "backbone." for instance: only
        arrays whose names begin with it are returned, without it. In a pickle it may also begin at
        the root: of ``{"state_dict": ..., "state_dict_ema": ...}`` either is taken by
        "state_dict." or "state_dict_ema.".

    Returns:
      ``{name: array}``; arrays may be read-only views, also of the file. float16 and bfloat16 stay
      as they are; what GGUF has quantised is float32.

    Raises:
      WeightFileError: (a ValueError) naming the file and what to do: it is not there, of none of
        these formats, torn or inconsistent; a pickle that names anything but arrays and harmless
        objects; more unpacked than its size can hold; several sets of weights, and no prefix that
        names one; no arrays, or none under `prefix`.
    """
    path = Path(path)
    with reading(path):  # a name that is too long, a folder that may not be searched
        is_folder = path.is_dir()
    if not is_folder:
        return _read_file(path, prefix)
    weights = find_weights(path)
    if not weights.is_index:
        return _read_file(weights.file, prefix)
    return select(read_shards(weights.file, _read_file), prefix, path.name)


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a ``.safetensors`` file by name, bfloat16 included: read-only views of the file.

    Raises:
      WeightFileError: naming the file: malformed, truncated, or of a dtype that NumPy lacks.
    """
    from safetensors import safe_open

    path = Path(path)
    arrays = {}
    with reading(path):
        with safe_open(path, "np"):  # which checks the head against the file, and reads no more
            pass
        content = np.asarray(np.memmap(path, np.uint8, mode="r"))
        start = 8 + int(content[:8].view("<u8")[0])
        for name, tensor in json.loads(content[8:start].tobytes()).items():
            if name == "__metadata__":
                continue
            if tensor["dtype"] not in _SAFETENSORS_DTYPES:
                raise Refusal(
                    f"{shown(name)} has dtype {tensor['dtype']}, which is not read",
                    f"save it as one of {', '.join(_SAFETENSORS_DTYPES)}",
                )
            first, last = (start + at for at in tensor["data_offsets"])
            flat = content[first:last].view(_SAFETENSORS_DTYPES[tensor["dtype"]])
            arrays[name] = flat.reshape(tensor["shape"])
    return arrays


NPZ_METADATA = "__metadata__"
"""Name of an array in a ``.npz`` file that holds texts, as JSON in UTF-8, and no weights."""


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a ``.npz`` file by name; object arrays, which are pickles, are refused.

    Texts under `NPZ_METADATA`, as `jaximm.models.export_backbone` writes them, are left out.

    Raises:
      WeightFileError: naming the file: malformed, truncated, other than plain numbers, or more
        unpacked than its size can hold.
    """
    path = Path(path)
    with reading(path), Archive(path) as archive:
        names = {name.removesuffix(".npy"): name for name in archive.names}
        return {
            key: _npy(archive.read(name), name)
            for key, name in names.items()
            if key != NPZ_METADATA
        }


def read_npz_metadata(path: str | Path) -> dict[str, str]:
    """The texts that `jaximm.models.export_backbone` wrote into a ``.npz`` file; none elsewhere.

    Raises:
      WeightFileError: naming the file: malformed.
    """
    path = Path(path)
    with reading(path), Archive(path) as archive:
        name = f"{NPZ_METADATA}.npy"
        if name not in archive.names:
            return {}
        texts = json.loads(_npy(archive.read(name), name).tobytes())
        if not isinstance(texts, dict):
            raise Refusal(f"{NPZ_METADATA} holds no texts by name")
        return {str(key): str(value) for key, value in texts.items()}


def read_onnx(path: str | Path) -> dict[str, np.ndarray]:
    """Initialisers of an ONNX graph by name.

    An exporter folds a linear layer's transposed weight into an initialiser without a name of its
    own (``onnx::MatMul_1981``). Such a one is returned under the path of the node that uses it:
    ``/encoder/layer.0/mlp/fc1/MatMul`` gives ``encoder.layer.0.mlp.fc1.kernel``, already
    [in, out]. Where ``embeddings`` concatenates and reshapes a folded table of positions, as vision
    transformers with resizable ones do, they are ``pos_cls`` and ``pos`` beside ``embeddings``.

    Needs the package onnx.

    Raises:
      WeightFileError: naming the file: malformed, with weights in other files, or the package is
        not there.
    """
    path = Path(path)
    arrays = {}
    with reading(path):
        try:
            import onnx
            from onnx import numpy_helper
        except ImportError as error:
            raise Refusal("it is of ONNX, which needs a package", "pip install onnx") from error

        graph: Any = onnx.ModelProto.FromString(path.read_bytes()).graph
        aliases = _aliases(graph)
        for tensor in graph.initializer:
            name = aliases.get(tensor.name, tensor.name)
            if type(name) is not str:  # protobuf gives bytes where it is not UTF-8
                raise Refusal("the name of an array is no text")
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise Refusal(
                    f"{shown(name)} lies in another file", "export it with the weights inside"
                )
            if name in arrays:
                raise Refusal(f"two arrays are named {shown(name)}")
            value = numpy_helper.to_array(tensor)
            if tensor.data_type == onnx.TensorProto.BFLOAT16 and value.dtype.names:
                # onnx 1.17 and 1.18 have the bits, in an integer dtype with a name in it.
                value = value.view(ml_dtypes.bfloat16)
            elif value.dtype.names or value.dtype not in _ONNX_DTYPES:
                raise Refusal(f"{shown(name)} has dtype {value.dtype}, which is not read")
            arrays[name] = value
    return arrays


_ONNX_DTYPES = tuple(np.dtype(code) for code in (*"?bBhHiIlLqQefd", ml_dtypes.bfloat16))


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The text entries in the head of a ``.safetensors`` file, {} where there are none.

    Raises:
      WeightFileError: naming the file: malformed.
    """
    from safetensors import safe_open

    with reading(Path(path)), safe_open(path, "np") as file:
        return file.metadata() or {}


def _read_file(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of one file."""
    if not path.is_file():
        raise WeightFileError(f"there is no weight file {shown(str(path), 300)!r}; check the path.")
    with reading(path):
        reader = _reader(path)
    if reader in (read_torch_legacy, read_torch_zip, read_numpy_pickle):
        arrays = reader(path, prefix=prefix)
    else:
        arrays = select(reader(path), prefix, path.name)
    if not arrays:
        raise WeightFileError(f"{shown(path.name)} holds no arrays; give another file.")
    return arrays


def _npy(content: bytes, name: str) -> np.ndarray:
    """The array of a ``.npy`` file's bytes."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise Refusal(f"{shown(name)} is of version {version[0]}.{version[1]} of npy")
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read_header(stream)
    if dtype.str[1:] not in PLAIN_DTYPES:
        raise Refusal(f"{shown(name)} has dtype {shown(str(dtype))}, not a plain number")
    raw = memoryview(content)[stream.tell() :]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(raw):
        raise Refusal(f"{shown(name)} holds {len(raw)} bytes, its head says otherwise")
    flat = np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=False)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _aliases(graph: Any) -> dict[str, str]:
    """Names for an ONNX graph's nameless initialisers, from the nodes that use them."""
    aliases = {}
    for node in graph.node:
        *modules, _ = node.name.strip("/").split("/")
        parent = ".".join(modules[:-1])
        for name in node.input:
            if not name.startswith("onnx::"):
                continue
            if node.op_type == "MatMul":
                aliases[name] = ".".join((*modules, "kernel"))
            elif modules[-1:] == ["embeddings"] and node.op_type in _POSITIONS:
                aliases[name] = f"{parent}.{_POSITIONS[node.op_type]}".lstrip(".")
    return aliases


_POSITIONS = {"Concat": "pos_cls", "Reshape": "pos"}


def _reader(path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """The reader for a file's content."""
    with path.open("rb") as stream:
        head = stream.read(16)
    # First, for the length of a safetensors head may look like any other format's first bytes.
    if head[4:9] == b"\0\0\0\0{":
        return read_safetensors
    if head.startswith(b"PK\x03\x04"):
        with Archive(path) as archive:
            names = archive.names
        if any(is_data_pickle(name) for name in names):
            return read_torch_zip
        if names and all(name.endswith(".npy") for name in names):
            return read_npz
    elif head.startswith(b"\x80"):
        return read_torch_legacy if is_torch_legacy(path) else read_numpy_pickle
    elif head.startswith(b"\x08"):  # field 1 of an ONNX model, its version
        return read_onnx
    elif head.startswith(b"GGUF"):
        return read_gguf
    raise Refusal(
        "it is none of safetensors, torch (zip or legacy), npz, ONNX, GGUF, NumPy pickle",
        "give a file of one of these",
    )
