"""Reading of a torch checkpoint's pickle as inert facts: nothing that it names is imported, called or changed.

A pickle is a program for a small stack machine. This one knows the opcodes that picklers write for tensors and plain
containers; its values are Python's None, bool, int, float, complex, str, bytes, tuple, list and dict, and those of
`pickle_values`. What a program makes of names that `pickle_calls` does not know becomes an `Other`: whether it is
harmless is for `torch.load(weights_only=True)` to say, and `Reading.foreign` tells that torch has to be asked.

Memory and time are bounded: what opcodes allocate is charged, and opcodes are counted. With the pickle and the texts in
it, which take as much as they take there, 64 MiB and eight times what was read of the pickle are not exceeded.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.errors import CheckpointError
from wan_loader.formats.pickle_calls import CALLS, KNOWN, check_key
from wan_loader.formats.pickle_values import Global, Ledger, Ordered, Other, PickledTensor, PickleError, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Reading", "read_pickle"]

_BASE_COST, _COST_PER_BYTE = 60 << 20, 6
_BASE_STEPS, _BYTES_PER_STEP = 2_000_000, 4
_STEPS_AT_A_TIME = 2048
_MAX_MARKS = 1000
_MAX_GLOBAL_BYTES = 256
#: What a place in a list takes that grows.
_SLOT = 9
#: What an empty list takes that is freed at the end of its mark.
_MARK = 72
_MISSING = Other("nothing")
_INT4, _UINT4, _FLOAT = struct.Struct("<i"), struct.Struct("<I"), struct.Struct(">d")


class Reading(NamedTuple):
    """The content of a pickle."""

    value: Any
    """The object that the pickle builds."""
    end: int
    """Position in the bytes at which the pickle ended."""
    foreign: str | None
    """The thing that torch has to judge, if there is one."""
    tensors: list[PickledTensor]
    """All tensors that were built, wherever they are."""


def read_pickle(data: bytes, persistent_load: Callable[[Any], Any], start: int = 0) -> Reading:
    """Read the pickle that begins at `start`; `persistent_load` turns a persistent id into a value.

    Raises:
        PickleError: It is damaged, or none of a checkpoint. What else `persistent_load` raises comes through.
    """
    machine = _Machine(data, persistent_load)
    try:
        value, end = machine.run(start)
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error) as error:
        # it is a ValueError, too, and what persistent_load raised
        if isinstance(error, CheckpointError):
            raise
        raise PickleError(f"{type(error).__name__}: {error}") from None
    return Reading(value, end, machine.foreign, machine.tensors)


class _Machine(Ledger):
    __slots__ = ("below", "data", "marks", "memo", "persistent_load", "stack")

    def __init__(self, data: bytes, persistent_load: Callable[[Any], Any]) -> None:
        super().__init__(_BASE_COST)
        self.data = data
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.below = 0
        self.memo: list[Any] = []

    def run(self, position: int) -> tuple[Any, int]:
        """Return the value that the program stops with, and where it stops."""
        data, table, start, steps = self.data, _TABLE, position, 0
        try:
            while steps <= _BASE_STEPS + (position - start) // _BYTES_PER_STEP:
                # limits are looked at once for so many opcodes: each look would cost as much as an opcode
                for _ in range(_STEPS_AT_A_TIME):
                    # IndexError at the end of the bytes: a pickle that does not stop is damaged
                    position = table[data[position]](self, position + 1)
                steps += _STEPS_AT_A_TIME
                # the allowance grows with what was read: a long pickle may cost more than a short one
                self.most_cost = _BASE_COST + _COST_PER_BYTE * (position - start)
                self.check(_SLOT * (self.below + len(self.stack)))
        except _Stop as stop:
            return stop.value, stop.end
        raise PickleError(f"it has more than {steps} steps")

    def pop_mark(self) -> list[Any]:
        """Return what was pushed since the last mark."""
        items = self.stack
        self.stack = self.marks.pop()
        self.cost -= _MARK
        self.below -= len(self.stack)
        return items

    def put_ahead(self, index: int) -> None:
        """Remember the top of the stack under a number that is not the next one."""
        missing = index - len(self.memo)
        if missing > 0:
            # before the list grows: four bytes of the file ask for 4 G places
            self.charge(_SLOT * missing)
            self.judge("its pickle does not count its values one by one")
            self.memo += [_MISSING] * missing
            self.memo.append(self.stack[-1])
        else:
            self.memo[index] = self.stack[-1]


class _Stop(Exception):
    """The program ended. Never leaves this module."""

    def __init__(self, value: Any, end: int) -> None:
        self.value = value
        self.end = end


# Opcodes: each gets the machine and the position behind itself, and returns the position of the next.
# The costs are what CPython 3.11 allocates, or a little more.


def _refused(m: _Machine, position: int) -> int:
    raise PickleError(f"opcode {m.data[position - 1]:#04x} is none of a checkpoint")


def _stop(m: _Machine, position: int) -> int:
    raise _Stop(m.stack.pop(), position)


def _proto(m: _Machine, position: int) -> int:
    return position + 1


def _frame(m: _Machine, position: int) -> int:
    return position + 8


def _mark(m: _Machine, position: int) -> int:
    if len(m.marks) >= _MAX_MARKS:
        raise PickleError(f"it nests more than {_MAX_MARKS} deep")
    m.cost += _MARK
    m.below += len(m.stack)
    m.marks.append(m.stack)
    m.stack = []
    return position


def _constant(value: Any) -> Callable[[_Machine, int], int]:
    def push(m: _Machine, position: int) -> int:
        m.stack.append(value)
        return position

    return push


def _int1(m: _Machine, position: int) -> int:
    m.stack.append(m.data[position])
    return position + 1


def _int2(m: _Machine, position: int) -> int:
    m.cost += 32
    m.stack.append(m.data[position] | m.data[position + 1] << 8)
    return position + 2


def _int4(m: _Machine, position: int) -> int:
    m.cost += 32
    m.stack.append(_INT4.unpack_from(m.data, position)[0])
    return position + 4


def _long1(m: _Machine, position: int) -> int:
    end = position + 1 + m.data[position]
    m.cost += 32
    m.stack.append(int.from_bytes(m.data[position + 1 : end], "little", signed=True))
    return end


def _float(m: _Machine, position: int) -> int:
    m.cost += 24
    m.stack.append(_FLOAT.unpack_from(m.data, position)[0])
    return position + 8


def _text1(m: _Machine, position: int) -> int:
    end = position + 1 + m.data[position]
    m.stack.append(_text(m, position + 1, end))
    return end


def _text4(m: _Machine, position: int) -> int:
    start = position + 4
    end = start + int.from_bytes(m.data[position:start], "little")
    m.stack.append(_text(m, start, end))
    return end


def _text(m: _Machine, start: int, end: int) -> str:
    # as Python unpickles; whether a name is text is for the reader of names to say
    text = m.data[start:end].decode("utf-8", "surrogatepass")
    # ASCII takes a byte a character, anything else up to four
    m.cost += 56 if len(text) == end - start else 80 + 4 * len(text)
    return text


def _bytes1(m: _Machine, position: int) -> int:
    end = position + 1 + m.data[position]
    m.cost += 40
    m.stack.append(m.data[position + 1 : end])
    return end


def _bytes4(m: _Machine, position: int) -> int:
    start = position + 4
    end = start + int.from_bytes(m.data[position:start], "little")
    m.cost += 40
    m.stack.append(m.data[start:end])
    return end


def _list(m: _Machine, position: int) -> int:
    m.cost += 72
    m.stack.append([])
    return position


def _dict(m: _Machine, position: int) -> int:
    m.cost += 80
    m.stack.append({})
    return position


def _tuple(m: _Machine, position: int) -> int:
    items = m.pop_mark()
    m.cost += 56 + 8 * len(items)
    m.stack.append(tuple(items))
    return position


def _tuple1(m: _Machine, position: int) -> int:
    m.cost += 64
    m.stack[-1] = (m.stack[-1],)
    return position


def _tuple2(m: _Machine, position: int) -> int:
    m.cost += 72
    last = m.stack.pop()
    m.stack[-1] = (m.stack[-1], last)
    return position


def _tuple3(m: _Machine, position: int) -> int:
    m.cost += 80
    last, middle = m.stack.pop(), m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)
    return position


def _put(m: _Machine, position: int) -> int:
    return _remember(m, m.data[position], position + 1)


def _put4(m: _Machine, position: int) -> int:
    index = _UINT4.unpack_from(m.data, position)[0]
    if index == len(m.memo):  # a quarter of all opcodes: one call less
        m.cost += _SLOT
        m.memo.append(m.stack[-1])
        return position + 4
    return _remember(m, index, position + 4)


def _memoize(m: _Machine, position: int) -> int:
    return _remember(m, len(m.memo), position)


def _remember(m: _Machine, index: int, position: int) -> int:
    m.cost += _SLOT
    if index == len(m.memo):  # as all picklers count
        m.memo.append(m.stack[-1])
    else:
        m.put_ahead(index)
    return position


def _get(m: _Machine, position: int) -> int:
    m.stack.append(m.memo[m.data[position]])
    return position + 1


def _get4(m: _Machine, position: int) -> int:
    m.stack.append(m.memo[_UINT4.unpack_from(m.data, position)[0]])
    return position + 4


def _append(m: _Machine, position: int) -> int:
    return _extend(m, position, [m.stack.pop()])


def _appends(m: _Machine, position: int) -> int:
    return _extend(m, position, m.pop_mark())


def _extend(m: _Machine, position: int, items: list[Any]) -> int:
    container = m.stack[-1]
    if type(container) is list:
        m.cost += _SLOT * len(items)
        container += items
    elif type(container) is Other:
        m.judge(f"its pickle appends to a {container.what}")
    else:
        raise PickleError(f"it appends to a {kind_of(container)}")
    return position


def _set_item(m: _Machine, position: int) -> int:
    value = m.stack.pop()
    return _update(m, position, [m.stack.pop(), value])


def _set_items(m: _Machine, position: int) -> int:
    return _update(m, position, m.pop_mark())


def _update(m: _Machine, position: int, items: list[Any]) -> int:
    container = m.stack[-1]
    if len(items) % 2:
        raise PickleError("a key has no value")
    if type(container) is Other:
        m.judge(f"its pickle sets an item of a {container.what}")
        return position
    if type(container) is not dict and type(container) is not Ordered:
        raise PickleError(f"it sets an item of a {kind_of(container)}")
    m.cost += 50 * len(items)
    values = iter(items)
    for key in values:
        if type(key) is not str:
            check_key(m, key)
        container[key] = next(values)
    return position


def _add_items(m: _Machine, position: int) -> int:
    items = m.pop_mark()
    # sets are not kept, as nothing asks for their items; but what goes into them is checked
    if m.stack[-1] != Other("set"):
        raise PickleError(f"it adds to a {kind_of(m.stack[-1])}")
    for item in items:
        check_key(m, item)
    return position


def _frozen_set(m: _Machine, position: int) -> int:
    for item in m.pop_mark():
        check_key(m, item)
    m.stack.append(Other("frozenset"))
    return position


def _global(m: _Machine, position: int) -> int:
    # ValueError without a line end near: the length is limited before anything is decoded
    middle = m.data.index(b"\n", position, position + _MAX_GLOBAL_BYTES)
    end = m.data.index(b"\n", middle + 1, middle + 1 + _MAX_GLOBAL_BYTES)
    m.stack.append(_named(m, m.data[position:middle].decode(), m.data[middle + 1 : end].decode()))
    return end + 1


def _stack_global(m: _Machine, position: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str or max(len(name), len(module)) > _MAX_GLOBAL_BYTES:
        raise PickleError("a name is no text")
    m.stack.append(_named(m, module, name))
    return position


def _named(m: _Machine, module: str, name: str) -> Global:
    m.cost += 200
    # the name that Python 2 has for it, which protocol 2 keeps
    path = f"{'builtins' if module == '__builtin__' else module}.{name}"
    if path not in KNOWN:
        m.judge(f"its pickle uses {path}")
    return Global(path)


def _persistent_id(m: _Machine, position: int) -> int:
    m.cost += 200
    m.stack[-1] = m.persistent_load(m.stack[-1])
    return position


def _reduce(m: _Machine, position: int) -> int:
    arguments = m.stack.pop()
    called = m.stack[-1]
    if type(called) is not Global or type(arguments) is not tuple:
        raise PickleError("it calls what is no function")
    m.cost += 110
    function = CALLS.get(called.name)
    if function is None:
        m.judge(f"its pickle calls {called.name}")
        m.stack[-1] = Other(called.name)
    else:
        m.stack[-1] = function(m, *arguments)
    return position


def _new_object(m: _Machine, position: int) -> int:
    arguments = m.stack.pop()
    kind = m.stack[-1]
    if type(kind) is not Global or type(arguments) is not tuple:
        raise PickleError("it makes an object of no class")
    m.cost += 100
    if kind.name == "collections.OrderedDict" and not arguments:
        m.stack[-1] = Ordered()
    else:
        m.judge(f"its pickle makes a {kind.name}")
        m.stack[-1] = Other(kind.name)
    return position


def _build(m: _Machine, position: int) -> int:
    state = m.stack.pop()
    container = m.stack[-1]
    if type(container) is Other:
        m.judge(f"its pickle sets the state of a {container.what}")
    elif type(container) is not Ordered or (type(state) is not dict and type(state) is not Ordered):
        raise PickleError(f"it sets the state of a {kind_of(container)}")
    return position


_OPCODES: dict[int, Callable[[_Machine, int], int]] = {
    ord("."): _stop,
    0x80: _proto,
    0x95: _frame,
    ord("("): _mark,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("K"): _int1,
    ord("M"): _int2,
    ord("J"): _int4,
    0x8A: _long1,
    ord("G"): _float,
    ord("X"): _text4,
    0x8C: _text1,
    ord("U"): _text1,
    ord("C"): _bytes1,
    ord("B"): _bytes4,
    ord("]"): _list,
    ord("}"): _dict,
    ord(")"): _constant(()),
    0x8F: _constant(Other("set")),
    0x90: _add_items,
    0x91: _frozen_set,
    ord("t"): _tuple,
    0x85: _tuple1,
    0x86: _tuple2,
    0x87: _tuple3,
    ord("q"): _put,
    ord("r"): _put4,
    0x94: _memoize,
    ord("h"): _get,
    ord("j"): _get4,
    ord("a"): _append,
    ord("e"): _appends,
    ord("s"): _set_item,
    ord("u"): _set_items,
    ord("c"): _global,
    0x93: _stack_global,
    ord("Q"): _persistent_id,
    ord("R"): _reduce,
    0x81: _new_object,
    ord("b"): _build,
}
_TABLE = tuple(_OPCODES.get(code, _refused) for code in range(256))
