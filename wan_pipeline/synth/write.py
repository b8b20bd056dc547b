"""The writing of a plan: a few threads, one file each, into a temporary directory, then into place.

The temporary directory lies inside the target, so that it is on the same file system even where the target is a mount
point. What fails half way leaves nothing behind; a process that is killed leaves a directory `.synth-*`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader import OutputError
from wan_loader.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from wan_pipeline.synth.checkpoint_files import SynthPlan, TextFile, WeightFile
    from wan_pipeline.synth.formats import Data

    Progress = Callable[[int, int], None]

__all__ = ["check_target", "write_plan"]

_THREADS = 8
_REPORT_EVERY_S = 0.1
_TEMPORARY = ".synth-"


def check_target(directory: Path, nbytes: int, *, force: bool) -> None:
    """Refuse a target that is not ours to fill or too small; change nothing.

    Raises:
        OutputError: The target is refused.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError.because("is not a directory", "name another place", path=directory)
    if not force and directory.is_dir() and any(directory.iterdir()):
        raise OutputError.because(
            "is not empty", "name another place, or overwrite files in it with --force", path=directory
        )
    # the directory may not be there yet: its nearest ancestor says how much is free
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise OutputError.because(
            f"needs {format_bytes(nbytes)}, and {existing} has {format_bytes(free)} free", path=directory
        )


def write_plan(plan: SynthPlan, directory: Path, data: Data, progress: Progress | None) -> tuple[Path, ...]:
    """Write all files of a plan; return their paths. Files of the same names are replaced, others stay.

    Raises:
        OutputError: Something cannot be written; nothing is left behind.
    """
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory))
    try:
        _write_all(plan, temporary, data, progress)
        return tuple(_install(temporary, directory, file.path) for file in plan.files)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write to {directory}: {reason}", path=directory, reason=reason) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if created and not any(directory.iterdir()):
            directory.rmdir()


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _install(temporary: Path, directory: Path, path: str) -> Path:
    target = directory / path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary / path, target)
    return target


class _Counter:
    """The bytes written so far, by all threads; setting `stop` ends them at their next buffer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.nbytes = 0
        self.stop = threading.Event()

    def add(self, nbytes: int) -> None:
        """Count bytes of one thread."""
        with self._lock:
            self.nbytes += nbytes


def _write_all(plan: SynthPlan, temporary: Path, data: Data, progress: Progress | None) -> None:
    counter = _Counter()
    report = progress or (lambda done, total: None)
    total = plan.nbytes
    for text in plan.texts:
        _write_text(text, temporary, counter)
    # the longest first, so that no single one is left at the end
    weights = sorted(plan.weights, key=lambda file: file.nbytes, reverse=True)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="synth") as pool:
        try:
            pending = {pool.submit(_write_weights, file, temporary, data, counter) for file in weights}
            while pending:
                done, pending = wait(pending, _REPORT_EVERY_S, FIRST_EXCEPTION)
                _raise_first(done)
                report(counter.nbytes, total)
        except BaseException:
            counter.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _raise_first(done: set[Future[None]]) -> None:
    for future in done:
        future.result()


def _write_text(text: TextFile, temporary: Path, counter: _Counter) -> None:
    target = temporary / text.path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.content)
    counter.add(text.nbytes)


def _write_weights(weights: WeightFile, temporary: Path, data: Data, counter: _Counter) -> None:
    target = temporary / weights.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        for buffer in weights.stream(data):
            # left half written: the whole temporary directory is removed
            if counter.stop.is_set():
                return
            file.write(buffer)
            counter.add(len(buffer))
        file.flush()
        # also keeps the writing back of dirty pages out of whatever is measured next
        os.fsync(file.fileno())
        assert file.tell() == weights.nbytes, f"{weights.path} is not as long as planned"
