"""Strict access to untrusted JSON: a field of the right type, or a `SessionError` that names it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from wan_loader.errors import SessionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.types import StrPath

__all__ = ["Doc", "read_json"]

_MAX_BYTES = 512_000_000


def read_json(path: StrPath, what: str) -> Any:
    """What a JSON file holds. Raises `SessionError`; `what` says there what the file should be."""
    try:
        with open(path, "rb") as file:  # a device or a pipe has no size beforehand
            text = file.read(_MAX_BYTES + 1)
        if len(text) <= _MAX_BYTES:
            return json.loads(text.decode())
    except FileNotFoundError as error:
        raise SessionError(f"{path} does not exist") from error
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path} is not JSON: damaged, or {what}") from error
    raise SessionError(f"{path} is larger than {_MAX_BYTES} bytes: {what}")


class Doc:
    """A JSON object whose fields are read with their type."""

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, dict):
            raise SessionError(f"{where.rstrip('.') or 'the document'} is not an object")
        self._value: dict[str, Any] = value
        self._where = where

    def _get(self, key: str, kinds: type | tuple[type, ...], what: str) -> Any:
        value = self._value.get(key)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise SessionError(f"{self._where}{key} is missing or not {what}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        return str(self._get(key, str, "a string"))

    def whole(self, key: str) -> int:
        """An integer."""
        return int(self._get(key, int, "an integer"))

    def number(self, key: str) -> float:
        """A finite number."""
        try:
            value = float(self._get(key, (int, float), "a number"))
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise SessionError(f"{self._where}{key} is not a finite number")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string or null."""
        return None if self._value.get(key) is None else self.text(key)

    def optional_whole(self, key: str) -> int | None:
        """An integer or null."""
        return None if self._value.get(key) is None else self.whole(key)

    def optional_number(self, key: str) -> float | None:
        """A number or null."""
        return None if self._value.get(key) is None else self.number(key)

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of the allowed strings."""
        if (value := self.text(key)) not in allowed:
            raise SessionError(f"{self._where}{key} is {value!r}, not one of {', '.join(allowed)}")
        return value

    def doc(self, key: str) -> Doc:
        """An object."""
        return Doc(self._value.get(key), f"{self._where}{key}.")

    def plain(self, key: str) -> dict[str, Any]:
        """An object whose fields are only shown."""
        return dict(self._get(key, dict, "an object"))

    def plain_or_none(self, key: str) -> dict[str, Any] | None:
        """An object or null."""
        return None if self._value.get(key) is None else self.plain(key)

    def docs(self, key: str) -> list[Doc]:
        """A list of objects."""
        return [Doc(v, f"{self._where}{key}[{i}].") for i, v in enumerate(self._get(key, list, "a list"))]

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._get(key, list, "a list")
        if not all(isinstance(v, str) for v in values):
            raise SessionError(f"{self._where}{key} is not a list of strings")
        return tuple(values)

    def rows(self, key: str, width: int, most: int) -> list[list[int]]:
        """A list of rows of `width` integers each."""
        values = self._get(key, list, "a list")
        if len(values) > most:
            raise SessionError(f"{self._where}{key} has more than {most} rows")
        for row in values:
            if not isinstance(row, list) or len(row) != width or not all(type(v) is int for v in row):
                raise SessionError(f"{self._where}{key} has a row that is not {width} integers")
        return list(values)
