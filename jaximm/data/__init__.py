"""Data sets: each yields two tasks with training and held-out rows.

`REGISTRY` maps a name to ``(ConfigClass, load_fn)`` with ``load_fn(config) -> TaskPair``. A new
data set is one file with these two and one line here. ``ConfigClass.targets`` says what its targets
are, for the defaults of an experiment: "numbers" (also where it says nothing) or "classes".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaximm import registry
from jaximm.carriers import MissingCarrierError, cache_folder
from jaximm.data.batches import batch_indices, check_batches, paired_arrays, paired_batch
from jaximm.data.images import cifar10, image_folder, labelled_arrays, published
from jaximm.data.loader import ArraySource, image_loader, paired_loader
from jaximm.data.tables import arrays, house_prices, mnist
from jaximm.data.tasks import (
    SharedInputs,
    Split,
    Task,
    TaskPair,
    check_pair,
    check_task,
    in_few_rows,
    inputs_shared,
    task_pair_from_arrays,
)

REGISTRY: dict[str, tuple[type, Callable[[Any], TaskPair]]] = {
    "arrays": (arrays.ArraysConfig, arrays.load),
    "cifar10_fashion": (cifar10.Cifar10FashionConfig, cifar10.load_cifar10_fashion),
    "cifar10_split": (cifar10.Cifar10SplitConfig, cifar10.load_cifar10_split),
    "house_prices": (house_prices.HousePricesConfig, house_prices.load),
    "image_folder": (image_folder.ImageFolderConfig, image_folder.load),
    "imagenet_cars": (published.ImagenetCarsConfig, published.load_imagenet_cars),
    "imagenet_country211": (
        published.ImagenetCountry211Config,
        published.load_imagenet_country211,
    ),
    "labelled_arrays": (labelled_arrays.LabelledArraysConfig, labelled_arrays.load),
    "mnist_fashion": (cifar10.MnistFashionConfig, cifar10.load_mnist_fashion),
    "mnist_pairs": (mnist.MnistPairConfig, mnist.load),
}

__all__ = [
    "REGISTRY",
    "ArraySource",
    "MissingCarrierError",
    "SharedInputs",
    "Split",
    "Task",
    "TaskPair",
    "batch_indices",
    "cache_folder",
    "check_batches",
    "check_pair",
    "check_task",
    "image_loader",
    "in_few_rows",
    "inputs_shared",
    "load",
    "make_config",
    "paired_arrays",
    "paired_batch",
    "paired_loader",
    "targets_of",
    "task_pair_from_arrays",
]


def make_config(name: str, **fields: Any) -> registry.Config:
    """The configuration of data set `name` with the given fields, others at their defaults.

    >>> make_config("house_prices", train_rows=150).train_rows
    150

    Raises:
      ValueError: unknown name or field, with the known ones; or a value that the class refuses.
    """
    return registry.make_config(REGISTRY, "data set", name, fields)


def targets_of(name: str) -> str:
    """What the targets of a data set are, whatever its configuration: "numbers" or "classes".

    >>> targets_of("house_prices"), targets_of("image_folder")
    ('numbers', 'classes')

    Raises:
      ValueError: an unknown name.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown data set {name!r}; choose from {sorted(REGISTRY)}.")
    return getattr(REGISTRY[name][0], "targets", "numbers")


def load(name: str, config: registry.Config = None, **fields: Any) -> TaskPair:
    """The two tasks of data set `name`.

    Args:
      name: a key of `REGISTRY`.
      config: an instance of the data set's config class; by default its defaults.
      fields: in place of `config`, single fields of it.

    Returns:
      A checked pair with at least one row in each split. Of numbers: float64, finite, one width. Of
      classes: uint8 RGB images of one size a task (or floating inputs), int32 labels, every class
      in the training rows.

    Raises:
      ValueError: unknown name or field, a config of another class, or what the loader refuses.
      MissingCarrierError: (a ValueError) the data is not installed; says what brings it.
    """
    if config is None:
        config = make_config(name, **fields)
    elif fields:
        raise ValueError("give either config or single fields, not both.")
    if name not in REGISTRY:
        raise ValueError(f"unknown data set {name!r}; choose from {sorted(REGISTRY)}.")
    config_class, load_fn = REGISTRY[name]
    if not isinstance(config, config_class):
        raise ValueError(
            f"{name}: expected a {config_class.__name__}, got a {type(config).__name__}."
        )
    return check_pair(load_fn(config))
