"""Pairs of image tasks by name.

`IMAGE_REGISTRY` maps a name to ``(ConfigClass, load_fn)`` with ``load_fn(config) -> ImagePair``. A
new image data set is one file with these two and one line here.
"""

from __future__ import annotations

from typing import Any

from jaximm import registry
from jaximm.data.images import cifar10, image_folder, labelled_arrays, published
from jaximm.data.images.rows import (
    ImagePair,
    ImageSplit,
    ImageTask,
    SharedImages,
    check_image_pair,
    images_shared,
    paired_images,
)

IMAGE_REGISTRY = {
    "cifar10_fashion": (cifar10.Cifar10FashionConfig, cifar10.load_cifar10_fashion),
    "cifar10_split": (cifar10.Cifar10SplitConfig, cifar10.load_cifar10_split),
    "image_folder": (image_folder.ImageFolderConfig, image_folder.load),
    "imagenet_cars": (published.ImagenetCarsConfig, published.load_imagenet_cars),
    "imagenet_country211": (
        published.ImagenetCountry211Config,
        published.load_imagenet_country211,
    ),
    "labelled_arrays": (labelled_arrays.LabelledArraysConfig, labelled_arrays.load),
    "mnist_fashion": (cifar10.MnistFashionConfig, cifar10.load_mnist_fashion),
}

__all__ = [
    "IMAGE_REGISTRY",
    "ImagePair",
    "ImageSplit",
    "ImageTask",
    "SharedImages",
    "check_image_pair",
    "images_shared",
    "load_images",
    "make_image_config",
    "paired_images",
]


def make_image_config(name: str, **fields: Any) -> Any:
    """The configuration of image pair `name` with the given fields, others at their defaults.

    >>> make_image_config("cifar10_split", train_rows=600).held_out_rows
    2000

    Raises:
      ValueError: unknown name or field, with the known ones; or a value that the class refuses.
    """
    return registry.make_config(IMAGE_REGISTRY, "image pair", name, fields)


def load_images(name: str, config: Any = None, **fields: Any) -> ImagePair:
    """The two image tasks of pair `name`.

    Args:
      name: a key of `IMAGE_REGISTRY`.
      config: an instance of the pair's config class; by default its defaults.
      fields: in place of `config`, single fields of it.

    Returns:
      A checked pair: uint8 RGB images of one size a task, int32 labels, every class in the
      training rows.

    Raises:
      ValueError: unknown name or field, a config of another class, or what the loader refuses.
      MissingCarrierError: (a ValueError) the data is not installed; says what brings it.
    """
    if config is None:
        config = make_image_config(name, **fields)
    elif fields:
        raise ValueError("give either config or single fields, not both.")
    if name not in IMAGE_REGISTRY:
        raise ValueError(f"unknown image pair {name!r}; choose from {sorted(IMAGE_REGISTRY)}.")
    config_class, load_fn = IMAGE_REGISTRY[name]
    if not isinstance(config, config_class):
        raise ValueError(
            f"{name}: expected a {config_class.__name__}, got a {type(config).__name__}."
        )
    return check_image_pair(load_fn(config))
