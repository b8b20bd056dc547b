"""A script or a module, run in this process as Python runs it, with the fast path inside.

Imports little: a program that loads nothing starts as soon as it would by itself.
"""

from __future__ import annotations

import builtins
import io
import os
import stat
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, TracebackType

__all__ = ["Start", "prepare_file", "prepare_module"]


class Start(NamedTuple):
    """What is run: the file whose code it is, as tracebacks name it, and how."""

    file: str
    code: Callable[[], None]

    def run(self) -> None:
        """Run it to its end.

        Raises:
            SystemExit: As it exits; with 1 after an error, which was shown as Python shows it.
            KeyboardInterrupt: It was interrupted, which was shown.
        """
        try:
            self.code()
        except SystemExit:
            raise
        except BaseException as error:
            with suppress(OSError, ValueError, AttributeError):
                sys.stdout.flush()  # as Python does
            _show(error, _of_program(error, self.file))
            if isinstance(error, KeyboardInterrupt):
                # Python ends by the signal, and would show it again
                sys.excepthook = _show_nothing
                raise
            raise SystemExit(1) from None


def prepare_file(script: str, args: Sequence[str]) -> Start:
    """Leave arguments and path as Python leaves them for a script.

    Raises:
        OptionError: There is none, or it cannot be read; nothing is changed then.
    """
    try:
        if is_file := stat.S_ISREG(os.stat(script).st_mode):
            open(script, "rb").close()
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    except OSError as error:
        raise OptionError.because(f"cannot be read: {error.strerror}", path=script) from error
    if not is_file:
        raise OptionError.because("is no script", "name a Python file", path=script)
    sys.argv = [script, *args]
    _put_first(os.path.dirname(os.path.realpath(script)))
    file = os.path.abspath(script)
    return Start(file, partial(_run_file, file))


def prepare_module(words: Sequence[str]) -> Start:
    """Find a module as `python -m` does, in the working directory first, and leave arguments and path as that does.

    Parents are imported.

    Raises:
        OptionError: There is none of that name, or nothing of it can be run.
    """
    from importlib.util import find_spec

    if not words:
        raise OptionError.because("-m lacks the name of a module", "name one: -m package.module")
    name, *args = words
    sys.argv = ["-m", *args]
    with suppress(FileNotFoundError):  # the directory has been deleted
        _put_first(os.getcwd())
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:  # a package
            spec = find_spec(f"{name}.__main__")
    except (ImportError, ValueError):  # of a package around it
        spec = None
    code = getattr(spec and spec.loader, "get_code", lambda name: None)(spec and spec.name)
    if spec is None or code is None:
        raise OptionError.because(
            f"there is no module {name!r} that can be run", "name one that `python -m` runs, or install it"
        )
    sys.argv[0] = spec.origin or name
    return Start(sys.argv[0], partial(_run_module, spec, code))


def _put_first(directory: str) -> None:
    """Have modules searched where Python searches a program's own first, in place of where it has searched ours."""
    if not sys.flags.safe_path:
        sys.path[:1] = [directory]


def _run_file(file: str) -> None:
    """Run a file as Python does: as the module __main__, which its threads and exit handlers still find afterwards."""
    if not file.endswith(".py") and _is_packed(file):
        from runpy import run_path

        run_path(file, run_name="__main__")
        return
    from importlib.machinery import SourceFileLoader

    loader = SourceFileLoader("__main__", file)
    with io.open_code(file) as source:
        code = loader.source_to_code(source.read(), file)
    exec(code, _new_main(__file__=file, __loader__=loader, __cached__=None))


def _is_packed(file: str) -> bool:
    """Say whether a file is no source: a zip archive, or compiled."""
    from importlib.machinery import BYTECODE_SUFFIXES
    from zipfile import is_zipfile

    return file.endswith(tuple(BYTECODE_SUFFIXES)) or is_zipfile(file)


def _run_module(spec: ModuleSpec, code: CodeType) -> None:
    """Run a module as `python -m` does."""
    names = {"__file__": spec.origin, "__loader__": spec.loader, "__package__": spec.parent, "__spec__": spec}
    exec(code, _new_main(**names, __cached__=spec.cached))


def _new_main(**names: Any) -> dict[str, Any]:
    """Return the names of a new module __main__."""
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__.update(names, __builtins__=builtins, __annotations__={})
    return main.__dict__


def _of_program(error: BaseException, file: str) -> TracebackType | None:
    """Return the traceback as the program alone would have it; None for a mistake in its syntax."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename != file:
        found = found.tb_next
    error.__traceback__ = found
    return found


def _show(error: BaseException, trace: TracebackType | None) -> None:
    """Have an error shown by the program's hook; where that fails, show both as Python does."""
    try:
        sys.excepthook(type(error), error, trace)
    except SystemExit:
        raise
    except BaseException as wrong:
        wrong.__context__, wrong.__traceback__ = None, wrong.__traceback__ and wrong.__traceback__.tb_next
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write("Error in sys.excepthook:\n")
            sys.__excepthook__(type(wrong), wrong, wrong.__traceback__)
            sys.stderr.write("\nOriginal exception was:\n")
            sys.__excepthook__(type(error), error, trace)


def _show_nothing(*_: object) -> None:
    """Take the place of `sys.excepthook`."""
