"""A machine for pickles that runs nothing: opcodes in, a tree of plain values out.

A pickle is a program: its GLOBAL opcodes may fetch any importable object and its REDUCE opcodes
call it. Python's unpickler can be kept from foreign objects by `find_class`, but not from a tuple
nested so deep that its hash ends the process, nor from a memo index that takes gigabytes. So
`pickletools` decodes the opcodes here, and the few that picklers write work on lists and dicts:

* a global is looked up in a table by its two names and refused by name where it is not there; a
  `Call` of the table is a small pure function, an `Inert` stands for what does not matter;
* the memo is a dict, integers have at most 32 bytes, texts and opcodes are counted;
* a key of a dict is text, a number, or a flat tuple of those.
"""

from __future__ import annotations

import gc
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from jaximm.models.weights.errors import Refusal, shown

Unpickled = Any
"""What stands in a file of untrusted bytes: an object of any kind, looked at before it is used."""

OPCODES = 500_000
"""A pickle may have: a tensor takes about 25. So many take a second."""

_TEXT = 16 << 20
_INT_BITS = 256


class Source(Protocol):
    """What `pickletools.genops` reads from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes."""
        ...

    def readline(self) -> bytes:
        """Up to and with the next newline."""
        ...


class Call(NamedTuple):
    """A function that a pickle may call and cannot alter."""

    fun: Callable[..., Unpickled]


class Inert:
    """Stands for a harmless object, or its class: holds nothing, and calling it runs nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Fillable:
    """Stands for an object whose state a pickle gives by BUILD."""

    __slots__ = ()

    def fill(self, state: Unpickled) -> None:
        """Takes the state over.

        Raises:
          Refusal: it is malformed.
        """
        raise NotImplementedError


def run(
    source: Source,
    table: Mapping[tuple[str, str], Unpickled],
    persistent: Callable[[Unpickled], Unpickled] | None = None,
) -> Unpickled:
    """The object of the next pickle in `source`, which is read up to its STOP and not further.

    Args:
      source: bytes.
      table: what each global stands for.
      persistent: of what stands outside the pickle, by its id; None: there is no such thing.

    Raises:
      Refusal: a global that is not in the table; more than may be; opcodes that do not fit.
      ValueError: from `pickletools`: opcodes or arguments that are none.
    """
    machine = _Machine(table, persistent)
    collects = gc.isenabled()
    # Nothing dies here, and each of many new containers may start a pass over the whole heap.
    gc.disable()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(source)):  # pyrefly: ignore[bad-argument-type]
            if count >= OPCODES:
                raise Refusal(f"it has more than {OPCODES} opcodes", _ONLY_WEIGHTS)
            if opcode.name not in _STEPS:
                raise Refusal(f"the opcode {opcode.name} is not read", _ONLY_WEIGHTS)
            _STEPS[opcode.name](machine, argument)
        return machine.pop()
    except (IndexError, KeyError, TypeError):
        # Not chained: whoever printed these might print what the pickle holds, without an end.
        raise Refusal("its opcodes do not fit together") from None
    finally:
        if collects:
            gc.enable()


_ONLY_WEIGHTS = "save only the weights, torch.save(model.state_dict(), path), or safetensors"


class _Machine:
    """A stack, those below the marks, and a memo."""

    def __init__(self, table: Mapping[tuple[str, str], Unpickled], persistent: Unpickled):
        self.table, self.persistent = table, persistent
        self.stack: list[Unpickled] = []
        self.below: list[list[Unpickled]] = []
        self.memo: dict[int, Unpickled] = {}

    def push(self, value: Unpickled) -> None:
        self.stack.append(value)

    def pop(self) -> Unpickled:
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Unpickled]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def find(self, module: Unpickled, name: Unpickled) -> Unpickled:
        if type(module) is not str or type(name) is not str:
            raise Refusal("it names a global by something that is no text")
        if (module, name) not in self.table:
            raise Refusal(
                f"it names the global {shown(module)}.{shown(name)}, which is not allowed; "
                "nothing was run",
                _ONLY_WEIGHTS,
            )
        return self.table[module, name]

    def call(self, fun: Unpickled, arguments: Unpickled) -> None:
        if type(fun) is Inert:
            self.push(Inert(fun.name))
        elif type(fun) is Call and type(arguments) is tuple:
            self.push(fun.fun(*arguments))
        else:
            raise Refusal(f"it calls a {type(fun).__name__}")


def _constant(value: Unpickled) -> Callable[[_Machine, Unpickled], None]:
    return lambda machine, argument: machine.push(value)


def _value(machine: _Machine, argument: Unpickled) -> None:
    if type(argument) is int and argument.bit_length() > _INT_BITS:
        raise Refusal(f"it holds an integer of {argument.bit_length()} bits")
    if type(argument) is str and len(argument) > _TEXT:
        raise Refusal(f"it holds a text of {len(argument)} characters")
    machine.push(argument)


def _tuple(count: int) -> Callable[[_Machine, Unpickled], None]:
    def step(machine: _Machine, argument: Unpickled) -> None:
        if len(machine.stack) < count:
            raise IndexError
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return step


def _put(machine: _Machine, argument: int) -> None:
    machine.memo[argument] = machine.stack[-1]


def _memoize(machine: _Machine, argument: Unpickled) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, argument: int) -> None:
    machine.push(machine.memo[argument])


def _pop(machine: _Machine, argument: Unpickled) -> None:
    # As Python's: on an empty stack it takes the mark away.
    if machine.stack:
        machine.pop()
    else:
        machine.since_mark()


def _pop_mark(machine: _Machine, argument: Unpickled) -> None:
    machine.since_mark()


def _append(machine: _Machine, items: list[Unpickled]) -> None:
    target = machine.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is not Inert:
        raise Refusal(f"it appends to a {type(target).__name__}")


def _set(machine: _Machine, items: list[Unpickled]) -> None:
    target = machine.stack[-1]
    if type(target) is Inert:
        return
    if type(target) is not dict:
        raise Refusal(f"it sets items of a {type(target).__name__}")
    for index in range(0, len(items), 2):
        target[checked_key(items[index])] = items[index + 1]


def checked_key(key: Unpickled) -> Unpickled:
    """A key of a dict, if hashing and comparing it is quick.

    Raises:
      Refusal: it is not.
    """
    if type(key) is tuple and len(key) <= 8 and not any(type(part) is tuple for part in key):
        for part in key:
            checked_key(part)
        return key
    # Integers beyond 64 bits can be made to collide.
    if type(key) is int and key.bit_length() > 64:
        raise Refusal(f"a key of a dict is an integer of {key.bit_length()} bits", _ONLY_WEIGHTS)
    if key is not None and type(key) not in (str, bytes, int, float, bool, Inert):
        raise Refusal(f"a key of a dict is a {type(key).__name__}", _ONLY_WEIGHTS)
    return key


def _build(machine: _Machine, argument: Unpickled) -> None:
    state, target = machine.pop(), machine.stack[-1]
    if isinstance(target, Fillable):
        target.fill(state)
    # The attributes of a dict (torch's versions of modules) and of what stands for nothing.
    elif type(target) not in (dict, Inert):
        raise Refusal(f"it sets attributes of a {type(target).__name__}")


def _stack_global(machine: _Machine, argument: Unpickled) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(machine.find(module, name))


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.push(machine.find(module, name))


def _reduce(machine: _Machine, argument: Unpickled) -> None:
    arguments, fun = machine.pop(), machine.pop()
    machine.call(fun, arguments)


def _newobj_ex(machine: _Machine, argument: Unpickled) -> None:
    keywords, arguments, fun = machine.pop(), machine.pop(), machine.pop()
    if type(keywords) is not dict or (keywords and type(fun) is not Inert):
        raise Refusal("it calls something by keywords")
    machine.call(fun, arguments)


def _inst(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.call(machine.find(module, name), tuple(machine.since_mark()))


def _obj(machine: _Machine, argument: Unpickled) -> None:
    fun, *arguments = machine.since_mark()
    machine.call(fun, tuple(arguments))


def _persistent(machine: _Machine, argument: Unpickled) -> None:
    if machine.persistent is None:
        raise Refusal("it refers to something outside")
    machine.push(machine.persistent(machine.pop()))


def _dict(machine: _Machine, argument: Unpickled) -> None:
    items = machine.since_mark()
    machine.push({})
    _set(machine, items)


def _frozenset(machine: _Machine, argument: Unpickled) -> None:
    machine.since_mark()
    machine.push(Inert("frozenset"))


_STEPS: dict[str, Callable[[_Machine, Unpickled], None]] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "STOP": lambda machine, argument: None,
    **dict.fromkeys(
        (
            *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT"),
            *("BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE"),
            *("SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
            "BYTEARRAY8",
        ),
        _value,
    ),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_LIST": lambda machine, argument: machine.push([]),
    "EMPTY_DICT": lambda machine, argument: machine.push({}),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_SET": lambda machine, argument: machine.push(Inert("set")),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "MARK": lambda machine, argument: machine.mark(),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.since_mark())),
    "LIST": lambda machine, argument: machine.push(machine.since_mark()),
    "DICT": _dict,
    "FROZENSET": _frozenset,
    "APPEND": lambda machine, argument: _append(machine, [machine.pop()]),
    "APPENDS": lambda machine, argument: _append(machine, machine.since_mark()),
    "ADDITEMS": lambda machine, argument: _append(machine, machine.since_mark()),
    "SETITEM": lambda machine, argument: _set(machine, [machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, argument: _set(machine, machine.since_mark()),
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, argument: machine.push(machine.stack[-1]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": _inst,
    "OBJ": _obj,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _newobj_ex,
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
