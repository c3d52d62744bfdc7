"""`register` and entry points put outside methods where every suite finds them, or say why not."""

import dataclasses
import types
from typing import Any

import pytest

import jaximm
from jaximm import attacks, data, immunisers, models, registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyConfig:
    """Mine."""

    rate: float = 0.1


PROBLEM: Any = "a problem"


def factory(config, problem):
    return config, problem


FAMILIES = {
    "immuniser": (immunisers, "REGISTRY"),
    "attack": (attacks, "REGISTRY"),
    "data": (data, "REGISTRY"),
    "model": (models, "REGISTRY"),
}
PAIRS = sorted(set(FAMILIES) - {"model", "attack"})


def registries():
    return {family: dict(getattr(*where)) for family, where in FAMILIES.items()}


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """Whatever a test registers is gone after it."""
    for module, name in (*FAMILIES.values(), (attacks, "WEIGHT_REGISTRY")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


def test_the_families_are_those_of_the_package():
    assert set(registry.FAMILIES) == set(FAMILIES)
    for family, (module, name) in FAMILIES.items():
        assert registry.FAMILIES[family] == (module.__name__, name)


@pytest.mark.parametrize("family", PAIRS)
def test_register_adds_exactly_one_entry(family):
    before = registries()
    jaximm.register(family, "mine", (MyConfig, factory))
    assert registries() == before | {family: {"mine": (MyConfig, factory)} | before[family]}
    with pytest.raises(ValueError, match=f"{family} 'mine' is registered already"):
        jaximm.register(family, "mine", (MyConfig, factory))


def test_registered_entries_are_found_by_name():
    jaximm.register("immuniser", "mine", (MyConfig, factory))
    config = immunisers.make_config("mine", rate=0.3)
    assert config == MyConfig(rate=0.3)
    problem = immunisers.Problem(features_fn=lambda params, x: x)
    assert immunisers.make_immuniser("mine", config, problem) == (config, problem)
    with pytest.raises(ValueError, match=r"expected a Problem, .* got str"):
        immunisers.make_immuniser("mine", config, PROBLEM)
    with pytest.raises(ValueError, match=r"mine: unknown config key 'speed'; choose from .*'rate'"):
        immunisers.make_config("mine", speed=1)
    jaximm.register("data", "mine", (MyConfig, factory))
    assert data.make_config("mine") == MyConfig()
    jaximm.register("attack", "mine", attacks.make_attack("ridge"))  # a finished Attack serves too
    assert attacks.make_attack("mine").kind == "closed-form"
    attacker = attacks.make_attack("fine_tune_sgd")
    jaximm.register("attack", "mine_too", attacker)  # of either kind, each in its own registry
    assert attacks.make_attack("mine_too") is attacks.WEIGHT_REGISTRY["mine_too"] is attacker
    jaximm.register("attack", "swift", lambda rate=0.5: attacks.make_attack("lora", alphas=(rate,)))
    assert attacks.make_attack("swift", rate=2.0).grid[0]["alpha"] == 2.0
    assert "swift" in attacks.WEIGHT_REGISTRY
    assert "swift" not in attacks.REGISTRY
    assert data.make_config("mine", rate=0.3) == MyConfig(rate=0.3)
    jaximm.register("model", "mine", models.REGISTRY["mlp"])
    assert models.make_config("mine", classes=3).classes == 3


@pytest.mark.parametrize(
    ("family", "name", "entry", "message"),
    [
        ("immunisers", "mine", (MyConfig, factory), "unknown family 'immunisers'; choose from"),
        ("immuniser", "my-method", (MyConfig, factory), "got 'my-method'"),
        ("immuniser", "limit", (MyConfig, factory), "'limit' is registered already"),
        ("immuniser", "mine", factory, r"\(ConfigClass, factory\).*got function"),
        ("immuniser", "mine", (MyConfig, factory, 3), "got tuple"),
        ("immuniser", "mine", (MyConfig, "factory"), "got tuple"),
        ("immuniser", "mine", (MyConfig(), factory), "a dataclass and a function"),
        ("data", "mine", (dict, factory), "a dataclass and a function"),
        ("attack", "mine", 3, "or a factory that needs no arguments, got int"),
        ("attack", "mine", factory, "got function"),
        ("attack", "mine", (MyConfig, factory), "got tuple"),
        ("attack", "fine_tune_sgd", attacks.make_attack("ridge"), "is registered already"),
        ("weight_attack", "mine", 3, r"'attack' serves both kinds: register\('attack', 'mine'"),
        ("images", "mine", 3, r"register\('data', 'mine', ...\); its configuration says targets"),
        ("data", "cifar10_split", (MyConfig, factory), "is registered already"),
        ("model", "mine", (MyConfig, factory), "as a ModelSpec, got tuple"),
        ("model", "resnet18", models.REGISTRY["mlp"], "is registered already"),
        ("data", "mine", models.REGISTRY["mlp"], "got ModelSpec"),
    ],
)
def test_wrong_entries_are_refused_and_leave_no_trace(family, name, entry, message):
    before = registries()
    with pytest.raises(ValueError, match=message):
        jaximm.register(family, name, entry)
    assert registries() == before


def test_a_finished_object_belongs_to_its_own_family():
    for family in ("immuniser", "data", "model"):
        with pytest.raises(ValueError, match="got Attack"):
            jaximm.register(family, "mine", attacks.make_attack("ridge"))


def test_heads_are_one_class():
    assert immunisers.Head is attacks.Head is jaximm.types.Head


class Point(types.SimpleNamespace):
    """What importlib.metadata gives: a name, a value and `load`."""

    def load(self):
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


def install(monkeypatch, *points):
    def entry_points(*, group):
        assert group == "jaximm"
        return points

    monkeypatch.setattr(registry, "entry_points", entry_points)


ENTRY = (MyConfig, factory)


def test_entry_points_are_registered_once(monkeypatch):
    install(
        monkeypatch,
        Point(name="immuniser.mine", value="mine:ENTRY", target=ENTRY),
        Point(name="data.rows", value="mine:ROWS", target=ENTRY),
    )
    for _ in range(2):  # the second time they are there already
        assert jaximm.load_entry_points() == ["immuniser.mine", "data.rows"]
    assert immunisers.REGISTRY["mine"] is ENTRY
    assert data.REGISTRY["rows"] is ENTRY
    assert "mine" not in attacks.REGISTRY


def test_no_entry_points_is_no_error(monkeypatch):
    install(monkeypatch)
    assert jaximm.load_entry_points() == []
    monkeypatch.undo()
    assert isinstance(jaximm.load_entry_points(), list)  # the real environment


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("mine", ENTRY, "unknown family 'mine'"),
        ("immuniser.", ENTRY, "got ''"),
        ("immuniser.limit", ENTRY, "'limit' is registered already"),
        ("immuniser.mine", factory, "must be registered as"),
        ("immuniser.mine", ImportError("No module named 'mine'"), "mine:E.* No module named"),
        ("immuniser.mine", AttributeError("no attribute 'E'"), "cannot be loaded: no attribute"),
    ],
)
def test_broken_entry_points_say_which(monkeypatch, name, target, message):
    install(monkeypatch, Point(name=name, value="mine:E", target=target))
    with pytest.raises(ValueError, match=message):
        jaximm.load_entry_points()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attacks.run_attack("adam", PROBLEM, steps=1), r"make_attack\('adam'\) makes one"),
        (
            lambda: attacks.run_attack(attacks.make_attack("lora"), PROBLEM, steps=1),
            "got Weig",
        ),
        (
            lambda: attacks.run_attack(attacks.make_attack("adam"), 3, steps=1),
            "ProbeProblem.*got int",
        ),
        (lambda: attacks.run_fine_tune("lora", PROBLEM, steps=1), r"make_attack\('lora'\)"),
        (
            lambda: attacks.run_fine_tune(attacks.make_attack("lora"), 3, steps=1),
            "FineTuneProblem.*got int",
        ),
    ],
)
def test_a_name_in_place_of_an_attacker_is_refused_with_what_makes_one(call, message):
    with pytest.raises(ValueError, match=message):
        call()
