"""Stand-ins for packages: there when they are imported, and run when they are used.

    with put_off.active():
        import transformers     # whose `import scipy.stats` and `from scipy.optimize import x` get stand-ins

While it is active, and in the thread that made it so, an import of a package that may wait gives a stand-in for each of
its modules, and a statement `from package import name` at the head of a module one for the name. At the first use of
one, whenever that is, the package is imported as it always would have been, by the import system and in its order, with
all its modules that were asked for; then whatever stood for it in a module's namespace is replaced by it. Stand-ins
that were put elsewhere (a dictionary, a default) go on handing everything to the real ones.

What cannot be told apart from a package that is used: whether it is broken. That comes out at its first use.
"""

from __future__ import annotations

import contextlib
import opcode
import sys
import threading
from importlib import import_module
from importlib.machinery import PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import FrameType

__all__ = ["PutOff", "StandInModule", "StandInName"]

#: Where a stand-in for a module keeps who made it.
_OWNER = "__put_off_by__"


class StandInModule(ModuleType):
    """A stand-in for a module. It has the module's name and place; whatever else it is asked for is the real one's."""

    def __getattr__(self, name: str) -> Any:
        # a module that is no package has none, and the import system asks
        if name == "__path__":
            raise AttributeError(name)
        owner: PutOff = vars(self)[_OWNER]
        # names of the language (__version__, __all__) hold text and lists, which nothing can stand for
        waits = owner.puts_off(self.__name__) and not name.startswith("__")
        if waits and _is_named_at_the_head(sys._getframe(1)):
            return StandInName(owner, self.__name__, name)
        real = owner.real(self.__name__)
        if name == "__all__" and not hasattr(real, name):
            # `import *` would take what is in the namespace of the stand-in
            return [public for public in vars(real) if not public.startswith("_")]
        return getattr(real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        # the import system puts each submodule there, but the name may be that of something else in the package
        elif not isinstance(value, StandInModule):
            setattr(vars(self)[_OWNER].real(self.__name__), name, value)

    def __dir__(self) -> list[str]:
        return dir(vars(self)[_OWNER].real(self.__name__))


class StandInName:
    """A stand-in for what a module calls by a name: a function or a class mostly. Whatever is done to it uses it."""

    __slots__ = ("_module", "_name", "_owner")

    def __init__(self, owner: PutOff, module: str, name: str) -> None:
        self._owner, self._module, self._name = owner, module, name

    def real(self) -> Any:
        """Return what it stands for; raises what its import would have raised."""
        try:
            return getattr(self._owner.real(self._module), self._name)
        except AttributeError:
            with contextlib.suppress(ModuleNotFoundError):
                return import_module(f"{self._module}.{self._name}")
            raise ImportError(f"cannot import name {self._name!r} from {self._module!r}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what it stands for."""
        return self.real()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.real(),)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # for whoever asks whether it is a class
        return self.real().__class__

    def __instancecheck__(self, instance: Any) -> bool:
        # nothing is of a class that there is not yet
        return self._owner.is_used(self._module) and isinstance(instance, self.real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.real())

    def __getitem__(self, key: Any) -> Any:
        return self.real()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.real())

    def __bool__(self) -> bool:
        return bool(self.real())

    def __or__(self, other: Any) -> Any:
        return self.real() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.real()

    def __eq__(self, other: object) -> bool:
        return bool(self.real() == other)

    def __hash__(self) -> int:
        return hash(self.real())

    def __repr__(self) -> str:
        return repr(self.real())


class PutOff:
    """The packages that may wait, and what has become of them; a finder of the import system.

    Args:
        packages: The packages that may wait, and modules that may with all below them though their package may not.
        prepare: Given each stand-in for one of them, to give it what is known without the package.
    """

    def __init__(
        self,
        packages: Iterable[str],
        *,
        prepare: Callable[[PutOff, ModuleType], None] = lambda owner, module: None,
    ) -> None:
        self._packages = frozenset(packages)
        self._below = tuple(name for name in self._packages if "." in name)
        self._prepare = prepare
        self._thread: int | None = None
        self._opening = 0
        self._waiting: set[str] = set()
        self._opened: set[str] = set()
        self._then: dict[str, list[Callable[[], None]]] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Put off the imports of this thread in the body. The stand-ins stay, and are real ones at their first use."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
            self._leave_if_done()

    def puts_off(self, name: str) -> bool:
        """Say whether the import of a module is put off now: in the thread of the imports, and not while one is used.

        A package that is used imports what it needs. But part of a package (the compiler) waits within others, too.
        """
        root = self._root(name)
        if self._thread != threading.get_ident() or root in self._opened:
            return False
        return not self._opening or root in self._below

    @property
    def waiting(self) -> tuple[str, ...]:
        """The packages that were asked for and not used yet."""
        return tuple(sorted(self._waiting))

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Answer the import system: with a stand-in, or not at all."""
        root = self._root(name)
        if root in self._waiting and not self.puts_off(name):
            self.open(root)
        if root not in self._packages or not self.puts_off(name) or (root in sys.modules and not _stands_in(root)):
            return None
        spec = PathFinder.find_spec(name, path, target)
        # what was compiled cannot wait, nor what other finders find
        if spec is None or type(spec.loader) is not SourceFileLoader:
            if root in self._waiting:
                self.open(root)
            return None
        self._waiting.add(root)
        spec.loader = _StandInLoader(spec.loader.name, spec.loader.path, self)
        return spec

    def real(self, name: str) -> ModuleType:
        """Return a module itself; its package is imported if it was not yet."""
        if isinstance(sys.modules.get(name), StandInModule):
            self.open(self._root(name))
        return import_module(name)

    def open(self, root: str) -> None:
        """Import a package with all its modules that were asked for, and have it take the places of its stand-ins."""
        self._opened.add(root)
        self._waiting.discard(root)
        names = [name for name in list(sys.modules) if self._root(name) == root and _stands_in(name)]
        for name in names:
            sys.modules.pop(name, None)
        mine = self._thread == threading.get_ident()
        self._opening += mine
        try:
            # from the import system; what fails is raised to whoever uses that module
            for name in names:
                with contextlib.suppress(Exception):
                    import_module(name)
        finally:
            self._opening -= mine
        self._replace(root)
        for action in self._then.pop(root, []):
            action()
        self._leave_if_done()

    def after(self, root: str, action: Callable[[], None]) -> None:
        """Have something done once a package is opened."""
        self._then.setdefault(root, []).append(action)

    def is_used(self, name: str) -> bool:
        """Say whether the package of a module was used."""
        return self._root(name) in self._opened

    def _root(self, name: str) -> str:
        for root in self._below:
            if name == root or name.startswith(f"{root}."):
                return root
        return name.partition(".")[0]

    def _leave_if_done(self) -> None:
        if not self._waiting and self._thread is None:
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)

    def _replace(self, root: str) -> None:
        """Put what is real in the place of what stood for it, in the namespace of each module."""
        for module in list(sys.modules.values()):
            if not isinstance(module, ModuleType) or type(module) is StandInModule:
                continue
            names = vars(module)
            for key, value in list(names.items()):
                with contextlib.suppress(ImportError):
                    if type(value) is StandInModule and self._root(value.__name__) == root:
                        names[key] = import_module(value.__name__)
                    elif type(value) is StandInName and self._root(value._module) == root:
                        names[key] = value.real()


class _StandInLoader(SourceFileLoader):
    """A loader that leaves a module as a stand-in. It stays the loader of its file for whoever asks for the source."""

    def __init__(self, name: str, path: str, owner: PutOff) -> None:
        super().__init__(name, path)
        self._owner = owner

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[_OWNER] = self._owner
        module.__class__ = StandInModule
        assert isinstance(module, StandInModule)
        if module.__name__ in self._owner._packages:
            self._owner._prepare(self._owner, module)


def _stands_in(name: str) -> bool:
    return type(sys.modules.get(name)) is StandInModule


def _is_named_at_the_head(frame: FrameType | None) -> bool:
    """Say whether it is a `from ... import` of a module's own code, which binds a name and does nothing with it."""
    statement = "IMPORT_FROM"
    if frame is not None and frame.f_code.co_name == "_handle_fromlist":
        # the import system asks first, for a package. From C (an extension that imports) it would have another caller
        frame, statement = frame.f_back, "IMPORT_NAME"
    if frame is None or frame.f_locals is not frame.f_globals:
        return False
    return frame.f_code.co_code[frame.f_lasti] == opcode.opmap[statement]
