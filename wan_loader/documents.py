"""Strict access to the JSON documents of our own: a field of the right type, or an error that names it.

Sessions, results of benches, manifests of the cache, of staged copies and of downloads are untrusted once they lie in
files. `Doc` raises `DocumentError` for what is wrong in one; whoever reads it makes of that the error of his domain.

Numbers are what can be measured: integers of 64 bits, finite floats below `MOST`. Whoever computes with them need not
fear that they overflow, or are none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_loader.errors import CheckpointError, SessionError
from wan_loader.formats.strict_json import parse_object
from wan_loader.system.files import read_capped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.types import StrPath

__all__ = ["MOST", "Doc", "DocumentError", "is_measured", "read_json"]

_MAX_BYTES = 512_000_000
#: Seconds or bytes: nothing that was measured is more.
MOST = 1e18
_LEAST_WHOLE, _MOST_WHOLE = -(1 << 63), (1 << 63) - 1
#: How deep the objects lie in each other that are only shown, or kept.
_MAX_DEPTH = 16


class DocumentError(ValueError):
    """A field of a document is missing or wrong; the message names it, not the file. It does not leave the package."""


def is_measured(value: Any) -> bool:
    """Say whether this is a number, and one that may have been measured."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MOST < value < MOST


def read_json(path: StrPath, what: str) -> dict[str, Any]:
    """Read the object that a JSON file holds.

    Args:
        path: The file.
        what: The remedy for errors: what the file should be.

    Raises:
        SessionError: It is not there, cannot be read, or is no such object.
    """
    try:
        text = read_capped(path, _MAX_BYTES)
        if text is not None:
            return parse_object(text, path=str(path), what="the document", holds_paths=True, takes_nan=True)
    except CheckpointError as error:
        raise SessionError(f"{error}, or {what}", path=path) from error
    except FileNotFoundError as error:
        raise SessionError.because("does not exist", path=path) from error
    except OSError as error:
        raise SessionError.because(f"cannot be read: {error.strerror}", path=path) from error
    raise SessionError.because(f"is larger than {_MAX_BYTES} bytes", what, path=path)


class Doc:
    """A JSON object whose fields are read with their type; a field that is wrong raises `DocumentError`."""

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, dict):
            raise DocumentError(f"{where.rstrip('.') or 'the document'} is not an object")
        self._value: dict[str, Any] = value
        self._where = where

    def _get(self, key: str, kinds: type | tuple[type, ...], what: str) -> Any:
        value = self._value.get(key)
        # True is an int for Python, and no number for JSON
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise DocumentError(f"{self._where}{key} is missing or not {what}")
        return value

    def text(self, key: str) -> str:
        """Return a string."""
        return str(self._get(key, str, "a string"))

    def whole(self, key: str, least: int = 0) -> int:
        """Return an integer of 64 bits, `least` or more."""
        value = int(self._get(key, int, "an integer"))
        if not least <= value <= _MOST_WHOLE:
            raise DocumentError(f"{self._where}{key} is no number that was counted: {_short(value)}")
        return value

    def boolean(self, key: str) -> bool:
        """Return a field that is true or false."""
        return bool(self._get(key, bool, "true or false"))

    def only(self, *keys: str) -> None:
        """Raise unless these are all fields."""
        if set(self._value) != set(keys):
            raise DocumentError(f"{self._where.rstrip('.') or 'the document'} has not exactly {', '.join(keys)}")

    def moment(self, key: str) -> int:
        """Return nanoseconds before or after some moment."""
        return self.whole(key, _LEAST_WHOLE)

    def number(self, key: str, least: float = 0.0) -> float:
        """Return a number that may have been measured, `least` or more."""
        value = self._get(key, (int, float), "a number")
        if not (is_measured(value) and value >= least):
            raise DocumentError(f"{self._where}{key} is {_short(value)}: nobody measured that")
        return float(value)

    def optional_text(self, key: str) -> str | None:
        """Return a string, or None for null."""
        return None if self._value.get(key) is None else self.text(key)

    def optional_whole(self, key: str) -> int | None:
        """Return an integer, or None for null."""
        return None if self._value.get(key) is None else self.whole(key)

    def optional_number(self, key: str) -> float | None:
        """Return a number, or None for null."""
        return None if self._value.get(key) is None else self.number(key)

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """Return one of the allowed strings."""
        if (value := self.text(key)) not in allowed:
            raise DocumentError(f"{self._where}{key} is {_short(value)}, not one of {', '.join(allowed)}")
        return value

    def has(self, key: str) -> bool:
        """Say whether there is such a field: documents of earlier versions lack some."""
        return key in self._value

    def doc(self, key: str) -> Doc:
        """Return an object."""
        return Doc(self._value.get(key), f"{self._where}{key}.")

    def plain(self, key: str) -> dict[str, Any]:
        """Return an object whose fields are only shown."""
        value = self._get(key, dict, "an object")
        self._check_plain(key, value, _MAX_DEPTH)
        return dict(value)

    def _check_plain(self, key: str, value: Any, depth: int) -> None:
        """Raise for what cannot be shown: nonsense of numbers, and what lies too deep."""
        if isinstance(value, (dict, list)):
            if not depth:
                raise DocumentError(f"{self._where}{key} holds objects more than {_MAX_DEPTH} deep")
            for item in value.values() if isinstance(value, dict) else value:
                self._check_plain(key, item, depth - 1)
        elif (isinstance(value, int) and not _LEAST_WHOLE <= value <= _MOST_WHOLE) or (
            isinstance(value, float) and not is_measured(value)
        ):
            raise DocumentError(f"{self._where}{key} holds {_short(value)}: nobody measured that")

    def numbers(self, key: str) -> dict[str, float]:
        """Return an object of numbers."""
        inner = self.doc(key)
        return {name: inner.number(name) for name in inner._value}

    def numbers_of(self, key: str) -> tuple[float, ...]:
        """Return a list of numbers."""
        values = self._get(key, list, "a list")
        if not all(is_measured(v) and v >= 0 for v in values):
            raise DocumentError(f"{self._where}{key} is not a list of numbers that were measured")
        return tuple(map(float, values))

    def optional_doc(self, key: str) -> Doc | None:
        """Return an object, or None for null."""
        return None if self._value.get(key) is None else self.doc(key)

    def docs(self, key: str) -> list[Doc]:
        """Return a list of objects."""
        return [Doc(v, f"{self._where}{key}[{i}].") for i, v in enumerate(self._get(key, list, "a list"))]

    def optional_list(self, key: str) -> list[Any] | None:
        """Return a list, or None for null, whose items nobody has looked at."""
        return None if self._value.get(key) is None else list(self._get(key, list, "a list"))

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        values = self._get(key, list, "a list")
        if not all(isinstance(v, str) for v in values):
            raise DocumentError(f"{self._where}{key} is not a list of strings")
        return tuple(values)

    def rows(self, key: str, width: int, most: int) -> list[list[int]]:
        """Return a list of at most `most` rows, `width` integers each."""
        values = self._get(key, list, "a list")
        if len(values) > most:
            raise DocumentError(f"{self._where}{key} has more than {most} rows")
        for row in values:
            if not isinstance(row, list) or len(row) != width or not all(type(v) is int for v in row):
                raise DocumentError(f"{self._where}{key} has a row that is not {width} integers")
            if min(row) < _LEAST_WHOLE or max(row) > _MOST_WHOLE:
                raise DocumentError(f"{self._where}{key} has a row with a number of more than 64 bits")
        return list(values)


def _short(value: Any) -> str:
    """Return a value as an error shows it: not all of its thousands of digits."""
    text = f"{value:.3g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
