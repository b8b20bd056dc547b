"""The places that a checkpoint is measured in: where it is, copies of it elsewhere, or a simulated slow disk.

Copies lie in a directory `.wan-loader-bench-*` of the place and are removed at the end, also after Ctrl-C and SIGTERM;
only a killed run leaves them behind. Also here: making files warm or cold, because that is a property of the place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.errors import OptionError, OutputError
from wan_loader.profiler.analysis.simulate import STORAGES
from wan_loader.profiler.probe.system_facts import storage_facts
from wan_loader.sizes import format_bytes, parse_rate
from wan_loader.system.machine import available_memory
from wan_loader.warming.evict import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from wan_loader.formats import Checkpoint

__all__ = ["PREFIX", "Place", "copied_files", "leftovers", "parse_place", "part_of", "read_into_cache", "scratch"]

PREFIX = ".wan-loader-bench-"
_SIMULATED = "simulated"
_ALIASES = {"sata": "sata-ssd", "nvme": "nvme-gen3"}
_COPY_BYTES = 16 << 20
_TRIES = 3
#: Small files beside the weights that say what the component is, and which shards it has.
_SIDECARS = ("config.json", "*.index.json", "*.index.*.json")


@dataclass(frozen=True, slots=True)
class Place:
    """A storage to measure: a directory that the checkpoint is copied into, or where it already is."""

    name: str
    directory: Path | None = None
    """The directory for a copy; None: the checkpoint stays where it is."""
    rate: float | None = None
    """Bytes per second of a simulated device; the checkpoint is read from the page cache and held to it."""

    @property
    def label(self) -> str:
        """The name, with a mark on what is not real."""
        return f"{self.name} (simulated)" if self.rate else self.name


def parse_place(text: str) -> Place:
    """Read `NAME=DIR`, `NAME=simulated:RATE`, `NAME=simulated:CLASS`, or `CLASS=simulated`.

    Raises:
        OptionError: The text is none of these, or the directory is not there.
    """
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise OptionError.because(f"--storage {text!r}", "write NAME=DIR, or NAME=simulated:180MB/s")
    kind, _, rate = value.partition(":")
    if kind != _SIMULATED:
        directory = Path(value).expanduser()
        if not directory.is_dir():
            raise OptionError(
                f"--storage {name}: {directory} is no directory", path=directory, reason="is no directory"
            )
        return Place(name, directory)
    rate = rate or name
    known = STORAGES.get(_ALIASES.get(rate, rate))
    if known is None and not rate[:1].isdigit():
        raise OptionError(f"--storage {text!r}: {rate!r} is no rate and none of {', '.join((*_ALIASES, *STORAGES))}")
    try:
        return Place(name, None, known or parse_rate(rate))
    except OptionError as error:
        raise OptionError(f"--storage {text!r}: {error}") from error


def part_of(checkpoint: Checkpoint, nbytes: int | None) -> list[str]:
    """Return the first files that hold at least `nbytes` together (at least one); all of them for None."""
    chosen: list[str] = []
    total = 0
    for file in checkpoint.files:
        if nbytes is not None and chosen and total >= nbytes:
            break
        chosen.append(file.path)
        total += file.nbytes
    return chosen


@contextmanager
def scratch(directory: Path, nbytes: int) -> Iterator[Path]:
    """Make an empty directory inside `directory` with room for `nbytes`, removed at the end.

    Raises:
        OutputError: There is no room, or nothing can be written.
    """
    try:
        free = shutil.disk_usage(directory).free
        # a tmpfs may promise more than the cgroup can give
        if storage_facts(directory).get("in_memory"):
            memory = available_memory()
            free = free if memory is None else min(free, memory)
        if nbytes > free:
            raise OutputError.because(
                f"has no room: {format_bytes(nbytes)} needed, {format_bytes(free)} free",
                "name another place, or measure less with --part",
                path=directory,
            )
        made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
    except OutputError:
        raise
    except OSError as error:
        raise OutputError.because(
            f"cannot be written: {error.strerror}", "name another place", path=directory
        ) from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def copied_files(
    place: Place, files: Sequence[str], told: Callable[[int], None] = lambda done: None
) -> Iterator[list[str]]:
    """Provide the files in the place, copied there if it is another one, and removed at the end.

    Copies are synced, so that writing back does not disturb what is measured.

    Args:
        place: The place.
        files: The files as they lie in the checkpoint; `config.json` and indices beside them are copied, too.
        told: Told the bytes that are copied.

    Raises:
        OutputError: The place has no room, or cannot be written.
    """
    if place.directory is None:
        yield list(files)
        return
    with scratch(place.directory, sum(os.path.getsize(f) for f in files)) as directory:
        try:
            copies = _copy_all(files, directory, told)
        except OSError as error:
            raise OutputError.because(f"cannot be copied to: {error.strerror}", path=place.directory) from error
        yield copies


def _copy_all(files: Sequence[str], directory: Path, told: Callable[[int], None]) -> list[str]:
    done = 0
    copies = []
    for path in files:
        target = directory / Path(path).name
        with open(path, "rb") as source, open(target, "xb") as copy:
            # inside the kernel: the bytes do not pass through this process
            while count := os.sendfile(copy.fileno(), source.fileno(), None, _COPY_BYTES):
                done += count
                told(done)
            os.fsync(copy.fileno())
        copies.append(str(target))
    for pattern in _SIDECARS:
        for beside in Path(files[0]).parent.glob(pattern):
            shutil.copyfile(beside, directory / beside.name)
    return copies


def leftovers(directory: Path) -> list[Path]:
    """List what killed runs left in a place."""
    return sorted(directory.glob(f"{PREFIX}*"))


def read_into_cache(files: Sequence[str]) -> None:
    """Read files into the page cache, unless they are there.

    The kernel sometimes drops pages again at once, right after others were evicted: then once more, if it tells.
    """
    for path in files:
        for _ in range(_TRIES):
            resident = resident_bytes([path])
            if resident == os.path.getsize(path):
                break
            _read_through(path)
            if resident is None:
                break


def _read_through(path: str) -> None:
    buffer = bytearray(_COPY_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
