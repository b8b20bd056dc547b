"""What of a document, or of an interface, is the same in every run and on every machine."""

import enum
import inspect
import re

#: Numbers, and whatever else a machine or a moment decides; their type is kept.
VOLATILE = {
    "created",
    "device_peak_bytes",
    "device_reserved_peak_bytes",
    "filesystem",
    "host_peak_bytes",
    "n_slots",
    "nbytes_on_disk",
    "pid",
    "resident",
    "resident_after",
    "resident_before",
    "revision",
    "slot_bytes",
    "used",
}
#: What depends on timing, down to its type, or is prose: only whether it is there is kept.
VARIES = {
    "advice",
    "argv",
    "ceiling",
    "ceiling_gbps",
    "ceiling_details",
    "ceiling_samples",
    "ceilings",
    "environment",
    "facts_filesystem",
    "facts_rotational",
    "facts_source",
    "gpus",
    "how",
    "imports",
    "limits",
    "lost_s",
    "machine",
    "measured_now",
    "notes",
    "others_share",
    "preset_reason",
    "reached",
    "reached_gbps",
    "reason",
    "storage",
    "together",
    "verdict",
    "version",
    "warnings",
    "why",
}
_KEY = re.compile(r"\b[0-9a-f]{32}\b")


def normalised(value, places, *, pure=False, name=""):
    """A document without what differs between runs; `places` maps directories to the words that stand for them.

    Seconds and rates become "float", but in the documents of pure functions, whose numbers are kept to six digits.
    """
    if name in VOLATILE and not isinstance(value, dict | list):
        return type(value).__name__
    if name in VARIES and not pure:
        return "varies"
    if name == "phases" and isinstance(value, list):
        return sorted({key for phase in value for key in phase})
    if name == "bottleneck" and isinstance(value, dict) and not pure:
        return sorted(value)
    if name == "mode" and value not in ("mapped", "direct", "buffered"):
        return "varies"
    if isinstance(value, dict):
        return {_without(k, places): normalised(v, places, pure=pure, name=k) for k, v in value.items()}
    if isinstance(value, list):
        return [normalised(v, places, pure=pure, name=name) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if pure else "float"
    return _without(value, places) if isinstance(value, str) else value


def _without(text, places):
    for place, word in places.items():
        text = text.replace(str(place), word)
    return _KEY.sub("<key>", text)


def types_of(value, name=""):
    """The types in a document; elements of a list count as one."""
    if name in VARIES:
        return "varies"
    if isinstance(value, dict):
        return {k: types_of(v, k) for k, v in value.items()}
    if isinstance(value, list):
        found = [types_of(v) for v in value]
        return [x for i, x in enumerate(found) if x not in found[:i]]
    return type(value).__name__


def flags(text):
    """Options and subcommands that a page of `--help` names, whichever way it is drawn."""
    options, commands, is_listing = set(), [], False
    for line in text.splitlines():
        if found := re.match(r"(?:│ (?:\*| )?|  |╭─) *((?:--?[a-zA-Z][\w-]*(?:, ?| +|$))+)", line):
            options.update(re.findall(r"--?[a-zA-Z][\w-]*", found[1]))
        if re.match(r"(╭─ )?(Commands|Options|Arguments)\b", line):
            is_listing = "Commands" in line
        elif is_listing and (found := re.match(r"(?:│ |  )([a-z][\w-]*) ", line)):
            commands.append(found[1])
    return {"options": sorted(options), "commands": sorted(commands)}


def signature(value):
    """Parameters of a callable, in order: name, kind, and default; or None where it tells none."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    return [
        [p.name, p.kind.name.lower(), None if p.default is p.empty else repr(p.default)]
        for p in found.parameters.values()
    ]


def interface(module):
    """Public names of a package: functions with their parameters; classes with their bases, methods and fields."""
    return {name: _described(getattr(module, name)) for name in module.__all__ if not name.startswith("__")}


def _described(value):
    if not inspect.isclass(value):
        return {"parameters": signature(value)} if callable(value) else {"type": type(value).__name__}
    described = {"members": sorted(_members(value))}
    if issubclass(value, BaseException):
        return {**described, "caught_as": sorted(c.__name__ for c in value.__mro__ if _is_known(c))}
    if issubclass(value, enum.Enum) or getattr(value, "_is_protocol", False):
        return described
    methods = {n: m for n in _members(value) if inspect.isroutine(m := getattr(value, n, None))}
    return {
        **described,
        "parameters": signature(value),
        "methods": {name: signature(method) for name, method in sorted(methods.items())},
    }


def _is_known(cls):
    return cls.__module__ == "builtins" or cls.__name__ == "WanLoaderError"


def _members(cls):
    ours = [c for c in cls.__mro__ if c.__module__.startswith("wan_")]
    names = {n for c in ours for n in (*vars(c), *getattr(c, "__annotations__", ()))}
    return {n for n in names if not n.startswith("_")}
