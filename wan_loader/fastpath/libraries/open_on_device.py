"""A file of safetensors that a program has opened for a GPU: what stands in for its handle, and reads ahead.

The program's own handle, of `safetensors.safe_open`, is behind it: names, metadata and errors are that one's, and so is
whatever cannot be done here. Tensors that are asked for one after the other, in the order of `keys` or of
`offset_keys`, are loaded some at a time; at the first one that is out of order, what was loaded ahead is dropped.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wan_loader.errors import WanLoaderError
from wan_loader.events import clock_ns
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from wan_loader.fastpath.tally import Tally
    from wan_loader.loading.handle import CheckpointHandle

__all__ = ["OpenOnDevice"]

#: So much is on the device beside what the program has asked for.
_AHEAD_BYTES = 256 << 20


class OpenOnDevice:
    """What a program gets from `safe_open` for a GPU.

    Args:
        original: The handle that it would have got.
        file: The same file, opened by us.
        sizes: The bytes of its tensors.
        tally: Told of what is fetched.
        whole: All tensors are going to be asked for: they are loaded by one plan.
    """

    def __init__(
        self, original: Any, file: CheckpointHandle, sizes: dict[str, int], tally: Tally, *, whole: bool
    ) -> None:
        self._original = original
        self._file = file
        self._tally = tally
        self._ahead = _Ahead(file, sizes, [original.keys(), file.keys()], whole=whole)

    def __getattr__(self, name: str) -> Any:
        """Return what only the original has."""
        return getattr(self._original, name)

    def __enter__(self) -> OpenOnDevice:
        """Open the original."""
        self._original.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close both, and drop what was loaded ahead."""
        self._file.close()
        self._ahead.drop()
        self._original.__exit__(*exception)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Load one tensor, and perhaps some of those that come next."""
        tensor: torch.Tensor = self._or_else(lambda: self._ahead.take(name), lambda: self._original.get_tensor(name))
        return tensor

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Load all tensors, by one plan."""
        tensors: dict[str, torch.Tensor] = self._or_else(
            lambda: self._ahead.take_all(self._original.offset_keys()), lambda: self._original.get_tensors()
        )
        return tensors

    def get_slice(self, name: str) -> _Slice:
        """Return what parts of a tensor are loaded by."""
        return _Slice(self._original.get_slice(name), lambda index: self._file.get_slice(name)[index], self._or_else)

    def _or_else(self, load: Callable[[], Any], original: Callable[[], Any]) -> Any:
        """Load, or have the original do it, and say what is wrong if something is."""
        try:
            with ours():
                if (why := why_not_now()) is None:
                    return self._counted(load)
            self._tally.leave(f"safe_open: {why}")
        except KeyError:  # there is none of that name, which the original will say
            pass
        except (WanLoaderError, OSError) as error:
            self._tally.leave_after(error, doing="safe_open: ")
        except (IndexError, TypeError, ValueError):  # an index that makes no sense, likewise
            pass
        return original()

    def _counted(self, load: Callable[[], Any]) -> Any:
        start_ns, before = clock_ns(), self._ahead.nbytes
        result = load()
        if nbytes := self._ahead.nbytes - before:
            self._tally.served("safetensors", nbytes, (clock_ns() - start_ns) / 1e9)
        return result


class _Slice:
    """A tensor of which parts are loaded; all but the loading is the original's."""

    def __init__(self, original: Any, load: Callable[[Any], Any], or_else: Callable[..., Any]) -> None:
        self._original = original
        self._load = load
        self._or_else = or_else

    def __getattr__(self, name: str) -> Any:
        """Return what only the original has."""
        return getattr(self._original, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Load the part that an index picks."""
        part: torch.Tensor = self._or_else(lambda: self._load(index), lambda: self._original[index])
        return part


class _Ahead:
    """Tensors that were loaded together with one that was asked for, each until it is asked for itself."""

    def __init__(
        self, file: CheckpointHandle, sizes: dict[str, int], orders: Sequence[list[str]], *, whole: bool
    ) -> None:
        self._file = file
        self._sizes = sizes
        self._next = [dict(pairwise(order)) for order in orders]
        self._whole = whole
        self._loaded: dict[str, torch.Tensor] = {}
        self._last = ""
        self._lock = threading.Lock()
        self.nbytes = 0
        """The bytes that were loaded."""

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor, which is then the caller's alone."""
        with self._lock:
            if name not in self._loaded:
                self._loaded.clear()  # before more is loaded: the device may be small
                self._load(self._sizes if self._whole else self._window(name))
            self._last = name
            return self._loaded.pop(name)

    def take_all(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return all tensors."""
        with self._lock:
            self._loaded.clear()
            self._load(names)
            loaded, self._loaded = self._loaded, {}
            return loaded

    def drop(self) -> None:
        """Let go of what was loaded ahead."""
        with self._lock:
            self._loaded.clear()

    def _window(self, name: str) -> list[str]:
        """Return a name, and those behind it if it is the one behind the last."""
        names, left = [name], _AHEAD_BYTES
        following = next((order for order in self._next if order.get(self._last) == name), {})
        while (after := following.get(names[-1])) is not None and (left := left - self._sizes[after]) >= 0:
            names.append(after)
        return names

    def _load(self, names: Iterable[str]) -> None:
        self._loaded = self._file.get_tensors(list(names))
        self.nbytes += sum(self._sizes[name] for name in self._loaded)
