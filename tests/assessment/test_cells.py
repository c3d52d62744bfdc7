"""The store of cells: addresses, batches, failures, restarts."""

import collections
import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import damage, thinned, thinned_rows

from jaximm import attacks
from jaximm.assessment import cells
from jaximm.attacks.weights.loop import Execution
from jaximm.records.files import FileWarning

pytestmark = pytest.mark.heavy

ADDRESS = {"model": "abc", "attacker": "lora", "task": "harmful", "data": "d", "code": "c"}
CELLS = [({"learning_rate": 0.1}, 0), ({"learning_rate": 0.2}, 0)]


def test_a_digest_depends_on_every_value_and_on_no_order():
    first = cells.digest({"a": 1, "b": [1.0, 2.0]})
    assert first == cells.digest({"b": (1.0, 2.0), "a": 1})
    for other in ({"a": 2, "b": [1.0, 2.0]}, {"a": 1, "b": [2.0, 1.0]}, {"a": 1}):
        assert cells.digest(other) != first
    assert len(first) == 16


ATTACKERS = {
    name: attacks.make_attack(name) for name in (*attacks.REGISTRY, *attacks.WEIGHT_REGISTRY)
}


@pytest.fixture
def edited(monkeypatch):
    """Which attackers lose their cells when a file of the package is edited."""
    before = {name: cells.code_of(attack) for name, attack in ATTACKERS.items()}

    def lost(part, edit):
        file = cells.PACKAGE / part
        text, read = edit(file.read_text()), cells._text
        assert text != file.read_text()
        monkeypatch.setattr(cells, "_text", lambda path: text if path == file else read(path))
        after = {name: cells.code_of(attack) for name, attack in ATTACKERS.items()}
        monkeypatch.setattr(cells, "_text", read)
        return {name for name in ATTACKERS if before[name] != after[name]}

    return lost


def _as_code(text):
    return text + "\n\ndef _more():\n    return 1\n"


def _as_words(text):
    return '"""Other words."""\n' + text.replace('"""\n', ' Said otherwise."""\n\n# Why.\n', 3)


WEIGHTS, PROBES = set(attacks.WEIGHT_REGISTRY), set(attacks.REGISTRY)


@pytest.mark.parametrize(
    ("part", "loses"),
    thinned_rows(
        [
            ("attacks/probe/heavy_ball.py", {"heavy_ball", "nesterov"}),  # one imports the other
            ("attacks/weights/loop.py", WEIGHTS),
            ("attacks/weights/kick.py", {"kick_then_tune"}),
            (
                "linalg/batched.py",
                {"shampoo", "delta_strip", "spectral_rebalance", "retain_only"},
            ),
            ("assessment/flags.py", set()),
            ("attacks/probe/adam.py", {"adam"}),
            ("attacks/probe/loop.py", PROBES),
            ("attacks/grid.py", WEIGHTS | PROBES),
            ("assessment/runners.py", WEIGHTS | PROBES),
            ("attacks/__init__.py", set()),  # the registry: another attacker costs nobody's cells
            ("models/resnet.py", set()),  # a model counts by its outputs
        ],
        keep=2,
    ),
)
def test_an_edit_loses_the_cells_that_depend_on_it_and_no_others(edited, part, loses):
    assert edited(part, _as_code) == loses
    assert edited(part, _as_words) == set()


def test_what_a_function_is_bound_to_is_its_attacker_s_code():
    mixed = ATTACKERS["mixed_loss"]
    weaker = dataclasses.replace(mixed, follows_loss=False)
    renamed = dataclasses.replace(mixed, title="another name", source="another source")
    assert cells.code_of(weaker) != cells.code_of(mixed) == cells.code_of(renamed)
    first, second = (dataclasses.replace(mixed, update=_scaled(factor)) for factor in (1.0, 2.0))
    assert cells.code_of(first) != cells.code_of(second)


def _scaled(factor, shift=0.0):
    def features_fn(params, x):
        return factor * x @ params + shift

    return features_fn


def _plain(params, x):
    return x @ params


def _bent(params, x):
    return jnp.tanh(x @ params)


def test_functions_of_one_file_are_told_apart():
    functions = [
        _plain, _bent, _scaled(1.0), _scaled(2.0), _scaled(1.0, 0.5), lambda params, x: x @ params,
        functools.partial(_plain, x=1), functools.partial(_plain, x=2),
        functools.partial(_plain, x=np.zeros(3)), functools.partial(_plain, x=np.ones(3)), jnp.tanh,
    ]  # fmt: skip
    found = [cells.fingerprint(function) for function in functions]
    assert len(set(found)) == len(found)
    assert cells.fingerprint(_scaled(2.0)) == cells.fingerprint(_scaled(2.0))
    assert cells.fingerprint(jax.jit(_plain)) == cells.fingerprint(jax.jit(_plain))
    code = (
        "from tests.assessment import test_cells as here; "
        "print(here.cells.fingerprint(here._scaled(2.0)), here.cells.fingerprint(here._bent))"
    )
    tests = Path(__file__).parents[1]
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=tests.parent, env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(tests)},
    )  # fmt: skip
    assert other.stdout.split() == [cells.fingerprint(_scaled(2.0)), cells.fingerprint(_bent)]


class Scaled:
    """Features by an object that is called."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, params, x):
        return self.factor * x @ params

    def features(self, params, x):
        return self(params, x)


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, params, x):
        return self.factor * x @ params


@dataclasses.dataclass(frozen=True)
class Held:
    factor: np.ndarray

    def __call__(self, params, x):
        return self.factor * x @ params


def _with_object(params, x, *, scaled):
    return scaled(params, x)


ROUTES = {
    "instances": Scaled,
    "slots": Slotted,
    "dataclasses": lambda factor: Held(np.full(3, factor)),
    "methods": lambda factor: Scaled(factor).features,
    "closures": lambda factor: _closing(Scaled(factor)),
    "partials": lambda factor: functools.partial(_with_object, scaled=Scaled(factor)),
    "compiled": lambda factor: jax.jit(Scaled(factor)),
    "own gradients": lambda factor: jax.custom_vjp(Scaled(factor)),
    "nested": lambda factor: functools.partial(_with_object, scaled=_closing(Held(factor))),
}


def _closing(scaled):
    return lambda params, x: scaled(params, x)


@pytest.mark.parametrize("route", ROUTES)
def test_callables_of_one_class_are_told_apart_by_what_they_hold(route):
    """Two of them once shared their cells: the defended model got the undefended one's rows."""
    first, second, again = (cells.fingerprint(ROUTES[route](factor)) for factor in (1.0, 2.0, 1.0))
    assert first == again != second


class OwnList(list):
    """Lists, and others below, that may have attributes."""


class OwnDict(dict):
    pass


class OwnTuple(tuple):
    pass


class OwnDeque(collections.deque):
    pass


class OwnArray(np.ndarray):
    pass


def _with_factor(container, factor):
    container.factor = factor
    return container


HOLDERS = {
    "deque": lambda factor: collections.deque([factor]),
    "default factory": lambda factor: collections.defaultdict(functools.partial(float, factor)),
    "list": lambda factor: _with_factor(OwnList([1]), factor),
    "dict": lambda factor: _with_factor(OwnDict(), factor),
    "tuple": lambda factor: _with_factor(OwnTuple((1,)), factor),
    "deque's attribute": lambda factor: _with_factor(OwnDeque([1]), factor),
    "deque of a class": lambda factor: _with_factor(OwnDeque([factor]), 1.0),
    "array": lambda factor: _with_factor(np.zeros(2).view(OwnArray), factor),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_containers_count_by_all_that_they_hold(holder):
    made = (functools.partial(_plain, x=HOLDERS[holder](factor)) for factor in (1.0, 2.0, 1.0))
    first, second, again = map(cells.fingerprint, made)
    assert first == again != second


def test_what_can_be_made_again_counts_by_what_it_is_made_of():
    first, same, other = (
        cells.fingerprint(functools.partial(_plain, x=thing))
        for thing in ((jax.tree.structure({name: 1}), iter([value])) for name, value in _MADE_OF)
    )
    assert first == same != other


_MADE_OF = (("a", 1.0), ("a", 1.0), ("b", 1.0))


def test_what_says_nothing_of_what_it_holds_is_itself_alone():
    items = [(x for x in [1.0]), (x for x in [1.0])]
    found = [cells.fingerprint(functools.partial(_plain, x=item)) for item in items]
    assert found[0] != found[1]
    assert found[0] == cells.fingerprint(functools.partial(_plain, x=items[0]))


def test_a_cycle_ends():
    first, second = Scaled(1.0), Scaled(2.0)
    first.other, second.other = second, first
    assert cells.fingerprint(first) != cells.fingerprint(second)


@pytest.mark.parametrize("folder", [True, False])
def test_a_batch_is_computed_once(tmp_path, folder):
    calls = []

    def compute():
        calls.append(1)
        return {"quality": jnp.array([0.5, jnp.nan])}

    store = cells.Store(tmp_path if folder else None)
    first = store.get(ADDRESS, CELLS, compute)
    assert first["status"] == "done"
    assert first["found"] == {"quality": [0.5, None]}
    assert len(set(first["cells"])) == 2
    again = cells.Store(tmp_path) if folder else store
    assert again.get(ADDRESS, CELLS, compute) == first
    assert calls == [1]
    assert again.computed == (0 if folder else 1)
    # Every part of the address, and the cells themselves, make another batch.
    for key in ADDRESS:
        again.get({**ADDRESS, key: "other"}, CELLS, compute)
    again.get(ADDRESS, CELLS[:1], compute)
    again.get(ADDRESS, [CELLS[0], ({"learning_rate": 0.2}, 1)], compute)
    assert len(calls) == 1 + len(ADDRESS) + 2


def test_a_failure_is_a_batch_with_its_message(tmp_path):
    def broken():
        raise FloatingPointError("the loss is nan\nat step 3")

    store = cells.Store(tmp_path)
    found = store.get(ADDRESS, CELLS, broken)
    assert (found["status"], found["found"]) == ("failed", None)
    assert found["error"] == "FloatingPointError: the loss is nan at step 3"
    assert len(found["cells"]) == 2
    assert cells.Store(tmp_path).get(ADDRESS, CELLS, broken) == found
    again = cells.Store(tmp_path, retry_failed=True)
    assert again.get(ADDRESS, CELLS, lambda: {"x": 1})["found"] == {"x": 1}
    assert cells.Store(tmp_path).get(ADDRESS, CELLS, broken)["status"] == "done"
    with pytest.raises(KeyboardInterrupt):  # being stopped is not a failure of the cell
        store.get(
            {**ADDRESS, "model": "x"}, CELLS, lambda: (_ for _ in ()).throw(KeyboardInterrupt)
        )
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_what_a_kill_leaves_behind_counts_as_nothing(tmp_path):
    store = cells.Store(tmp_path)
    whole = store.get(ADDRESS, CELLS, lambda: {"x": 1})
    (file,) = tmp_path.glob("*.json")
    file.rename(file.with_suffix(".123.tmp"))  # killed before the rename
    file.with_suffix(".123.tmp").write_text(json.dumps(whole)[:20])
    assert cells.Store(tmp_path).get(ADDRESS, CELLS, lambda: {"x": 1}) == whole


@pytest.mark.parametrize("seed", thinned(range(0, 375, 3), keep=15))
def test_no_damage_to_a_cell_is_silent_and_each_is_made_again(tmp_path, seed):
    addresses = [{**ADDRESS, "model": name} for name in "abc"]

    def read(folder):
        store = cells.Store(folder)
        found = [
            store.get(address, CELLS, lambda address=address: {"x": [0.1, address["model"]]})
            for address in addresses
        ]
        return found, store.computed

    whole, _ = read(tmp_path)
    changed = damage(sorted(tmp_path.glob("*.json")), seed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", FileWarning)
        found, computed = read(tmp_path)
    assert found == whole
    assert computed == len(told) == len(list(tmp_path.glob("*.damaged-1.json")))
    # Of two files that changed places both are told; another layout of the same is no damage.
    said = " ".join(str(one.message) for one in told)
    assert len(told) == sum(str(file) in said for file in changed)
    assert read(tmp_path) == (whole, 0)


def test_a_plan_is_measured_once(tmp_path):
    plans = iter([Execution(4, "device", {"device 4": 1e-3}), Execution(1, "host", {})])
    first = cells.Store(tmp_path).plan({"data": "d"}, lambda: next(plans))
    assert first == Execution(4, "device", {"device 4": 1e-3})
    assert cells.Store(tmp_path).plan({"data": "d"}, lambda: next(plans)) == first
    with pytest.raises(RuntimeError, match="trial of how to run attackers failed: ValueError: no"):
        cells.Store(tmp_path).plan({"data": "e"}, lambda: (_ for _ in ()).throw(ValueError("no")))


def test_functions_of_the_user_s_have_their_file_in_the_address(tmp_path):
    assert cells.source_digest(cells.digest, cells.code_of) == ""
    file = tmp_path / "mine.py"
    digests = []
    for text in ("def step(): return 1\n", "def step(): return 2\n"):
        file.write_text(text)
        namespace = {}
        exec(compile(text, str(file), "exec"), namespace)
        digests.append(cells.source_digest(cells.digest, namespace["step"]))
    assert "" not in digests
    assert digests[0] != digests[1]
