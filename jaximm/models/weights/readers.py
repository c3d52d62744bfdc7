"""Weight files to flat dicts of NumPy arrays, chosen by content; no torch anywhere."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaximm.models.weights.pickles import (
    is_data_pickle,
    is_torch_legacy,
    read_numpy_pickle,
    read_torch_legacy,
    read_torch_zip,
)

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
    or a pickle of NumPy arrays. Pickles run nothing: see `jaximm.models.weights.pickles`.

    Args:
      path: the file.
      prefix: for a network that holds the wanted one as a part, "backbone." for instance: only
        arrays whose names begin with it are returned, without it.

    Returns:
      ``{name: array}``; arrays may be read-only views. float16 and bfloat16 stay as they are.

    Raises:
      ValueError: naming the file: it is not there, of none of these formats, torn or inconsistent;
        a pickle that names anything but array constructors; no arrays, or none under `prefix`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weight file {str(path)!r}.")
    arrays = _reader(path)(path)
    if not arrays:
        raise ValueError(f"{path.name} holds no arrays.")
    if not prefix:
        return arrays
    part = {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
    if not part:
        raise ValueError(
            f"no array of {path.name} begins with {prefix!r}; it holds {sorted(arrays)[:5]} ..."
        )
    return part


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a ``.safetensors`` file by name, bfloat16 included.

    Raises:
      ValueError: naming the file: malformed, truncated, or of a dtype that NumPy lacks.
    """
    from safetensors import SafetensorError, deserialize

    path = Path(path)
    try:
        tensors = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read: {error}.") from error
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path.name}: {name} has dtype {tensor['dtype']}, which is not read.")
        flat = np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]])
        arrays[name] = flat.reshape(tensor["shape"])
    return arrays


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a ``.npz`` file by name; object arrays, which are pickles, are refused.

    Raises:
      ValueError: naming the file.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} cannot be read: {error}.") from error


def read_onnx(path: str | Path) -> dict[str, np.ndarray]:
    """Initialisers of an ONNX graph by name.

    An exporter folds a linear layer's transposed weight into an initialiser without a name of its
    own (``onnx::MatMul_1981``). Such a one is returned under the path of the node that uses it:
    ``/encoder/layer.0/mlp/fc1/MatMul`` gives ``encoder.layer.0.mlp.fc1.kernel``, already
    [in, out]. Where ``embeddings`` concatenates and reshapes a folded table of positions, as vision
    transformers with resizable ones do, they are ``pos_cls`` and ``pos`` beside ``embeddings``.

    Needs the package onnx.

    Raises:
      ValueError: naming the file: malformed, or with weights in other files.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    path = Path(path)
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        aliases = _aliases(graph)
        arrays = {}
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise ValueError(f"{tensor.name} lies in another file")
            arrays[aliases.get(tensor.name, tensor.name)] = numpy_helper.to_array(tensor)
    except (DecodeError, ValueError, TypeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}.") from error
    return arrays


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The text entries in the head of a ``.safetensors`` file, {} where there are none."""
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(size)).get("__metadata__", {})


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


def _reader(path: Path) -> Any:
    """The reader for a file's content."""
    with path.open("rb") as stream:
        head = stream.read(16)
    # First, for the length of a safetensors head may look like any other format's first bytes.
    if head[4:9] == b"\0\0\0\0{":
        return read_safetensors
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path.name} cannot be read: {error}.") from error
        if any(is_data_pickle(name) for name in names):
            return read_torch_zip
        if names and all(name.endswith(".npy") for name in names):
            return read_npz
    elif head.startswith(b"\x80"):
        return read_torch_legacy if is_torch_legacy(path) else read_numpy_pickle
    elif head.startswith(b"\x08"):  # field 1 of an ONNX model, its version
        return read_onnx
    raise ValueError(
        f"{path.name} is none of safetensors, torch (zip or legacy), npz, ONNX, NumPy pickle."
    )
