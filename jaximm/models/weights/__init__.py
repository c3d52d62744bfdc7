"""Weight files in and out, without torch: read, map to our paths, map back."""

from jaximm.models.weights.errors import WeightFileError
from jaximm.models.weights.layout import (
    CLASSIFIER,
    HEAD_KEYS,
    Imported,
    export_state,
    fitting,
    from_npz,
    import_state,
    key_problem,
    own_layout,
    with_separate_head,
)
from jaximm.models.weights.readers import (
    NPZ_METADATA,
    read_npz,
    read_npz_metadata,
    read_onnx,
    read_safetensors,
    read_safetensors_metadata,
    read_weights,
)
from jaximm.models.weights.trees import select

__all__ = [
    "CLASSIFIER",
    "HEAD_KEYS",
    "NPZ_METADATA",
    "Imported",
    "WeightFileError",
    "export_state",
    "fitting",
    "from_npz",
    "import_state",
    "key_problem",
    "own_layout",
    "read_npz",
    "read_npz_metadata",
    "read_onnx",
    "read_safetensors",
    "read_safetensors_metadata",
    "read_weights",
    "select",
    "with_separate_head",
]
