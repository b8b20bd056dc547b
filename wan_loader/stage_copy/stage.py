"""Copies of a checkpoint on a RAM disk or a faster disk: checked first, parallel, resumable, verified.

Each file is copied block by block under a temporary name, written to the storage, read back and compared with the
checksums of what was read, and only then renamed into place: a file that is there is whole. What a killed run has
copied is used by the next one, after it has been read back. Pages of the source that were not in the page cache do not
stay there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader.errors import CheckpointError, HostMemoryError, OutputError, WanLoaderError
from wan_loader.events import clock_ns
from wan_loader.sizes import format_bytes
from wan_loader.stage_copy import copy_blocks
from wan_loader.stage_copy.copying import Copying
from wan_loader.stage_copy.journal import PlannedFile, StageEntry, StageManifest, open_entry
from wan_loader.system.files import sync_directory
from wan_loader.system.machine import affordable_buffers, available_memory
from wan_loader.system.mounts import mount_of
from wan_loader.system.threads import default_threads
from wan_loader.warming.prewarm import MEMORY_SHARE
from wan_loader.warming.tree import list_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.stage_copy.copying import Progress
    from wan_loader.types import StrPath
    from wan_loader.warming.tree import Tree

__all__ = ["Staged", "stage"]


@dataclass(frozen=True, slots=True)
class Staged:
    """A checkpoint that has been staged."""

    source: str
    path: str
    """The place where it is now."""
    filesystem: str
    """The type of the file system, such as tmpfs; empty where the system does not say."""
    n_files: int
    nbytes: int
    nbytes_copied: int
    """Bytes that this run read from the source."""
    nbytes_verified: int
    """Bytes that were read back and compared."""
    seconds: float
    warnings: tuple[str, ...]


def stage(
    source: StrPath,
    directory: StrPath,
    *,
    verify: bool | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Staged:
    """Copy a checkpoint (file, index, directory with everything in it) to `directory`/NAME and return where it is.

    After an error or an interruption, the same call goes on.

    Args:
        source: The checkpoint.
        directory: The place for it; it is made if only its last part is missing.
        verify: None reads back what this run copied; True also what was in place; False only what a killed run left.
        force: Replace files of the same names that were not staged.
        threads: The number of blocks at a time, as far as memory allows; None chooses.
        progress: Told (step, done, total) bytes.

    Raises:
        CheckpointError: The source cannot be read, changes, or links out of itself.
        OutputError: The target cannot be written, is too small, foreign, or gives back other bytes than were written.
        HostMemoryError: A RAM disk would take more memory than there is.
    """
    start_ns = clock_ns()
    tree = list_tree(source)
    if tree.outside:
        raise CheckpointError.because(
            f"has links that lead out of it: {', '.join(tree.outside[:5])}",
            "stage what they point to by its own name",
            path=source,
        )
    place = Path(directory)
    try:
        place = _make_directory(place, tree)
        with open_entry(place, tree.name) as entry:
            buffers = affordable_buffers(threads or default_threads(), copy_blocks.BLOCK_BYTES)
            job = _Job(tree, entry, buffers, progress)
            job.run(verify, force)
    except WanLoaderError:
        raise
    except OSError as error:
        raise _failed(place, error) from error
    mount = mount_of(place)
    return Staged(
        source=tree.path,
        path=str(place / tree.name),
        filesystem=mount.kind if mount else "",
        n_files=len(tree.files),
        nbytes=tree.nbytes,
        nbytes_copied=job.copying.nbytes_copied,
        nbytes_verified=job.copying.nbytes_verified,
        seconds=(clock_ns() - start_ns) / 1e9,
        warnings=(*tree.warnings, *job.warnings),
    )


def _failed(directory: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free space and run it again, which goes on where it stopped, or give the space back with --remove"
        return OutputError.because(f"is full ({error.strerror})", remedy, path=directory)
    where = f"{error.filename}: " if error.filename else ""
    reason = f"{where}{error.strerror or error}"
    return OutputError(f"cannot stage to {directory}: {reason}", path=directory, reason=reason)


def _make_directory(directory: Path, tree: Tree) -> Path:
    """Return the target, made if only its last part is missing; not the source, and not inside it."""
    if not directory.is_dir():
        if os.path.lexists(directory):
            raise OutputError.because("is not a directory", "name another place", path=directory)
        if not directory.absolute().parent.is_dir():
            raise OutputError.because("does not exist", "is the disk mounted?", path=directory.absolute().parent)
        directory.mkdir()
    place = directory.resolve()
    real = os.path.realpath(tree.path)
    inside = tree.is_directory and os.path.commonpath([place, real]) == real
    if inside or any(os.path.realpath(place / f.relative) == f.path for f in tree.files if not tree.is_directory):
        raise OutputError.because(f"is where {tree.path} already lies", "name another place", path=directory)
    if os.path.realpath(place / tree.name) == real:
        raise OutputError.because(f"is where {tree.path} already lies", "name another place", path=directory)
    return place


class _Job:
    """A run of `stage` over a locked entry."""

    def __init__(self, tree: Tree, entry: StageEntry, threads: int, progress: Progress | None) -> None:
        self._entry = entry
        self._manifest = StageManifest(tree.path, tree.name, tree.is_directory, ())
        self._sources = {self._manifest.planned(file): file for file in tree.files}
        self._manifest = replace(self._manifest, files=tuple(self._sources))
        mount = mount_of(entry.directory)
        self._in_memory = mount is not None and mount.in_memory
        self.copying = Copying(entry, self._sources, in_memory=self._in_memory, threads=threads, progress=progress)
        self.warnings: list[str] = []

    def run(self, verify: bool | None, force: bool) -> None:
        """Go through all steps; the last one declares the copy complete."""
        entry, files = self._entry, self._manifest.files
        before = entry.manifest
        self._check_target(before, force)
        damaged = self._damaged_in_place() if verify else set()
        todo = [file for file in files if file in damaged or not entry.holds(file)]
        entry.discard_parts({file.key for file in todo})
        self._check_space(todo)
        entry.write_manifest(self._manifest)
        # from here on the manifest is there: whatever happens can be gone on with, or taken away
        left = {file: self.copying.blocks_left(file) for file in todo}
        resumed = [(f, b) for f in todo for b in set(range(copy_blocks.n_blocks(f))) - set(left[f])]
        self.copying.copy([(file, block) for file in todo for block in left[file]])
        self.copying.settle(todo)
        again = resumed if verify is False else [(f, b) for f in todo for b in range(copy_blocks.n_blocks(f))]
        self.warnings += self.copying.verify(again)
        for file in todo:
            self._place(file, force)
        self._remove_outdated({file.path for file in files})
        for directory in {entry.target(file).parent for file in todo}:
            # only now do the renames last
            sync_directory(directory)
        entry.write_manifest(replace(self._manifest, complete=True))
        entry.discard_parts(set())

    # Before anything is written

    def _check_target(self, before: StageManifest | None, force: bool) -> None:
        entry, name = self._entry, self._manifest.name
        if before is not None and before.source != self._manifest.source and not force:
            raise OutputError.because(
                f"was staged from {before.source}",
                "remove it first (--remove), or replace it with --force",
                path=entry.directory / name,
            )
        if (entry.directory / name).is_symlink():
            raise OutputError.because(
                "is a link", "staging does not write through links; remove it", path=entry.directory / name
            )
        if before is None and not force and self._manifest.is_directory and _holds_anything(entry.directory / name):
            raise OutputError.because(
                "exists and was not staged",
                "choose another --to, or use --force, which replaces files of the same names; --remove then takes "
                "these away, too",
                path=entry.directory / name,
            )
        foreign = [f.path for f in self._manifest.files if os.path.lexists(entry.target(f)) and not entry.owns(f.path)]
        for path in foreign:
            if not force or (entry.directory / path).is_dir():
                more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
                reason = "exists and was not staged, or has changed since"
                remedy = "choose another --to, or replace it with --force; --remove then takes the copy away"
                where = entry.directory / path
                raise OutputError(f"{where}{more} {reason}: {remedy}", path=where, reason=reason, remedy=remedy)

    def _check_space(self, todo: Sequence[PlannedFile]) -> None:
        needed = sum(file.nbytes for file in todo)
        for file in todo:
            with contextlib.suppress(OSError):
                # parts are sparse: what is written of them takes up blocks of 512 bytes
                needed -= min(file.nbytes, os.stat(self._entry.part(file)).st_blocks * 512)
        free = shutil.disk_usage(self._entry.directory).free
        if needed > free:
            raise OutputError.because(
                f"has {format_bytes(free)} free, {format_bytes(needed)} are to be staged",
                "free space, or choose another --to",
                path=self._entry.directory,
            )
        available = available_memory() if self._in_memory else None
        if available is not None and needed > (memory := int(available * MEMORY_SHARE)):
            raise HostMemoryError.because(
                f"is in memory, and {format_bytes(needed)} are more than the {format_bytes(memory)} that it may take "
                f"({MEMORY_SHARE:.0%} of what this machine and its cgroup have free)",
                "stage a part, such as one expert, or choose a disk",
                path=self._entry.directory,
            )

    def _damaged_in_place(self) -> set[PlannedFile]:
        held = [file for file in self._manifest.files if self._entry.holds(file)]
        bad = self.copying.compare([(f, b) for f in held for b in range(copy_blocks.n_blocks(f))], in_place=True)
        damaged = {file for file, _ in bad}
        self.warnings += [f"{f.path} was no longer what had been staged, and was copied again" for f in damaged]
        return damaged

    def _place(self, file: PlannedFile, force: bool) -> None:
        entry, part, source = self._entry, self._entry.part(file), self._sources[file]
        os.utime(part, ns=(source.mtime_ns, source.mtime_ns))
        with contextlib.suppress(OSError):  # file systems without modes
            # as the source, but writable for nobody else, and always for us
            os.chmod(part, os.stat(source.path).st_mode & 0o755 | 0o600)
        target = entry.target(file)
        if not force and os.path.lexists(target) and not entry.owns(file.path):
            raise OutputError.because(
                "appeared while it was being staged", "remove it, or replace it with --force", path=target
            )
        self._make_parents(target)
        # the journal first: a file in place that it does not know would be foreign for ever
        entry.note_placed(file, os.stat(part).st_mtime_ns)
        os.replace(part, target)

    def _make_parents(self, target: Path) -> None:
        root = self._entry.directory
        for parent in reversed(target.relative_to(root).parents[:-1]):
            if not (root / parent).is_dir():
                self._entry.note_made(parent.as_posix())
                (root / parent).mkdir()

    def _remove_outdated(self, wanted: set[str]) -> None:
        """Remove files that an earlier version of the source had."""
        for path in set(self._entry.placed) - wanted:
            if self._entry.owns(path):
                os.unlink(self._entry.directory / path)


def _holds_anything(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))
