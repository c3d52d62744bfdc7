"""Every data set of both registries: its configuration, its source, its refusals."""

import dataclasses
import inspect

import pytest

from jaximm import cli, data
from jaximm.data import images

FAMILIES = {"data": data.REGISTRY, "images": images.IMAGE_REGISTRY}
ENTRIES = [(family, name) for family, entries in FAMILIES.items() for name in entries]


@pytest.mark.parametrize(("family", "name"), ENTRIES)
def test_a_configuration_is_a_frozen_value_that_says_what_it_is(family, name):
    config_class, load = FAMILIES[family][name]
    config = config_class()
    assert config_class.__dataclass_params__.frozen
    assert hash(config) == hash(dataclasses.replace(config))
    assert inspect.getdoc(config_class).splitlines()[0].endswith(".")
    assert inspect.getmodule(load).SOURCE
    with pytest.raises(TypeError):
        config_class("positional")


@pytest.mark.parametrize(("family", "name"), ENTRIES)
def test_a_value_that_makes_no_sense_is_refused_by_name(family, name):
    make = data.make_config if family == "data" else images.make_image_config
    fields = {field.name: field.default for field in dataclasses.fields(FAMILIES[family][name][0])}
    for key, default in fields.items():
        for wrong in (object(), [object()]):
            with pytest.raises(ValueError, match=key):
                make(name, **{key: wrong})
        if isinstance(default, float):
            with pytest.raises(ValueError, match=key):
                make(name, **{key: float("nan")})
    with pytest.raises(ValueError, match=f"{name}: unknown config key 'speed'; choose from"):
        make(name, speed=1)


def test_every_one_is_listed_with_its_source():
    listed = cli.catalogue()
    entries = [*listed["data sets"], *listed["image pairs"]]
    assert [entry["name"] for entry in entries] == [name for _, name in ENTRIES]
    assert all(entry["source"] and entry["description"] for entry in entries)
