"""The components that a diffusers pipeline is about to load, read into the page cache meanwhile.

`DiffusionPipeline.from_pretrained` imports the classes of components, builds and maps them, one after the other, and
reads no weight for seconds. Where those are not in the page cache, they are read from its beginning on, in threads:
components that `model_index.json` names and the call does not give, in the order in which they are loaded there, as
far as there is memory. That ends with the first load of ours, which has the disk to itself, with the fast path, and
with the program.

Where everything is resident, or the system does not say what is, nothing is read. What goes wrong here is for the call
itself to tell.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from wan_loader.errors import WanLoaderError
from wan_loader.system.threads import in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from wan_loader.fastpath.patches import Patches
    from wan_loader.warming.prewarm import Prewarm

__all__ = ["ReadAhead", "files_to_load"]

#: What diffusers and transformers call a component's weights.
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(\.(?P<variant>.+?))?(?P<shard>-\d{5}-of-\d{5})?\.safetensors", re.DOTALL
)
_MAX_INDEX_BYTES = 1 << 20
_MAX_THREADS = 4
#: Arguments by which a call may mean other files than those here.
_ELSEWHERE = ("cache_dir", "force_download", "revision")


class ReadAhead:
    """The seam of reading ahead."""

    def __init__(self) -> None:
        self.running: Prewarm | None = None
        """The latest reading, over or not."""

    def install(self, patches: Patches) -> None:
        """Have pipelines' files read when a pipeline is asked for, as long as the patches are in."""
        patches.replace(
            "diffusers.pipelines.pipeline_utils",
            "DiffusionPipeline.from_pretrained",
            partial(self._instead_of, patches),
            parameters=("pretrained_model_name_or_path", "kwargs"),
        )

    def _instead_of(self, patches: Patches, original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            path = _path(*args, **kwargs)
            if path is not None and os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine reads for all
                begin = partial(self._begin, patches, path, frozenset(kwargs), kwargs.get("variant"))
                in_background(begin, "read ahead")
            return original(cls, *args, **kwargs)

        return from_pretrained

    def _begin(self, patches: Patches, path: str, given: Collection[str], variant: str | None) -> None:
        """Begin to read what is not resident."""
        from wan_loader.formats.hub_cache import locate

        # no thread, no file, no model: whoever loads will say it
        with suppress(OSError, RuntimeError, ValueError, WanLoaderError):
            cold = [file for file in files_to_load(locate(path), given, variant) if _is_cold(file)]
            if cold and patches.active:
                self.running = _read(cold, patches)


def _path(*args: Any, **kwargs: Any) -> str | None:
    """Return the path or repository that a call loads from, if its files follow from that; else None."""
    path: Any = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    is_known = isinstance(path, str | os.PathLike) and isinstance(kwargs.get("variant"), str | None)
    if not is_known or any(kwargs.get(name) for name in _ELSEWHERE) or kwargs.get("use_safetensors") is False:
        return None
    return os.fsdecode(path)


def files_to_load(directory: str, given: Collection[str], variant: str | None) -> list[str]:
    """Return the safetensors files of a pipeline's components, in the order in which they are loaded.

    Args:
        directory: The pipeline's, with a `model_index.json`.
        given: Components that are not loaded.
        variant: The variant that is asked for; a component that lacks it has its plain files loaded.

    Raises:
        OSError: There is no index, or it cannot be read.
        ValueError: It is none.
    """
    with open(os.path.join(directory, "model_index.json"), "rb") as file:
        index = json.loads(file.read(_MAX_INDEX_BYTES))
    if not isinstance(index, dict):
        raise ValueError("an index of components is an object")
    found: list[str] = []
    for name, kind in index.items():
        is_loaded = isinstance(kind, list) and len(kind) == 2 and all(isinstance(word, str) for word in kind)
        # an odd name is no directory here
        if is_loaded and name not in given and os.path.basename(name) == name:
            folder = os.path.join(directory, name)
            with suppress(FileNotFoundError, NotADirectoryError):
                found += [os.path.join(folder, file) for file in _weights(os.listdir(folder), variant)]
    return found


def _weights(names: list[str], variant: str | None) -> list[str]:
    """Return a component's files of weights; none if there are several sets to choose from."""
    matches = [match for name in sorted(names) if (match := _WEIGHTS.fullmatch(name))]
    asked = [match for match in matches if match["variant"] == variant]
    chosen = asked or [match for match in matches if match["variant"] is None]
    kinds = {(match["stem"], match["shard"] is None) for match in chosen}
    return [match[0] for match in chosen] if len(kinds) == 1 else []


def _is_cold(path: str) -> bool:
    """Say whether some of a file is known not to be in the page cache."""
    from wan_loader.system.page_cache import cached

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        nbytes = os.fstat(fd).st_size
        found = cached(fd, 0, nbytes)
    finally:
        os.close(fd)
    return found is not None and found < nbytes


def _read(files: list[str], patches: Patches) -> Prewarm | None:
    """Begin to read files, as far as there is memory for them."""
    # with all that they import: not before there is something to read
    from wan_loader.engine.activity import is_idle
    from wan_loader.system.machine import available_memory, processors
    from wan_loader.warming.prewarm import MEMORY_SHARE, Prewarm

    free = available_memory()
    if free is None:
        return None
    # half of the processors are the program's
    threads = max(1, min(_MAX_THREADS, processors() // 2))
    budget = int(free * MEMORY_SHARE)
    return Prewarm(files, threads=threads, budget_nbytes=budget, goes_on=lambda: patches.active and is_idle())
