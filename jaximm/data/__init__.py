"""Data sets: each yields two tasks with training and held-out rows.

`REGISTRY` maps a name to ``(ConfigClass, load_fn)`` with ``load_fn(config) -> TaskPair``. A new
data set is one file with these two and one line here. Image tasks have a registry of their own,
`IMAGE_REGISTRY`, in `jaximm.data.images`.
"""

from __future__ import annotations

from typing import Any

from jaximm import registry
from jaximm.carriers import MissingCarrierError, cache_folder
from jaximm.data.batches import batch_indices, check_batches, paired_arrays, paired_batch
from jaximm.data.images import (
    IMAGE_REGISTRY,
    ImagePair,
    ImageSplit,
    ImageTask,
    SharedImages,
    check_image_pair,
    images_shared,
    load_images,
    make_image_config,
    paired_images,
)
from jaximm.data.loader import ArraySource, image_loader, paired_loader
from jaximm.data.tables import arrays, house_prices, mnist
from jaximm.data.tasks import (
    RelatedTasks,
    SharedInputs,
    Split,
    Task,
    TaskPair,
    check_pair,
    check_task,
    inputs_shared,
    task_pair_from_arrays,
)

REGISTRY = {
    "arrays": (arrays.ArraysConfig, arrays.load),
    "house_prices": (house_prices.HousePricesConfig, house_prices.load),
    "mnist_pairs": (mnist.MnistPairConfig, mnist.load),
}

RELATED = {"house_prices": house_prices.related, "mnist_pairs": mnist.related}
"""Data sets that have tasks beside their pair: name to ``related(config) -> RelatedTasks``."""

__all__ = [
    "IMAGE_REGISTRY",
    "REGISTRY",
    "ArraySource",
    "ImagePair",
    "ImageSplit",
    "ImageTask",
    "MissingCarrierError",
    "RelatedTasks",
    "SharedImages",
    "SharedInputs",
    "Split",
    "Task",
    "TaskPair",
    "batch_indices",
    "cache_folder",
    "check_batches",
    "check_image_pair",
    "check_pair",
    "image_loader",
    "images_shared",
    "inputs_shared",
    "load",
    "load_images",
    "make_config",
    "make_image_config",
    "paired_arrays",
    "paired_batch",
    "paired_images",
    "paired_loader",
    "related_tasks",
    "task_pair_from_arrays",
]


def make_config(name: str, **fields: Any) -> Any:
    """The configuration of data set `name` with the given fields, others at their defaults.

    >>> make_config("house_prices", train_rows=150).train_rows
    150

    Raises:
      ValueError: unknown name or field, with the known ones; or a value that the class refuses.
    """
    return registry.make_config(REGISTRY, "data set", name, fields)


def load(name: str, config: Any = None, **fields: Any) -> TaskPair:
    """The two tasks of data set `name`.

    Args:
      name: a key of `REGISTRY`.
      config: an instance of the data set's config class; by default its defaults.
      fields: in place of `config`, single fields of it.

    Returns:
      A checked pair: float64, finite, one width, at least one row in each split.

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


def related_tasks(name: str, **fields: Any) -> RelatedTasks:
    """Tasks on the same kind of inputs that no method of an experiment on `name` gets to see.

    Args:
      name: a key of `REGISTRY`.
      fields: of its config.

    Returns:
      Checked tasks of the pair's width; none where the data set has none (see `RELATED`).

    Raises:
      ValueError: as `load`.
    """
    config = make_config(name, **fields)
    if name not in RELATED:
        return RelatedTasks({}, {})
    found = RELATED[name](config)
    return RelatedTasks(*({key: check_task(task) for key, task in part.items()} for part in found))
