"""Which variables of the environment imports have looked at: whoever has others is no program for their forks.

What Python code asks of `os.environ` is seen. What libraries in C ask of the environment is not, so the families of
variables that they are known to read when they are loaded count as read.
"""

from __future__ import annotations

import ast
import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["NOT_COMPARED", "comes_late", "different", "names_set", "recorded_reads", "watch_writes"]

#: Read in C: by the interpreter and its C library when they start,
_READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "GLIBC_")
#: and by libraries of threads and of linear algebra, and by torch's own, when they are loaded.
_READ_BY_LIBRARIES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "PYTORCH_", "NVIDIA_TF32_OVERRIDE")
#: Given to a process later (`world` sets the number of threads, `sys.stdout`), or set by ourselves for the imports.
NOT_COMPARED = frozenset(
    ("OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTORCH_NVML_BASED_CUDA_CHECK", "WAN_LOADER_ACCELERATE")
)
_SETTERS = ("setdefault", "update", "pop")

_Environ: Any = type(os.environ)


class _Recording(_Environ):  # type: ignore[misc]
    """The environment of this process while reads of it are recorded; a walk through all of it is none."""

    def __getitem__(self, name: str) -> str:
        if not _walks(sys._getframe(1)):
            _reads.add(name)
        return str(super().__getitem__(name))

    def __setitem__(self, name: str, value: str) -> None:
        _reads.add(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        _reads.add(name)
        super().__delitem__(name)

    def keys(self) -> Any:
        frame = sys._getframe(1)
        _walked.add((frame.f_code, frame.f_lineno))
        return super().keys()

    def items(self) -> Any:
        return self.copy().items()

    def values(self) -> Any:
        return self.copy().values()

    def copy(self) -> dict[str, str]:
        return {self.decodekey(key): self.decodevalue(value) for key, value in self._data.items()}


_reads: set[str] = set()
_walked: set[tuple[Any, int]] = set()


def _walks(frame: Any) -> bool:
    """Say whether a line goes through all variables, as `dict(os.environ)` does."""
    return (frame.f_code, frame.f_lineno) in _walked


@contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """Record the names that are read, or set, in the body."""
    os.environ.__class__ = _Recording
    try:
        yield _reads
    finally:
        os.environ.__class__ = _Environ


def different(reads: set[str], before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Name a variable that has been read with one value, and now has another; nothing if there is none."""
    in_c = {name for name in (*before, *now) if name.startswith(_READ_AT_START + _READ_BY_LIBRARIES)}
    wrong = (name for name in sorted((reads | in_c) - NOT_COMPARED) if before.get(name) != now.get(name))
    return next(wrong, "")


def comes_late(name: str, reads: set[str]) -> bool:
    """Say whether a program that sets a variable is too late, as imports have looked at it."""
    return name in reads or name.startswith(_READ_BY_LIBRARIES)


def names_set(source: str) -> list[str]:
    """Name the variables of the environment that a program sets by their literal names."""
    found: set[str] = set()
    with suppress(SyntaxError, ValueError, RecursionError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and _is_environ(node.value):
                found |= _texts(node.slice)
            elif isinstance(node, ast.Call) and _is_setter(node.func):
                found.update(text for part in node.args for text in _texts(part))
                found.update(word.arg for word in node.keywords if word.arg)
    return sorted(found)


def _is_setter(node: ast.AST) -> bool:
    """Say whether a function is one that sets variables."""
    if not isinstance(node, ast.Attribute):
        return False
    return node.attr in ("putenv", "unsetenv") or (node.attr in _SETTERS and _is_environ(node.value))


def _is_environ(node: ast.AST) -> bool:
    return "environ" in (getattr(node, "attr", ""), getattr(node, "id", ""))


def _texts(node: ast.AST) -> set[str]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def watch_writes(reads: set[str], tell: Callable[[str], None]) -> None:
    """Call a function with the name of each variable that this process sets though it has been read already."""

    class Watched(_Environ):  # type: ignore[misc]
        def __setitem__(self, name: str, value: str) -> None:
            if comes_late(name, reads) and self.get(name) != value:
                tell(name)
            super().__setitem__(name, value)

        def __delitem__(self, name: str) -> None:
            if comes_late(name, reads) and name in self:
                tell(name)
            super().__delitem__(name)

    os.environ.__class__ = Watched
