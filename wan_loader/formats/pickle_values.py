"""The values that a torch checkpoint's pickle, read as facts, is made of: plain Python values and the inert ones below.

None of them has an attribute that could be set, and all are forgotten with the reading.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Global", "Ledger", "Ordered", "Other", "PickleError", "PickledStorage", "PickledTensor", "kind_of"]


class PickleError(Exception):
    """The pickle is damaged, or none of a checkpoint; the message says how."""


class PickledStorage(NamedTuple):
    """A storage that a persistent id names."""

    key: str
    nbytes: int
    dtype: str


class PickledTensor(NamedTuple):
    """A view of a storage; its numbers are still as the file has them."""

    storage: PickledStorage
    dtype: str
    offset: Any
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]


class Global(NamedTuple):
    """A function, a class or a dtype: nothing but its name, as `module.name`."""

    name: str


class Other(NamedTuple):
    """Something that is neither a tensor nor a plain value; `what` is the name that it was made with."""

    what: str


class Ordered(dict[Any, Any]):
    """An OrderedDict or a Counter. What attributes the file gives it are dropped."""

    __slots__ = ()


def kind_of(value: Any) -> str:
    """Return what a value is, in a word for messages."""
    if type(value) is Other:
        return value.what
    return "OrderedDict" if type(value) is Ordered else type(value).__name__.removeprefix("Pickled")


class Ledger:
    """An account of a reading: what it has cost, which tensors it built, and what torch has to judge."""

    __slots__ = ("cost", "foreign", "most_cost", "tensors")

    def __init__(self, most_cost: int) -> None:
        self.cost = 0
        self.most_cost = most_cost
        self.foreign: str | None = None
        self.tensors: list[PickledTensor] = []

    def charge(self, nbytes: int) -> None:
        """Pay for memory that a value of any length takes, before it is made.

        Raises:
            PickleError: It is too much.
        """
        self.cost += nbytes
        self.check(0)

    def check(self, more: int) -> None:
        """Refuse to go on if what was paid and `more` are too much.

        Raises:
            PickleError: They are.
        """
        if self.cost + more > self.most_cost:
            raise PickleError(f"it takes more than {self.most_cost} bytes of memory")

    def judge(self, what: str) -> None:
        """Remember that only torch can say whether this is harmless."""
        if self.foreign is None:
            self.foreign = what
