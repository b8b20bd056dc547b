"""The contract between a bench and a loader: its name, what it needs, one load asked of it, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from wan_loader._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["LoadTask", "Loader", "NotApplicableError", "Outcome", "installed_versions", "missing_package"]


class NotApplicableError(Exception):
    """The loader cannot do this case by its nature; the message says why. Never reaches a caller of the library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTask:
    """A load that is asked of a loader."""

    files: tuple[str, ...]
    format: str
    """The format as `Checkpoint.format` has it: safetensors, torch-zip or torch-pickle."""
    file_dtype: str
    """The dtype that most bytes of the checkpoint have."""
    device: str
    dtype: str | None = None
    directory: str = ""
    """The component's directory, for loaders that want one; empty where the files are only a part of it."""
    packed: str = ""
    """The converted file, for a loader with its own format."""
    io: str = "auto"
    threads: int | None = None


@dataclass(slots=True)
class Outcome:
    """The tensors that a loader gave, by name, and what only it knows. `keep` is held until they were compared."""

    tensors: dict[str, Any]
    report: Callable[[], dict[str, Any]] | None = None
    """Makes the loader's own report, outside the clock."""
    spans: Sequence[Any] = ()
    is_module: bool = False
    """The tensors are a module's: it may keep some in another dtype and under more names than the file has."""
    keep: Any = None


@dataclass(frozen=True, slots=True)
class Loader:
    """A loader, ours or a rival's."""

    name: str
    packages: tuple[str, ...]
    """Distributions that must be installed, the loader's own first; none for this package itself."""
    modules: tuple[str, ...]
    """Modules that are imported before the clock starts."""
    how: str
    """The calls that are timed, for the report."""
    load: Callable[[LoadTask], Outcome]
    formats: tuple[str, ...] = ("safetensors",)
    cuda_only: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are set in its process before anything is imported."""
    prepare: Callable[[LoadTask], object] | None = None
    """A call before the clock starts that imports what only the task tells, and refuses what this version lacks."""
    convert: Callable[[LoadTask], None] | None = None
    """A call that writes `task.packed`, once, outside the clock; loaders with the same one share the file."""
    packed_name: str = "weights.packed"
    """The name that the converted file must have."""

    def why_not_applicable(self, task: LoadTask) -> str | None:
        """Return why this loader cannot do a task, as far as that is known without trying; pure."""
        if task.format not in self.formats:
            return f"does not read {task.format} files"
        if self.cuda_only and not task.device.startswith("cuda"):
            return "loads to CUDA devices only"
        return None


def missing_package(loader: Loader) -> str | None:
    """Return the first of the loader's packages that is not installed, or None where all are."""
    return next((package for package in loader.packages if _version(package) is None), None)


def installed_versions(loader: Loader) -> dict[str, str | None]:
    """Return the version of each of the loader's packages, the loader's own first; None for what is not installed."""
    return {package: _version(package) for package in loader.packages} or {"wan-loader": __version__}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
