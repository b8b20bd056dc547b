"""Many videos with one start: what `wan-pipeline generate --prompt_file` does once every line was checked."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from wan_loader import WanLoaderError, clock_ns
from wan_loader.cli import printable, say, show
from wan_loader.distributed import is_first, world_size
from wan_loader.sizes import format_count
from wan_pipeline.phase_progress import phase_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from wan_pipeline.pipeline import WanT2V
    from wan_pipeline.prompt_file import PromptLine
    from wan_pipeline.video_request import VideoRequest

__all__ = ["MadeVideo", "agreed_seed", "make_videos", "tell_made"]


@dataclass(frozen=True, slots=True)
class MadeVideo:
    """What became of a line."""

    line: int
    path: Path
    seed: int | None = None
    """None for a video that was there."""
    seconds: float = 0.0
    error: str | None = None

    @property
    def state(self) -> str:
        """Return made, there (from an earlier run) or failed."""
        return "failed" if self.error is not None else "there" if self.seed is None else "made"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self) | {"path": str(self.path), "state": self.state}


def make_videos(
    lines: Sequence[PromptLine], start: Callable[[VideoRequest], WanT2V], *, force: bool, names: bool
) -> tuple[list[MadeVideo], dict[str, Any], WanT2V | None]:
    """Make the videos that are not there. One that fails is told of, and the others are made.

    Args:
        lines: The lines of the file.
        start: Start the pipeline for videos as large as a request.
        force: Make those that are there, too.
        names: Print the file of each video once it is made.

    Returns:
        What became of each line, the pipeline's report, and the pipeline, closed. If all are there nothing is started,
        and there is neither.

    Raises:
        Exception: The start failed; or a video of several processes, which cannot go on apart from each other.
    """
    missing = [line for line in lines if force or not line.target.exists()]
    found = {line.number: MadeVideo(line.number, line.target) for line in lines}
    # where there are several, the others may not see the files of the first
    if not missing and world_size() == 1:
        return list(found.values()), {}, None
    with start(_largest(missing or lines)) as pipe:
        if pipe.run is not None:
            agreed = pipe.run.together("lines", " ".join(str(line.number) for line in missing))[0].split()
            missing = [line for line in lines if str(line.number) in agreed]
        for count, line in enumerate(missing, 1):
            found[line.number] = _make(pipe, line, f"{count}/{len(missing)}")
            if names and is_first() and found[line.number].error is None:
                show(str(line.target))
        report = pipe.report()
    return list(found.values()), report, pipe


def agreed_seed(pipe: WanT2V, seed: int) -> int:
    """Return the first process's seed on all of them, as each has drawn its own."""
    return seed if pipe.run is None else int(pipe.run.together("seed", str(seed))[0])


def tell_made(made: Sequence[MadeVideo]) -> int:
    """Say how many videos were made and which failed; return the exit code."""
    counts = {state: sum(video.state == state for video in made) for state in ("made", "there", "failed")}
    failed = ", ".join(f"line {video.line}" for video in made if video.error is not None)
    parts = [f"{format_count(counts['made'], 'video')} made"]
    parts += [f"{counts['there']} there already"] * bool(counts["there"])
    parts += [f"{counts['failed']} failed ({failed})"] * bool(failed)
    say(", ".join(parts))
    return 1 if failed else 0


def _largest(lines: Sequence[PromptLine]) -> VideoRequest:
    """Return a request that no line's is larger than, for the memory that a start must leave."""
    widest = max((line.request for line in lines), key=lambda request: request.size[0] * request.size[1])
    return replace(widest, frame_num=max(line.request.frame_num for line in lines))


def _make(pipe: WanT2V, line: PromptLine, count: str) -> MadeVideo:
    seed = agreed_seed(pipe, secrets.randbelow(2**31) if line.draws_seed else line.request.seed)
    if is_first():
        say(f"{count}: line {line.number}, seed {seed}, {printable(line.request.prompt)[:60]}")
    start_ns = clock_ns()
    settings = {**asdict(line.request), "seed": seed}
    error = None
    try:
        with phase_progress(quiet=not is_first()) as progress:
            video = pipe(settings.pop("prompt"), progress=progress, **settings)
            if is_first():
                progress("save", 0, 1)
                video.save(line.target)
                progress("save", 1, 1)
    except Exception as failure:
        if pipe.run is not None:
            raise
        # the message alone: the frames that it came from hold tensors
        error = str(failure) if isinstance(failure, WanLoaderError) else f"{type(failure).__name__}: {failure}"
        say(f"line {line.number} failed: {printable(error)}")
    return MadeVideo(line.number, line.target, seed, (clock_ns() - start_ns) / 1e9, error)
