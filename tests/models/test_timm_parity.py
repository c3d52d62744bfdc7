"""Logits of torch's own implementations, with random weights, and exports that they load strictly.

torch is large and no dependency: the tests run it in another environment. That is the one whose
interpreter ``JAXIMM_TORCH_PYTHON`` names (with torch, timm, torchvision and safetensors), or one
that is made for this run.
"""

import dataclasses
import os
import subprocess
import sys
import venv

import jax
import numpy as np
import pytest
from PIL import Image

from jaximm import models
from jaximm.data.images.image_folder import decode_image

pytestmark = pytest.mark.slow

WORKER = """
import sys
import numpy as np, timm, torch, torchvision
from safetensors.torch import load_file

task, kind, name, size, folder = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
if task == "built":  # from what the file says alone
    import json
    from safetensors import safe_open
    from timm.data import create_transform, resolve_data_config
    from PIL import Image

    with safe_open(f"{folder}/export.safetensors", "np") as file:
        told = json.loads(file.metadata()["timm"])
    model = timm.create_model(
        told["architecture"], num_classes=told["num_classes"], **told["model_args"]
    )
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=told["pretrained_cfg"]))
    np.save(f"{folder}/prepared.npy", transform(Image.open(f"{folder}/photo.png")).numpy())
elif kind == "timm":
    model = timm.create_model(name, pretrained=False)
else:
    model = torchvision.models.get_model(name, weights=None)
model.eval()
if task == "make":
    # Initial values would hide mistakes: norms are the identity, biases and some scales are zero.
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1:
                value.normal_(0, 0.1)
            elif value.ndim == 3:
                value.normal_(0, 0.1)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    np.savez(f"{folder}/state.npz", **state)
    x = torch.randn(2, 3, int(size), int(size))
    np.save(f"{folder}/inputs.npy", x.permute(0, 2, 3, 1).numpy())
else:
    model.load_state_dict(load_file(f"{folder}/export.safetensors"), strict=True)
    x = torch.from_numpy(np.load(f"{folder}/inputs.npy")).permute(0, 3, 1, 2).contiguous()
with torch.no_grad():
    np.save(f"{folder}/{task}_logits.npy", model(x).numpy())
"""


@pytest.fixture(scope="module")
def torch_python(tmp_path_factory):
    """An interpreter with torch, timm and torchvision."""
    if given := os.environ.get("JAXIMM_TORCH_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("torch")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "torch", "timm", "torchvision", "safetensors"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        pytest.skip(f"torch cannot be installed here: {lines[-1] if lines else 'no message'}")
    return str(python)


@pytest.mark.parametrize(
    ("ours", "kind", "theirs", "size", "fields"),
    [
        ("resnet18", "timm", "resnet18", 224, {}),
        ("resnet50", "timm", "resnet50", 128, {}),
        ("resnet18", "torchvision", "resnet18", 97, {}),
        ("vit_s16", "timm", "vit_small_patch16_224", 224, {}),
        ("vit_b16", "timm", "vit_base_patch16_224", 224, {}),
        ("vit_b16_torchvision", "timm", "vit_base_patch16_224", 224, {}),
        ("efficientnet_lite0", "timm", "tf_efficientnet_lite0", 224, {}),
        ("efficientnet_lite0", "timm", "tf_efficientnet_lite0", 97, {}),
        ("efficientnet_lite1", "timm", "tf_efficientnet_lite1", 240, {}),
        ("efficientnet_lite2", "timm", "tf_efficientnet_lite2", 260, {}),
        ("dinov2_s14", "timm", "vit_small_patch14_dinov2", 518, {}),
        ("squeezenet1_1", "torchvision", "squeezenet1_1", 224, {}),
        ("squeezenet1_1", "torchvision", "squeezenet1_1", 100, {"ceil_pool": True}),
    ],
)
def test_logits_agree_and_an_export_loads_strictly(
    torch_python, tmp_path, ours, kind, theirs, size, fields
):
    def worker(task):
        command = [torch_python, "-c", WORKER, task, kind, theirs, str(size), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return np.load(tmp_path / f"{task}_logits.npy")

    expected = worker("make")
    layout = "timm" if kind == "timm" else "torchvision"
    backbone = models.create(ours, weights=tmp_path / "state.npz", layout=layout, **fields)
    inputs = np.load(tmp_path / "inputs.npy")
    # DINOv2 has no classifier: its features are compared.
    outputs = backbone.features if ours == "dinov2_s14" else backbone.logits
    found = np.asarray(jax.jit(outputs)(backbone.params, inputs))
    scale = max(1.0, np.abs(expected).max())
    error = np.abs(found - expected).max() / scale
    print(f"{ours} ({kind}, {size} pixels): error {error:.1e} of {scale:.1f}", file=sys.stderr)
    assert error <= 1e-4
    assert np.ptp(expected, axis=0).max() > 1e-3 * scale  # the logits do depend on the images

    models.export_backbone(backbone, tmp_path / "export.safetensors", layout=layout)
    np.testing.assert_allclose(worker("load"), expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 224), ("efficientnet_lite0", 224), ("dinov2_s14", 224)]
)
def test_timm_builds_an_export_from_its_metadata(torch_python, tmp_path, name, side):
    rng = np.random.default_rng(0)
    backbone = models.create(name, rng_key=jax.random.key(0))
    images = dataclasses.replace(backbone.preprocess, size=side, resize=side + 19)
    backbone = dataclasses.replace(backbone, preprocess=images)
    head = rng.normal(size=(backbone.width, 5)).astype(np.float32), np.ones(5, np.float32)
    models.export_backbone(backbone, tmp_path / "export.safetensors", layout="timm", head=head)
    pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((500, 333), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "photo.png")
    inputs = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    arguments = [torch_python, "-c", WORKER, "built", "", "", "0", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    again = models.create(name, weights=tmp_path / "export.safetensors")
    found = np.asarray(jax.jit(again.logits)(again.params, inputs))
    expected = np.load(tmp_path / "built_logits.npy")
    error = np.abs(found - expected).max() / np.abs(expected).max()
    content = (tmp_path / "photo.png").read_bytes()
    decoded = decode_image(content, size=images.size, resize=images.resize)
    ours = np.asarray(again.preprocess(jax.numpy.asarray(decoded)[None]))[0]
    theirs = np.load(tmp_path / "prepared.npy").transpose(1, 2, 0)
    apart = np.abs(ours - theirs).max()
    print(f"{name}: logits {error:.1e} of the largest, inputs {apart:.1e}", file=sys.stderr)
    assert apart <= 1e-5
    assert error <= 1e-4
