"""Files that ask for many videos: a prompt a line, or an object of JSON a line with what else a video may have.

    Two cats boxing on a stage
    {"prompt": "A dog", "size": "832*480", "base_seed": 7, "save_file": "dog.mp4"}

Fields have the names and the meaning of the flags of `generate`, which are the defaults of all lines. Everything is
checked before anything is loaded. Names of videos do not depend on seeds that are drawn: a run that was ended finds
what it has made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from wan_loader import OptionError
from wan_pipeline.video import check_video_name
from wan_pipeline.video_request import VideoRequest, parse_guide_scale, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

__all__ = ["PromptLine", "read_prompt_file"]

#: Flags of `generate`, and the fields of a request that they give.
_FIELDS = {
    "prompt": "prompt",
    "size": "size",
    "frame_num": "frame_num",
    "sample_steps": "steps",
    "sample_shift": "shift",
    "sample_guide_scale": "guide_scale",
    "sample_solver": "solver",
    "negative_prompt": "negative_prompt",
    "base_seed": "seed",
}
#: The seed that asks for one to be drawn.
_DRAWN = -1
_MAX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class PromptLine:
    """A line that asks for a video."""

    number: int
    request: VideoRequest
    """Its seed is 0 where one is to be drawn."""
    draws_seed: bool
    target: Path
    """The file of the video."""


def read_prompt_file(
    path: Path,
    task: str,
    defaults: Mapping[str, Any],
    directory: Path,
    check: Callable[[VideoRequest], None],
) -> list[PromptLine]:
    """Read and check all lines; empty ones are left out.

    Args:
        path: The file.
        task: The model's task.
        defaults: Fields of requests, for what a line does not say; those that are None are the model's.
        directory: The directory of the videos whose lines give no absolute path.
        check: Raise `OptionError` for what the model cannot do.

    Raises:
        OptionError: The file cannot be read or has no line, or one is wrong; the message has its number.
    """
    found: list[PromptLine] = []
    # not splitlines: what else Unicode ends lines with may stand in prompts, and unescaped in strings of JSON
    for number, text in enumerate(_text(path).split("\n"), 1):
        if text.strip():
            try:
                found.append(_read_line(number, text.strip(), task, defaults, directory))
                check(found[-1].request)
            except OptionError as error:
                raise OptionError(f"{path}, line {number}: {error}", path=path, reason=error.reason) from error
    if not found:
        raise OptionError.because(f"{path} has no prompt", "write one on each line")
    return _with_own_targets(path, found)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise OptionError.because(f"{path} is larger than {_MAX_BYTES // 10**6} MB", "give a file of prompts")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise OptionError.because(f"{path} is no text in UTF-8", "give a file of prompts") from None
    except OSError as error:
        raise OptionError.because(f"{path} cannot be read: {error.strerror}", "give a file of prompts") from error


def _read_line(number: int, text: str, task: str, defaults: Mapping[str, Any], directory: Path) -> PromptLine:
    given = _parse(text) if text.startswith("{") else {"prompt": text}
    save_file = given.pop("save_file", None)
    fields = {**defaults, **{_FIELDS[name]: _value(name, value) for name, value in given.items()}}
    draws_seed = fields.get("seed", _DRAWN) == _DRAWN
    if draws_seed:
        fields["seed"] = 0
    request = VideoRequest.make(task, fields.pop("prompt", ""), **fields)
    if save_file is None:
        name = f"{task}_{request.size[0]}x{request.size[1]}_{_name(request, draws_seed)}.mp4"
    elif isinstance(save_file, str) and save_file.strip() and _can_be_called(save_file):
        check_video_name(save_file)
        name = save_file
    else:
        raise OptionError.because(f"save_file {save_file!r:.60}", "give the name of a file")
    return PromptLine(number, request, draws_seed, directory / name)


def _can_be_called(name: str) -> bool:
    """Say whether a file can have this name: escapes of JSON give characters that none can have."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _parse(text: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, _ in pairs:
            if [key for key, _ in pairs].count(name) > 1:
                raise ValueError(f"{name!r:.60} stands twice")
        return dict(pairs)

    try:
        found = json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise OptionError.because(f"it is no JSON: {error}", "a line that begins with { is an object") from None
    assert isinstance(found, dict)
    if unknown := [name for name in found if name not in {*_FIELDS, "save_file"}]:
        raise OptionError.because(f"unknown field {unknown[0]!r:.60}", f"use {', '.join(_FIELDS)} or save_file")
    return found


def _value(name: str, value: Any) -> Any:
    """Return the value of a field as requests have it; those of other types are told of there."""
    if isinstance(value, bool) or value is None:
        raise OptionError.because(f"{name} is {json.dumps(value)}", "give a value, or leave it out")
    if name == "size":
        return parse_size(value) if isinstance(value, str) else value
    if name == "sample_guide_scale":
        return tuple(value) if isinstance(value, list) else parse_guide_scale(str(value))
    return value


def _name(request: VideoRequest, draws_seed: bool) -> str:
    """Return a name that tells what is asked for: the beginning of the prompt, and a digest of everything."""
    words = re.sub(r"[^\w]+", "-", request.prompt.lower()).strip("-")[:40].rstrip("-")
    asked = {**asdict(request), "seed": None if draws_seed else request.seed}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    return f"{words}_{digest}" if words else digest


def _with_own_targets(path: Path, lines: Iterable[PromptLine]) -> list[PromptLine]:
    """Give lines that ask for the same, with seeds to be drawn, a file each; no others may have one file."""
    found: list[PromptLine] = []
    first: dict[Path, PromptLine] = {}
    times: dict[Path, int] = {}
    for line in lines:
        before = first.setdefault(line.target, line)
        times[line.target] = count = times.get(line.target, 0) + 1
        if count > 1:
            if not line.draws_seed or line.request != before.request:
                reason = f"{path}, lines {before.number} and {line.number}: both are for {line.target}"
                raise OptionError.because(reason, "give each a save_file of its own")
            target = line.target
            line = replace(line, target=target.with_name(f"{target.stem}_{count}{target.suffix}"))
        found.append(line)
    return found
