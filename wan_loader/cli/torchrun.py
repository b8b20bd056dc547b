"""Commands under torchrun: the processes load together, the first one speaks, each writes files of its own."""

from __future__ import annotations

import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from wan_loader.distributed.processes import end_now, join, process_rank, tell_others, world_size
from wan_loader.errors import WanLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["end", "fail_together", "own_file", "together"]


def own_file(path: Path | None) -> Path | None:
    """Return the path of this process's own file: run.rank1.json for run.json in a distributed run."""
    if path is None or world_size() == 1:
        return path
    return path.with_suffix(f".rank{process_rank()}{path.suffix}")


def fail_together(error: WanLoaderError | OSError) -> None:
    """Tell processes of a distributed run that wait for this one, and end it, whatever hangs in a collective."""
    with suppress(WanLoaderError):  # what is wrong with the environment was said
        tell_others(error)
    _end_if_joined(1)


def end(code: int) -> NoReturn:
    """End with an exit code. After a failure the interpreter's own end may wait for collectives that never finish."""
    if code:
        _end_if_joined(code)
    sys.exit(code)


def _end_if_joined(code: int) -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        end_now(code)


@contextmanager
def together(device: str) -> Iterator[tuple[Any, Any]]:
    """Give the device of this process and the group of all, which is None outside of a distributed run."""
    if world_size() == 1:
        yield device, None
        return
    import torch.distributed as dist

    joined = join(device)
    try:
        yield joined.device, dist.group.WORLD
    except BaseException as error:
        joined.leave(error)
        raise
    joined.leave()
