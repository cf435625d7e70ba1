"""A pickle interpreter that can make nothing but plain values.

Why not pickle.Unpickler with a find_class of our own: its BUILD can rewrite the attributes of whatever
find_class hands out, and a file of 20 bytes can make its memo take gigabytes. Here every opcode torch.save
writes is in a table at the end, everything else is refused, and only a `Constructor` can be called.
The opcodes are described in Python's pickletools module.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapterkit.errors import StoreError, UnsafeFile
from adapterkit.stores.base import Limits
from adapterkit.stores.guards import shown

_ASK_FOR_TENSORS = "ask for a safetensors file, or save only `model.state_dict()`"


@dataclass(frozen=True, slots=True)
class Constructor:
    """Something a pickle may call: the name it goes by, and what is done instead.

    make raises ValueError or TypeError for arguments that do not fit.
    """

    name: str
    make: Callable[..., object]


class World(Protocol):
    """What lies outside the pickle."""

    def find(self, module: str, name: str) -> object:
        """What a global stands for; None if a tensor file has no need of it."""

    def storage(self, identity: object) -> object:
        """What a persistent id stands for; ValueError if it is not a storage."""

    def set_state(self, value: object, state: object) -> bool:
        """Give a made value its state; False if it takes none."""


def run_pickle(
    data: memoryview, world: World, where: str, limits: Limits, start: int = 0
) -> tuple[object, int]:
    """The value a pickle makes, and the position after it.

    UnsafeFile names a global or opcode that tensor files have no need of; StoreError means damage.
    """
    machine = _Machine(data, world, where, start)
    try:
        for _ in range(limits.opcodes):
            code = machine.byte()
            if code == _STOP:
                return machine.result(), machine.position
            step = _STEPS.get(code)
            if step is None:
                raise _refusal(where, f"uses the opcode `{_opcode_name(code)}`", _opcode_name(code))
            step(machine)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise StoreError(
            f"{where}: its pickle is damaged near byte {machine.position}: {shown(error)[:100]}",
            code="pickle",
            details={"byte": machine.position},
        ) from None
    raise StoreError(f"{where}: its pickle has more than {limits.opcodes} steps", code="limit")


def _refusal(where: str, what: str, wanted: str) -> UnsafeFile:
    return UnsafeFile(
        f"{where}: refused, nothing was run: its pickle {what}, which tensor files have no need of",
        hint=_ASK_FOR_TENSORS,
        details={"wanted": wanted},
    )


def _opcode_name(code: int) -> str:
    return _NAMES.get(code, f"0x{code:02x}")


class _Mark:
    """Stands on the stack where a run of items begins."""


_MARK = _Mark()


class _Machine:
    """The stack, the memo and the reading position of one pickle."""

    def __init__(self, data: memoryview, world: World, where: str, start: int) -> None:
        self.data = data
        self.position = start
        self.world = world
        self.where = where
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} bytes are promised, fewer are there")
        self.position += count
        return bytes(self.data[self.position - count : self.position])

    def integer(self, width: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def text(self, width: int) -> str:
        """Text preceded by its length, a number of `width` bytes."""
        return self.take(self.integer(width)).decode("utf-8")

    def line(self) -> str:
        # No name in a tensor file is anywhere near this long.
        start = bytes(self.data[self.position : self.position + 1024])
        end = start.index(b"\n")
        self.position += end + 1
        return start[:end].decode("utf-8")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("an item is missing")
        return value

    def pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        items.reverse()
        return items

    def pop_pair(self) -> list[object]:
        value = self.pop()
        return [self.pop(), value]

    def result(self) -> object:
        value = self.pop()
        if self.stack:
            raise ValueError("values are left over")
        return value

    def check_protocol(self) -> None:
        if self.byte() not in range(2, 6):
            raise ValueError("unknown protocol")

    def skip_frame(self) -> None:
        # A frame only says how much to read ahead; all of it is in reach already.
        self.integer(8)

    def push_float(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0])

    def push_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("only a list takes items")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("only a dictionary takes pairs")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing deeply nested tuples would overrun the C stack, so no containers as keys.
            if isinstance(key, tuple | list | dict):
                raise ValueError("a container is used as a key")
            target[key] = value

    def find_by_lines(self) -> None:
        module = self.line()
        self.find(module, self.line())

    def find_by_stack(self) -> None:
        name = self.pop()
        self.find(self.pop(), name)

    def find(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global's name is not text")
        found = self.world.find(module, name)
        if found is None:
            wanted = shown(f"{module}.{name}")[:200]
            raise _refusal(self.where, f"would use `{wanted}`", wanted)
        self.push(found)

    def refuse_instance(self) -> None:
        # What protocol 0 used to call a class; known here only to say which one.
        wanted = shown(f"{self.line()}.{self.line()}")
        raise _refusal(self.where, f"would call `{wanted}`", wanted)

    def call(self) -> None:
        arguments, callee = self.pop(), self.pop()
        if not isinstance(callee, Constructor):
            raise _refusal(self.where, f"would call {_described(callee)}", _described(callee))
        if not isinstance(arguments, tuple):
            raise ValueError("arguments are not a tuple")
        self.push(callee.make(*arguments))

    def set_state(self) -> None:
        state = self.pop()
        value = self.stack[-1]
        if not self.world.set_state(value, state):
            raise _refusal(self.where, f"would change {_described(value)}", _described(value))

    def push_storage(self) -> None:
        self.push(self.world.storage(self.pop()))


def _described(value: object) -> str:
    # Never the value itself: a small pickle can make one that takes for ever to print.
    return f"`{value.name}`" if isinstance(value, Constructor) else f"a {type(value).__name__}"


_BY_NAME: dict[str, Callable[[_Machine], None]] = {
    "PROTO": _Machine.check_protocol,
    "FRAME": _Machine.skip_frame,
    "MARK": lambda m: m.push(_MARK),
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    "BININT": lambda m: m.push(m.integer(4, signed=True)),
    "BININT1": lambda m: m.push(m.integer(1)),
    "BININT2": lambda m: m.push(m.integer(2)),
    "LONG1": lambda m: m.push(m.integer(m.byte(), signed=True)),
    "BINFLOAT": _Machine.push_float,
    "SHORT_BINUNICODE": lambda m: m.push(m.text(1)),
    "BINUNICODE": lambda m: m.push(m.text(4)),
    "BINUNICODE8": lambda m: m.push(m.text(8)),
    # Python 2 wrote its strings so.
    "SHORT_BINSTRING": lambda m: m.push(m.text(1)),
    "BINSTRING": lambda m: m.push(m.text(4)),
    "SHORT_BINBYTES": lambda m: m.push(m.take(m.integer(1))),
    "BINBYTES": lambda m: m.push(m.take(m.integer(4))),
    "EMPTY_LIST": lambda m: m.push([]),
    "EMPTY_DICT": lambda m: m.push({}),
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE1": lambda m: m.push_tuple(1),
    "TUPLE2": lambda m: m.push_tuple(2),
    "TUPLE3": lambda m: m.push_tuple(3),
    "TUPLE": lambda m: m.push(tuple(m.pop_to_mark())),
    "APPEND": lambda m: m.append([m.pop()]),
    "APPENDS": lambda m: m.append(m.pop_to_mark()),
    "SETITEM": lambda m: m.set_items(m.pop_pair()),
    "SETITEMS": lambda m: m.set_items(m.pop_to_mark()),
    "BINPUT": lambda m: m.remember(m.integer(1)),
    "LONG_BINPUT": lambda m: m.remember(m.integer(4)),
    "MEMOIZE": lambda m: m.remember(len(m.memo)),
    "BINGET": lambda m: m.push(m.memo[m.integer(1)]),
    "LONG_BINGET": lambda m: m.push(m.memo[m.integer(4)]),
    "GLOBAL": _Machine.find_by_lines,
    "STACK_GLOBAL": _Machine.find_by_stack,
    "INST": _Machine.refuse_instance,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.push_storage,
}
_CODES = {op.name: ord(op.code) for op in pickletools.opcodes}
_NAMES = {code: name for name, code in _CODES.items()}
_STEPS = {_CODES[name]: step for name, step in _BY_NAME.items()}
_STOP = _CODES["STOP"]
