"""`wan-loader run`: a script, or a module, with the fast path put in."""

from __future__ import annotations

import io
import os
import runpy
import sys
import zipfile
from contextlib import suppress
from functools import partial
from importlib.machinery import BYTECODE_SUFFIXES, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from wan_loader.cli.interrupt import find_unguarded, hand_over
from wan_loader.cli.options import Verbose
from wan_loader.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import CodeType, TracebackType

__all__ = ["run"]


def run(
    context: typer.Context,
    script: Annotated[
        Path,
        typer.Argument(
            metavar="SCRIPT ARGS... | -m MODULE ARGS...", help="A Python script or module, and its arguments."
        ),
    ],
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not say at the end what took the fast path.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a Python script or module with our loader in the place of safetensors' load_file (to CUDA) and of torch.load.

    Calls whose result would not be the same bit for bit go to the originals, with the reason in the line on stderr at
    the end. diffusers and others that load with these two functions are served with them. This process only.

    Examples:

        wan-loader run generate.py --ckpt_dir model

        wan-loader run -m package.serve --port 8000

        wan-loader run --quiet serve.py
    """
    from wan_loader.cli.output import hand_over_streams, say
    from wan_loader.cli.torchrun import fail_together
    from wan_loader.errors import WanLoaderError
    from wan_loader.fastpath import FastPath

    start = _prepare_module(context.args) if str(script) == "-m" else _prepare_file(script, context.args)
    path = FastPath()
    path.install()
    hand_over()
    hand_over_streams()
    file = start.file
    try:
        start.run()
    except Exception as error:
        _flush()
        sys.excepthook(type(error), error, _of_script(error, file))
        if isinstance(error, WanLoaderError):
            fail_together(error)
        raise typer.Exit(1) from None
    finally:
        if not quiet:
            _flush()
            with suppress(OSError, ValueError):
                if sys.stderr is not None:
                    say(f"wan-loader: {path.summary()}")


class _Start(NamedTuple):
    """What is run: the file whose code it is, as tracebacks name it, and how."""

    file: str
    run: Callable[[], None]


def _prepare_file(script: Path, args: list[str]) -> _Start:
    """Leave arguments and path as Python leaves them for a script."""
    if not script.is_file():
        raise OptionError.because("is no script", "name a Python file", path=script)
    # one that cannot be read is told of before anything is changed
    script.open("rb").close()
    sys.argv = [str(script), *args]
    sys.path.insert(0, str(script.resolve().parent))
    file = os.path.abspath(script)
    return _Start(file, partial(_run_file, file))


def _prepare_module(words: list[str]) -> _Start:
    """Find a module as `python -m` does, in the working directory first, and leave arguments and path as that does.

    Raises:
        OptionError: There is none of that name, or nothing of it can be run.
    """
    if not words:
        raise OptionError.because("-m lacks the name of a module", "name one: -m package.module")
    name, *args = words
    sys.argv = ["-m", *args]
    sys.path.insert(0, os.getcwd())
    try:
        spec = find_unguarded(name)
        if spec is not None and spec.submodule_search_locations is not None:  # a package
            spec = find_unguarded(f"{name}.__main__")
    except (ImportError, ValueError):  # of a package around it
        spec = None
    code = getattr(spec and spec.loader, "get_code", lambda name: None)(spec and spec.name)
    if spec is None or code is None:
        raise OptionError.because(
            f"there is no module {name!r} that can be run", "name one that `python -m` runs, or install it"
        )
    sys.argv[0] = spec.origin or name
    return _Start(sys.argv[0], partial(_run_module, spec, code))


def _run_file(file: str) -> None:
    """Run a file as Python does: as the module __main__, which its threads and exit handlers still find afterwards."""
    if zipfile.is_zipfile(file) or file.endswith(tuple(BYTECODE_SUFFIXES)):
        runpy.run_path(file, run_name="__main__")
        return
    loader = SourceFileLoader("__main__", file)
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(__file__=file, __loader__=loader, __builtins__=__builtins__)
    main.__dict__.update(__cached__=None, __annotations__={})
    with io.open_code(file) as source:
        code = loader.source_to_code(source.read(), file)
    exec(code, main.__dict__)


def _run_module(spec: ModuleSpec, code: CodeType) -> None:
    """Run a module as `python -m` does."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(__file__=spec.origin, __loader__=spec.loader, __package__=spec.parent, __spec__=spec)
    main.__dict__.update(__cached__=spec.cached, __builtins__=__builtins__, __annotations__={})
    exec(code, main.__dict__)


def _flush() -> None:
    """Write what the script printed before what follows on stderr, unless it has closed or replaced stdout."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()


def _of_script(error: Exception, script: str) -> TracebackType | None:
    """Return the traceback as the script alone would have it; None for a mistake in its syntax."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename != script:
        found = found.tb_next
    error.__traceback__ = found
    return found
