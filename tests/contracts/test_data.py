"""Every data set: its configuration, its source, its refusals."""

import dataclasses
import inspect

import pytest

from jaximm import cli, data

NAMES = list(data.REGISTRY)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_a_frozen_value_that_says_what_it_is(name):
    config_class, load = data.REGISTRY[name]
    config = config_class()
    assert config_class.__dataclass_params__.frozen
    assert hash(config) == hash(dataclasses.replace(config))
    assert inspect.getdoc(config_class).splitlines()[0].endswith(".")
    assert inspect.getmodule(load).SOURCE
    assert data.targets_of(name) in ("numbers", "classes")
    with pytest.raises(TypeError):
        config_class("positional")


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_makes_no_sense_is_refused_by_name(name):
    fields = {field.name: field.default for field in dataclasses.fields(data.REGISTRY[name][0])}
    for key, default in fields.items():
        for wrong in (object(), [object()]):
            with pytest.raises(ValueError, match=key):
                data.make_config(name, **{key: wrong})
        if isinstance(default, float):
            with pytest.raises(ValueError, match=key):
                data.make_config(name, **{key: float("nan")})
    with pytest.raises(ValueError, match=f"{name}: unknown config key 'speed'; choose from"):
        data.make_config(name, speed=1)


def test_every_one_is_listed_with_its_source():
    entries = cli.catalogue()["data sets"]
    assert [entry["name"] for entry in entries] == NAMES
    assert all(entry["source"] and entry["description"] for entry in entries)
