r"""A model as the program that it is: what whoever holds its code can read and change in it.

`Walk` evaluates a traced ``features_fn(params, x)`` equation by equation, with its true derivatives
and with everything in sight:

- custom derivatives, stopped gradients and rounding: what is inside a custom rule is evaluated
  itself, a stopped gradient flows, and rounding is passed straight through (BPDA: Athalye,
  Carlini, Wagner 2018, https://arxiv.org/abs/1802.00420). Whole-numbered weights are carried as
  real numbers for that.
- *constants*: arrays of real numbers that depend neither on the parameters nor on the inputs,
  where they meet what does; weights in a closure, in a literal, decoded or drawn from a fixed key.
- *gates*: comparisons of the weights alone, or of one number for all: a checksum, a seal, a
  password, whatever is then chosen or multiplied by their answer. Both sides of a choice are
  evaluated, whichever is taken.
- *units*: activations, with what enters them. Those that come out alike for all rows while what
  enters does not are dead. *Lifts* are the same for activations of weights alone.
- *noise* whose key depends on the inputs; its mean can take its place.
- *taps*: every value with a row for each row of the inputs.

Numbers of constants, gates, units, lifts and taps count along the program, so they are the same for
every number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
     "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
)  # fmt: skip
"""Equations that hold a program of their own, evaluated in place."""

RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})

STRAIGHT = frozenset({"round", "floor", "ceil"})
"""Steps whose derivative is taken to be 1."""

OPAQUE = frozenset({"pure_callback", "io_callback", "custom_call", "ffi_call", "xla_pmap"})
"""What computes out of sight."""

COMPARISONS: frozenset[str] = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})

ACTIVATIONS = frozenset({"max", "min", "tanh", "logistic", "erf", "erfc"})

SHAPES = frozenset(
    {"broadcast_in_dim", "reshape", "squeeze", "transpose", "convert_element_type", "not", "copy",
     "expand_dims", "stop_gradient", "reduce_precision"}
)  # fmt: skip
"""What gives the numbers that it gets: no tap of its own, and alike where they are alike."""

_CARRIES = frozenset(
    {"add", "sub", "mul", "neg", "max", "min", "select_n", "reshape", "broadcast_in_dim", "squeeze",
     "transpose", "concatenate", "slice", "dot_general", "reduce_sum", "dynamic_slice", "pad"}
)  # fmt: skip
"""What takes a whole number carried as a real one."""


class Value(NamedTuple):
    """A number of the program, and what it depends on.

    ``alike``: one number, or one repeated.
    """

    array: Any
    of_params: bool = False
    of_inputs: bool = False
    alike: bool = False


@dataclasses.dataclass(eq=False)
class Walk:
    """One evaluation.

    Attributes:
      rows: of the inputs; what has as many at its front is a tap.
      constants: by number, what takes the place of a constant.
      gates: by number, what is answered whatever the weights say.
      shifts: by number of a unit, (shift, scale) of what enters: ``(a + shift) * scale``.
      lifts: by number, what is added to weights before an activation of weights alone.
      quiet: whether noise that depends on the inputs is replaced by its mean.
      tapped: called with (number, value) at each tap.
      met: called with ("constant" | "gate" | "unit" | "lift" | "rule" | "noise" | "opaque" |
        "stopped", number, values).
    """

    rows: int
    constants: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    gates: Mapping[int, bool] = dataclasses.field(default_factory=dict)
    lifts: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    shifts: Mapping[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    quiet: bool = False
    tapped: Callable[[int, Any], None] | None = None
    met: Callable[[str, int, Any], None] | None = None
    _counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def run(self, closed: Any, params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Outputs of a closed program of (params, inputs), flat."""
        values = [Value(leaf, of_params=True, alike=jnp.size(leaf) == 1) for leaf in params]
        values += [Value(leaf, of_inputs=True) for leaf in inputs]
        return [value.array for value in self._program(closed.jaxpr, closed.consts, values)]

    def _number(self, kind: str) -> int:
        self._counts[kind] = self._counts.get(kind, -1) + 1
        return self._counts[kind]

    def _say(self, kind: str, values: Any = None) -> int:
        number = self._number(kind)
        if self.met is not None:
            self.met(kind, number, values)
        return number

    def _program(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
        known: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                return Value(atom.val, alike=np.size(atom.val) == 1)
            return known[atom]

        for var, const in zip(jaxpr.constvars, consts, strict=True):
            known[var] = Value(const, alike=np.size(const) == 1)
        known |= dict(zip(jaxpr.invars, values, strict=True))
        last = {
            atom: place for place, one in enumerate(jaxpr.eqns) for atom in _variables(one.invars)
        }
        kept = set(_variables(jaxpr.outvars))
        for place, equation in enumerate(jaxpr.eqns):
            outputs = self._equation(equation, [read(atom) for atom in equation.invars])
            known |= dict(zip(equation.outvars, outputs, strict=True))
            for atom in {*_variables(equation.invars), *equation.outvars} - kept:
                if last.get(atom, place) == place:  # nothing reads it again
                    known.pop(atom, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, values: list[Value]) -> list[Value]:
        name, parameters = equation.primitive.name, equation.params
        if name in CALLS:
            if name in RULES:
                self._say("rule")
            inner = next(
                parameters[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in parameters
            )
            # A program with its constants, or (in remat) without any.
            jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            return self._program(jaxpr, consts, values)
        if name == "cond":
            return self._cond(equation, values)
        if name in OPAQUE:
            self._say("opaque")
        values = self._with_constants(values)
        dependent = dict(
            of_params=any(value.of_params for value in values),
            of_inputs=any(value.of_inputs for value in values),
        )
        alike = all(value.alike for value in values)
        if name == "random_bits" and dependent["of_inputs"]:
            self._say("noise")
            if self.quiet:
                shape, bits = equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype
                middle = jnp.full(shape, 1 << (jnp.iinfo(bits).bits - 1), bits)
                return [Value(middle)]
        if name in ACTIVATIONS:
            values = self._entering(values)
        of_weights = dependent["of_params"] and not dependent["of_inputs"]
        if name in ("max", "min") and of_weights:
            values = self._lifted(values)
        arrays = self._evaluate(equation, [value.array for value in values])
        if name in COMPARISONS and dependent["of_params"] and (alike or of_weights):
            number = self._say("gate", arrays[0])
            if number in self.gates:
                answer = jnp.full(jnp.shape(arrays[0]), self.gates[number])
                return [Value(answer, alike=True)]
        if name in ("max", "min") and of_weights:
            entering = next(value.array for value in values if value.of_params)
            self._say("lift", (entering, arrays[0]))
        outputs = [
            Value(array, **dependent, alike=alike or jnp.size(array) == 1) for array in arrays
        ]
        if dependent["of_inputs"] and name not in SHAPES:
            for output in outputs:
                self._tap(output.array)
        if name in ACTIVATIONS and dependent["of_inputs"]:
            entering = next(value.array for value in values if value.of_inputs)
            self._say("unit", (entering, outputs[0].array))
        return outputs

    def _tap(self, array: Any) -> None:
        if (
            jnp.issubdtype(array.dtype, jnp.floating)
            and array.ndim >= 1
            and array.shape[0] == self.rows
        ):
            number = self._number("tap")
            if self.tapped is not None:
                self.tapped(number, array)

    def _with_constants(self, values: list[Value]) -> list[Value]:
        """Constants that meet what is no constant, or what takes their place."""
        if not any(value.of_params or value.of_inputs for value in values):
            return values
        operands = []
        for value in values:
            if (
                not (value.of_params or value.of_inputs or value.alike)
                and jnp.issubdtype(jnp.result_type(value.array), jnp.floating)
            ):  # fmt: skip
                number = self._say("constant", value.array)
                if number in self.constants:
                    value = Value(self.constants[number], of_params=True)
            operands.append(value)
        return operands

    def _entering(self, values: list[Value]) -> list[Value]:
        """What enters an activation, moved where it is to be."""
        number = self._counts.get("unit", -1) + 1
        if number not in self.shifts or not any(value.of_inputs for value in values):
            return values
        shift, scale = self.shifts[number]
        place = next(at for at, value in enumerate(values) if value.of_inputs)
        value = values[place]
        shape = (1,) * (value.array.ndim - 1) + (-1,)
        shift, scale = (one.astype(value.array.dtype).reshape(shape) for one in (shift, scale))
        moved = (value.array + shift) * scale
        values = list(values)
        values[place] = value._replace(array=moved, of_params=True)
        return values

    def _lifted(self, values: list[Value]) -> list[Value]:
        """Weights before an activation of weights alone, lifted where they are to be."""
        number = self._counts.get("lift", -1) + 1
        if number not in self.lifts:
            return values
        place = next(at for at, value in enumerate(values) if value.of_params)
        value, values = values[place], list(values)
        lift = self.lifts[number].astype(value.array.dtype)
        values[place] = value._replace(array=value.array + lift)
        return values

    def _cond(self, equation: Any, values: list[Value]) -> list[Value]:
        """All sides, of which one is taken."""
        which, *operands = values
        sides = [
            self._program(branch.jaxpr, branch.consts, operands)
            for branch in equation.params["branches"]
        ]
        results = []
        for outputs in zip(*sides, strict=True):
            arrays = [output.array for output in outputs]
            index = jnp.clip(jnp.asarray(which.array, jnp.int32), 0, len(arrays) - 1)
            chosen = arrays[-1]
            for place, array in enumerate(arrays[:-1]):
                chosen = jnp.where(index == place, array, chosen)
            results.append(
                Value(
                    chosen,
                    of_params=which.of_params or any(output.of_params for output in outputs),
                    of_inputs=which.of_inputs or any(output.of_inputs for output in outputs),
                )
            )
        return results

    def _evaluate(self, equation: Any, arrays: list[Any]) -> list[Any]:
        name, parameters = equation.primitive.name, equation.params
        kinds = [atom.aval.dtype for atom in equation.invars]
        carried = [
            jnp.issubdtype(kind, jnp.integer)
            and jnp.issubdtype(jnp.result_type(array), jnp.floating)
            for kind, array in zip(kinds, arrays, strict=True)
        ]
        if name == "stop_gradient":
            self._say("stopped")
            return arrays
        if name == "scan":
            return self._scan(parameters, arrays, kinds)
        if name == "convert_element_type" and any(carried):
            wanted = parameters["new_dtype"]
            if jnp.issubdtype(wanted, jnp.integer):
                return arrays
            if jnp.issubdtype(wanted, jnp.floating):
                return [arrays[0].astype(wanted)]
        if name == "convert_element_type" and _to_whole(kinds[0], parameters["new_dtype"]):
            # Carried on as a real number, so that a derivative gets through.
            return [_straight(jnp.trunc, arrays[0])]
        if any(carried):
            if name in _CARRIES and all(
                jnp.issubdtype(kind, jnp.integer) or name == "select_n" for kind in kinds
            ):
                dtype = next(a.dtype for a, c in zip(arrays, carried, strict=True) if c)
                arrays = [
                    jnp.asarray(array, dtype) if jnp.issubdtype(kind, jnp.integer) else array
                    for array, kind in zip(arrays, kinds, strict=True)
                ]
                if name in ("dot_general",):
                    parameters = parameters | {"preferred_element_type": dtype}
                return [equation.primitive.bind(*arrays, **parameters)]
            arrays = [
                jnp.round(array).astype(kind) if is_carried else array
                for array, kind, is_carried in zip(arrays, kinds, carried, strict=True)
            ]
        arrays = [
            jnp.asarray(array, kind) if jnp.issubdtype(kind, np.number) else array
            for array, kind in zip(arrays, kinds, strict=True)
        ]

        def bound(*arrays: Any) -> Any:
            return equation.primitive.bind(*arrays, **parameters)

        if name in STRAIGHT:
            return [_straight(bound, arrays[0])]
        output = bound(*arrays)
        return list(output) if equation.primitive.multiple_results else [output]

    def _scan(self, parameters: Any, arrays: list[Any], kinds: list[Any]) -> list[Any]:
        """A loop whose body is evaluated by a walk of its own, without taps or edits."""
        closed, fixed, carry = (parameters[key] for key in ("jaxpr", "num_consts", "num_carry"))
        arrays = [
            jnp.asarray(array, kind) if jnp.issubdtype(kind, np.number) else array
            for array, kind in zip(arrays, kinds, strict=True)
        ]
        held = arrays[:fixed]

        def body(state: Any, slices: Any) -> Any:
            inner = Walk(rows=-1, quiet=self.quiet)
            values = [Value(a, of_params=True) for a in (*held, *state, *slices)]
            outputs = [v.array for v in inner._program(closed.jaxpr, closed.consts, values)]
            outputs = [
                jnp.asarray(output, atom.aval.dtype)
                if jnp.issubdtype(atom.aval.dtype, np.number)
                else output
                for output, atom in zip(outputs, closed.jaxpr.outvars, strict=True)
            ]
            return outputs[:carry], outputs[carry:]

        state, stacked = jax.lax.scan(
            body,
            arrays[fixed : fixed + carry],
            arrays[fixed + carry :],
            length=parameters["length"],
            reverse=parameters["reverse"],
            unroll=parameters["unroll"],
        )
        return [*state, *stacked]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _to_whole(kind: Any, wanted: Any) -> bool:
    return jnp.issubdtype(kind, jnp.floating) and jnp.issubdtype(wanted, jnp.integer)


def _straight(fun: Callable[[Any], Any], array: Any) -> Any:
    """The value of `fun`, the derivative of the identity."""
    return array + jax.lax.stop_gradient(fun(array) - array)


def walked(walk: Walk, features_fn: Callable[..., Any], params: Any, x: Any, *, like: Any) -> Any:
    """``features_fn(params, x)`` by a walk.

    Args:
      walk: a new one.
      features_fn, x: the model and its inputs.
      params: real numbers may stand where `like` has whole ones.
      like: parameters as the model takes them.
    """
    shapes = jax.eval_shape(lambda *trees: trees, like, x)
    closed, outputs = jax.make_jaxpr(features_fn, return_shape=True)(*shapes)
    leaves = walk.run(closed, jax.tree.leaves(params), jax.tree.leaves(x))
    return jax.tree.unflatten(jax.tree.structure(outputs), leaves)
