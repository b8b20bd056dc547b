"""Functions of other libraries, replaced while the fast path is installed, wherever and whenever they are imported.

A replacement is put in at once if its module is imported, also where other modules hold the same function under a name
of their own; otherwise right after the import. Nothing is imported for it. All is put back by `undo`; where somebody
else has replaced ours meanwhile, ours stays below theirs and only passes calls on.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.fastpath.ours import is_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from wan_loader.fastpath.tally import Tally

__all__ = ["Patches"]


class _Wanted(NamedTuple):
    """A function that is to be replaced, in a module that may not be imported yet."""

    name: str
    make: Callable[[Any], Any]
    parameters: Sequence[str]


class _Done(NamedTuple):
    """An attribute that holds a replacement."""

    owner: Any
    name: str
    original: Any
    replacement: Any


@dataclass(slots=True)
class Patches:
    """The replacements of one installation. Give them all, use, and undo them; then make another."""

    tally: Tally
    active: bool = True
    """Whether replacements do anything; afterwards they only pass calls on."""
    _wanted: dict[str, list[_Wanted]] = field(default_factory=dict, repr=False)
    _done: list[_Done] = field(default_factory=list, repr=False)
    _finder: _Finder | None = field(default=None, repr=False)
    _found: dict[int, tuple[Any, Any]] | None = field(default=None, repr=False)
    """What is still to be searched for in other modules: id -> original, replacement."""

    @contextmanager
    def in_one_search(self) -> Iterator[None]:
        """Search other modules once, at the end, for all that is replaced in the body."""
        self._found = {}
        try:
            yield
        finally:
            found, self._found = self._found, None
            self._set_elsewhere(found)

    def replace(
        self, module: str, name: str | Sequence[str], make: Callable[[Any], Any], parameters: Sequence[str] = ()
    ) -> None:
        """Replace a function, or a method as `Class.name`; of a class method, the function that gets the class first.

        Args:
            module: The module that defines it.
            name: Its name there. One that does not exist there is left, as other versions may lack it. Several names
                cost no more than one: other modules are searched once for all.
            make: Returns the replacement of an original, or that itself, which then stays. Calls from inside our own
                code, and calls after `undo`, go to the original without it. For a class, it returns a class, which has
                to see to that by itself.
            parameters: What the original must have; where one is missing, another version is there, which is not known
                and therefore left alone. The tally tells.
        """
        wanted = [_Wanted(each, make, parameters) for each in ((name,) if isinstance(name, str) else name)]
        self._wanted.setdefault(module, []).extend(wanted)
        found = sys.modules.get(module)
        if found is not None and not getattr(getattr(found, "__spec__", None), "_initializing", False):
            self._put_in(found, wanted)
        elif self._finder is None:
            self._finder = _Finder(self)
            sys.meta_path.insert(0, self._finder)

    def undo(self) -> None:
        """Put the originals back, and have what cannot be put back pass calls on."""
        self.active = False
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._wanted.clear()
        for done in reversed(self._done):
            if vars(done.owner).get(done.name) is done.replacement:
                setattr(done.owner, done.name, done.original)
        self._done.clear()

    def is_wanted(self, module: str) -> bool:
        """Say whether something in a module is to be replaced."""
        return module in self._wanted

    def put_into(self, module: ModuleType) -> None:
        """Replace what is wanted in a module that has just been imported."""
        self._put_in(module, self._wanted.get(module.__name__, ()))

    def _put_in(self, module: ModuleType, wanted: Sequence[_Wanted]) -> None:
        functions = {}
        for name, make, parameters in wanted:
            *path, last = name.split(".")
            owner: Any = module
            for part in path:
                owner = getattr(owner, part, None)
            original = getattr(owner, "__dict__", {}).get(last)
            if original is None:
                continue
            # a method of the class itself is kept as the function that it is made of
            kind = type(original) if isinstance(original, classmethod | staticmethod) else None
            function = original.__func__ if kind is not None else original
            if not _has_parameters(function, parameters):
                self.tally.leave(f"{module.__name__}.{name} is not the function that is known here")
                continue
            made = make(function)
            if made is function:
                continue
            replacement = self._guarded(function, made)
            if kind is not None:
                replacement = kind(replacement)
            self._set(owner, last, original, replacement)
            if not path:
                functions[id(original)] = original, replacement
        if self._found is not None:
            newest = {id(original): replacement for original, replacement in functions.values()}
            for key, (original, replacement) in self._found.items():  # one that is replaced once more
                self._found[key] = original, newest.get(id(replacement), replacement)
            self._found.update(functions)
        elif functions:
            self._set_elsewhere(functions)

    def _guarded(self, original: Any, replacement: Any) -> Any:
        if isinstance(original, type):
            return replacement

        @wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if not self.active or is_ours():
                return original(*args, **kwargs)
            return replacement(*args, **kwargs)

        return replaced

    def _set_elsewhere(self, functions: Mapping[int, tuple[Any, Any]]) -> None:
        """Replace functions under the names that other modules have imported them by: id -> original, replacement."""
        for module in list(sys.modules.values()):
            names = dict(getattr(module, "__dict__", {}))
            # nearly all modules have none: that is to be known soon
            if functions.keys().isdisjoint(map(id, names.values())):
                continue
            for name, value in names.items():
                if id(value) in functions:
                    self._set(module, name, *functions[id(value)])

    def _set(self, owner: Any, name: str, original: Any, replacement: Any) -> None:
        setattr(owner, name, replacement)
        self._done.append(_Done(owner, name, original, replacement))


class _Finder:
    """An entry of `sys.meta_path` that finds nothing itself, and has replacements put in once a module was executed."""

    def __init__(self, patches: Patches) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a module as the finders behind this one do."""
        if not self._patches.is_wanted(name):
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec, self._patches)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """A module's loader for the time of its import; afterwards module and spec name the loader that they would have."""

    def __init__(self, spec: ModuleSpec, patches: Patches) -> None:
        self._spec = spec
        self._loader: Any = spec.loader
        self._patches = patches

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its loader does."""
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module as its loader does, then put replacements in."""
        module.__loader__ = self._spec.loader = self._loader
        self._loader.exec_module(module)
        self._patches.put_into(module)


def _has_parameters(function: Any, names: Sequence[str]) -> bool:
    try:
        return not names or set(names) <= inspect.signature(function).parameters.keys()
    except (TypeError, ValueError):
        return False
