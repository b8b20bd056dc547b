"""Checks of the arguments of public functions: pure, in one place, before any file is touched.

A check returns the value in the form that the rest of the package works with. An argument that makes no sense is an
`OptionError` that says what to pass instead (its `remedy`); a device that is none is a `DeviceError`.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

from wan_loader.errors import DeviceError, OptionError
from wan_loader.types import IO_MODES

if TYPE_CHECKING:
    from wan_loader.types import StrPath

__all__ = [
    "MAX_THREADS",
    "check_cache",
    "check_cancel",
    "check_device",
    "check_flag",
    "check_group",
    "check_io",
    "check_keep",
    "check_key_map",
    "check_module",
    "check_observer",
    "check_part",
    "checked_count",
    "checked_path",
    "checked_paths",
    "checked_slices",
    "checked_strings",
    "checked_threads",
]

MAX_THREADS = 64
_BYTES = bytes | bytearray | memoryview
_ONE_PATH = "pass a path: a str or a pathlib.Path"
_ANY_PATH = "pass the path of a checkpoint: a str, a pathlib.Path, or a list of them"


def checked_path(value: object, what: str = "path", advice: str = _ONE_PATH) -> str:
    """Return the path as a string; `OptionError` for everything that is none, such as an open file."""
    # may be bytes, which name no path here: tensors and shards are named by strings
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if isinstance(path, str):
        if not path or "\0" in path:
            raise OptionError.because(f"{what} is {'empty' if not path else repr(path)}", advice)
        return path
    if hasattr(value, "read"):
        named = isinstance(getattr(value, "name", None), str)
        advice = "pass its path, which is its .name" if named else f"weights are read from files, so {advice}"
        raise OptionError.because(f"{what} is an open {_kind(value)}", advice)
    raise OptionError.because(f"{what} is {_shown(value)}", advice)


def checked_paths(value: object) -> str | list[str]:
    """Return one path, or a list of several; `OptionError` for everything that is neither."""
    if isinstance(value, str | os.PathLike | Mapping | _BYTES) or hasattr(value, "read"):
        return checked_path(value, "path", _ANY_PATH)
    return [checked_path(one, "an item of the list of paths") for one in _items(value, "path", _ANY_PATH)]


def checked_strings(value: object, what: str) -> tuple[str, ...]:
    """Return a list of strings as a tuple, None as an empty one. A single string is none: its letters would count."""
    if value is None:
        return ()
    advice = "pass a list of strings"
    if isinstance(value, str):
        raise OptionError.because(f"{what} is {_shown(value)}", f"{advice}, such as {what}=[{value!r:.60}]")
    if isinstance(value, Mapping | _BYTES):
        raise OptionError.because(f"{what} is {_shown(value)}", advice)
    strings = tuple(_items(value, what, advice))
    for one in strings:
        if not isinstance(one, str):
            raise OptionError.because(f"{what} holds {_shown(one)}", "every item is a str")
    return strings


def checked_slices(value: object) -> dict[str, tuple[slice, ...]]:
    """Return slices by the names of tensors, each as a tuple of slices, one a dimension; None as an empty dict.

    A pair of numbers is a slice of the rows. Whether a tensor has so many dimensions is asked when it is known.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError.because(f"slices is {_shown(value)}", "pass a mapping from name to slice")
    return {name: _checked_slice(name, one) for name, one in value.items()}


def _checked_slice(name: object, value: object) -> tuple[slice, ...]:
    if not isinstance(name, str):
        raise OptionError.because(f"slices has {_shown(name)} for a name", "every name is a str")
    dims = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(dims) == 2 and all(_is_whole(one) for one in dims):
        dims = (slice(*dims),)
    for dim in dims:
        if not isinstance(dim, slice):
            raise OptionError(
                f"slices[{name!r:.60}] is {_shown(value)}: pass a slice, a tuple of slices, or (start, stop) for rows",
                tensor=name,
            )
        if not all(one is None or _is_whole(one) for one in (dim.start, dim.stop, dim.step)):
            raise OptionError(f"slices[{name!r:.60}]: the bounds of a slice are whole numbers or None", tensor=name)
        if dim.step is not None and operator.index(dim.step) < 1:
            raise OptionError(
                f"slices[{name!r:.60}]: step {dim.step}: use a positive one, and flip what is loaded", tensor=name
            )
    return dims


def _is_whole(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _items(value: object, what: str, advice: str) -> Iterable[Any]:
    try:
        return iter(value)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise OptionError.because(f"{what} is {_shown(value)}", advice) from None


def check_part(part: object) -> None:
    """Raise `OptionError` unless the value can name a part of a checkpoint."""
    if part is not None and not isinstance(part, str):
        remedy = "pass the keys that lead to it, joined by dots: 'state_dict'"
        raise OptionError.because(f"part is {_shown(part)}", remedy)


def check_flag(value: object, what: str) -> None:
    """Raise `OptionError` unless the value is True or False: a text such as "no" would count as True."""
    if value is not True and value is not False:
        raise OptionError.because(f"{what} is {_shown(value)}", "pass True or False")


def checked_count(value: Any, what: str, *, least: int = 1, most: int | None = None) -> int:
    """Return a whole number from `least` to `most` as an int; `OptionError` for others, and for what is no number."""
    try:
        # index takes numpy's integers and no floats; True would be 1, and is no count
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < least or (most is not None and count > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise OptionError.because(f"{what}={value!r:.60}", f"use {limits}")
    return count


def checked_threads(threads: object) -> int | None:
    """Return how many reads go on side by side; None, where that is left to the loader, stays None."""
    return None if threads is None else checked_count(threads, "threads", most=MAX_THREADS)


def check_io(io: object) -> None:
    """Raise `OptionError` unless `io` is one of the modes."""
    if not isinstance(io, str) or io not in IO_MODES:
        raise OptionError.because(f"io={io!r:.60}", f"use one of {', '.join(IO_MODES)}")


def check_device(device: object) -> None:
    """Raise `DeviceError` for what cannot name a device; whether there is such a one is asked when torch is there."""
    is_index = isinstance(device, Integral) and not isinstance(device, bool)
    if not (isinstance(device, str) or is_index or _is_a(device, "torch", "device")):
        raise DeviceError.because(
            f"device is {_shown(device)}", "use auto, cpu, cuda or cuda:N, an index, or a torch.device"
        )


def check_observer(observer: object) -> None:
    """Raise `OptionError` unless the observer can be told of spans."""
    if observer is not None and not callable(getattr(observer, "record", None)):
        raise OptionError.because(f"observer is {_shown(observer)}", "pass an object with a method record(span)")


def check_cancel(cancel: object) -> None:
    """`OptionError` unless it can be asked whether to stop."""
    if cancel is not None and not callable(getattr(cancel, "check", None)):
        raise OptionError(f"cancel is {_shown(cancel)}: pass a wan_loader.CancelToken")


def check_key_map(key_map: object) -> None:
    """Raise `OptionError` unless names can be looked up in the map."""
    if key_map is not None and not isinstance(key_map, Mapping) and not callable(key_map):
        raise OptionError.because(f"key_map is {_shown(key_map)}", "pass a mapping or a function, from name to name")


def check_group(group: object) -> None:
    """Raise `OptionError` unless it is a group of processes: what `new_group` gives to non-members is none."""
    if group is not None and not _is_a(group, "torch.distributed", "ProcessGroup"):
        raise OptionError.because(
            f"group is {_shown(group)}",
            "pass a process group, or None; -100 is what new_group gives to processes that are not in the group",
        )


def check_module(module: object) -> None:
    """Raise `OptionError` unless the value is a module, whose parameters can be filled."""
    if not _is_a(module, "torch.nn", "Module"):
        raise OptionError.because(
            f"module is {_shown(module)}", "the module to fill comes first, and then the checkpoint's path"
        )


def check_cache(*, cache: object, cache_dir: StrPath | None, verify: object = False) -> None:
    """Raise `OptionError` for flags or a directory that are none, and for what needs cache=True without it."""
    check_flag(cache, "cache")
    check_flag(verify, "verify")
    if cache_dir is not None:
        checked_path(cache_dir, "cache_dir", "pass a directory, or None for the user's cache directory")
    needing = [name for name, given in (("cache_dir", cache_dir is not None), ("verify", verify)) if given]
    if needing and not cache:
        raise OptionError.because(f"{' and '.join(needing)} without the cache", "pass cache=True, too, or leave it out")


def check_keep(keep: object, *, is_shared: bool = False) -> None:
    """Raise `OptionError` unless the value is True, False or "copy"; several processes that load together keep none."""
    if keep is not True and keep is not False and keep != "copy":
        raise OptionError.because(f"keep is {_shown(keep)}", 'pass True, False or "copy"')
    if keep and is_shared:
        reason = "kept weights are whole, and several processes load together"
        raise OptionError.because(reason, "leave out keep (--keep)")


def _is_a(value: object, module: str, name: str) -> bool:
    """Return whether a value is of one of torch's types, without importing it: where it is absent, no value is."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def _shown(value: object) -> str:
    """Describe a value in a message: briefly, and without calling its `repr` where that could be long."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return f"the str {value!r:.60}"
    return f"of type {_kind(value)}"


def _kind(value: object) -> str:
    return type(value).__name__
