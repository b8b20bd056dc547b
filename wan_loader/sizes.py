"""Sizes and rates as people write and read them: `3GB`, `512MiB`, `150MB/s`, `10Gbit/s`. Pure."""

from __future__ import annotations

import math
import re

from wan_loader.errors import OptionError

__all__ = [
    "format_age",
    "format_bytes",
    "format_count",
    "format_rate",
    "format_seconds",
    "format_share",
    "parse_age",
    "parse_rate",
    "parse_size",
]

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)(b|bit|bits)?", re.IGNORECASE)
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.IGNORECASE)
_AGE_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(text: str) -> int:
    """Return the bytes of a size in decimal units (`3GB`, `3G`), in binary ones (`512MiB`), or in plain digits.

    Raises:
        OptionError: The text is no size, or not more than 0.
    """
    return round(_parse(text, text.strip(), "3GB or 512MiB"))


def parse_rate(text: str) -> float:
    """Return the bytes per second of a rate: `150MB/s`, `3GB/s`, `10Gbit/s`; `/s` may be left out.

    Raises:
        OptionError: The text is no rate, or not more than 0.
    """
    stripped = re.sub(r"(/s|ps)$", "", text.strip(), flags=re.IGNORECASE)
    return _parse(text, stripped, "150MB/s or 10Gbit/s")


def _parse(text: str, stripped: str, example: str) -> float:
    found = _SIZE.fullmatch(stripped)
    factor = None
    if found:
        unit = found[2].lower()
        factor = _FACTORS.get(unit) or _BINARY.get(unit)
    if not found or not factor:
        raise OptionError.because(f"{text!r} is not understood", f"write it like {example}")
    value = float(found[1]) * factor
    if not 0 < value < math.inf:
        raise OptionError.because(f"{text!r} must be more than 0, and finite")
    # links are sold in bits
    return value / 8 if (found[3] or "").lower().startswith("bit") else value


def format_bytes(nbytes: float) -> str:
    """Write bytes in decimal units, as disks and links are sold: 28.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        # from here on three digits would be rounded to 1000 of this unit
        if abs(nbytes) < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def format_count(number: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun: 1 file, 2 files; with a `plural` that takes no s: 1 entry, 2 entries."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def format_rate(bytes_per_second: float) -> str:
    """Write a rate as `format_bytes` writes bytes, per second."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_share(part: int | None, whole: int) -> str:
    """Write a part of all bytes: 37%; of none, 0%; a part that is None is unknown."""
    return "unknown" if part is None else f"{part / whole if whole else 0.0:.0%}"


def parse_age(text: str) -> float:
    """Return the seconds of an age: `90s`, `30m`, `12h`, `30d`, `2w`.

    Raises:
        OptionError: The text is no age, or not more than 0.
    """
    found = _AGE.fullmatch(text.strip())
    if not found or float(found[1]) <= 0:
        raise OptionError.because(f"{text!r} is not understood", "write it like 30d or 12h")
    return float(found[1]) * _AGE_SECONDS[found[2].lower()]


def format_age(seconds: float) -> str:
    """Write seconds in one unit: 40 s, 12 min, 5 h, 3 days."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit != "days" and seconds >= length):
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def format_seconds(seconds: float) -> str:
    """Write seconds with three digits: 0.71 s, 3.2 ms, 84.1 s."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"
