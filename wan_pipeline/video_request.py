"""The request for a video: a frozen value with the official defaults of each task, checked before any loading."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from wan_loader import OptionError
from wan_loader.arguments import checked_count
from wan_pipeline.families import family_called

__all__ = ["Grid", "Solver", "VideoRequest", "checked_size", "parse_guide_scale", "parse_size"]

Solver = Literal["unipc", "dpm++"]
Grid = Literal["official", "diffusers"]

#: What the published configuration steers away from when nothing else is asked for.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """A request for one video.

    Raises:
        OptionError: A value makes no sense.
    """

    prompt: str
    size: tuple[int, int]
    """The width and the height in pixels."""
    frame_num: int
    steps: int
    shift: float
    guide_scale: tuple[float, float]
    """The guidance of the low-noise and of the high-noise expert."""
    negative_prompt: str = NEGATIVE_PROMPT
    solver: Solver = "unipc"
    grid: Grid = "official"
    """The noise levels: the official code's, or diffusers'."""
    seed: int = 0

    def __post_init__(self) -> None:
        width, height = checked_size(self.size)
        for name in ("prompt", "negative_prompt"):
            if not isinstance(text := getattr(self, name), str):
                raise OptionError.because(f"{name} is of type {type(text).__name__}", "pass a str")
        checked_count(self.steps, "sample_steps")
        if not self.prompt.strip():
            raise OptionError.because("the prompt is empty", "say what the video shows")
        if width < 16 or height < 16 or width % 16 or height % 16:
            raise OptionError.because(f"size {width}*{height}", "both must be multiples of 16")
        if not isinstance(self.frame_num, Integral) or self.frame_num < 1 or self.frame_num % 4 != 1:
            raise OptionError.because(f"frame_num {self.frame_num!r:.60}", "it must be 4n+1, such as 81")
        if not _is_finite(self.shift) or self.shift <= 0:
            raise OptionError.because(f"sample_shift {self.shift!r:.60}", "it must be a positive number")
        if not _is_pair(self.guide_scale):
            raise OptionError.because(f"guide_scale={self.guide_scale!r:.60}", "use two numbers, such as (3.0, 4.0)")
        if self.solver not in get_args(Solver):
            raise OptionError.because(f"sample_solver {self.solver!r}", f"use {' or '.join(get_args(Solver))}")
        if self.grid not in get_args(Grid):
            raise OptionError.because(f"grid {self.grid!r}", f"use {' or '.join(get_args(Grid))}")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed <= _MAX_SEED:
            raise OptionError.because(f"seed {self.seed!r:.60}", "from 0 to 2**63 - 1")

    @classmethod
    def make(cls, task: str, prompt: str, **settings: Any) -> VideoRequest:
        """Make a request with the defaults of a task; settings that are None count as not given."""
        given = {key: value for key, value in settings.items() if value is not None}
        return cls(**{**asdict(family_called(task).defaults), "prompt": prompt, **given})

    def check_task(self, task: str, multiple: int) -> None:
        """Raise `OptionError` unless the model of `task`, which works on squares of `multiple` pixels, can do this."""
        width, height = self.size
        if width % multiple or height % multiple:
            raise OptionError.because(f"size {width}*{height}", f"both must be multiples of {multiple} for {task}")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_pair(values: object) -> bool:
    return isinstance(values, tuple | list) and len(values) == 2 and all(map(_is_finite, values))


def checked_size(size: object) -> tuple[int, int]:
    """Return width and height in pixels; `OptionError` for what is not two whole numbers."""
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise OptionError.because(f"size={size!r:.60}", "use width and height in pixels, such as (1280, 720)")
    return checked_count(size[0], "width", least=0), checked_count(size[1], "height", least=0)


def parse_size(text: str) -> tuple[int, int]:
    """Read "1280*720" or "1280x720" as width and height.

    Raises:
        OptionError: The text is written otherwise.
    """
    match = re.fullmatch(r"(\d+)[*x](\d+)", text.strip())
    if match is None:
        raise OptionError.because(f"size {text!r}", "write it as WIDTH*HEIGHT, such as 1280*720")
    return int(match[1]), int(match[2])


def parse_guide_scale(text: str) -> tuple[float, float]:
    """Read "3.5" for both experts, or "3.0,4.0" for the low-noise and the high-noise one.

    Raises:
        OptionError: The text is written otherwise.
    """
    try:
        values = [float(part) for part in text.split(",")]
        low, high = values * 2 if len(values) == 1 else values
    except ValueError:
        raise OptionError.because(f"sample_guide_scale {text!r}", "one number, or LOW,HIGH such as 3.0,4.0") from None
    return low, high
