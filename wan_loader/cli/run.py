"""`wan-loader run`: a script with the fast path put in."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wan_loader.cli.options import Verbose

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["run"]


def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(metavar="SCRIPT ARGS...", help="A Python script and its arguments.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not say at the end what took the fast path.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a Python script with our loader in the place of safetensors' load_file (to CUDA) and of torch.load.

    Calls whose result would not be the same bit for bit go to the originals, with the reason in the line on stderr at
    the end. diffusers and others that load with these two functions are served with them. This process only.

    Examples:

        wan-loader run generate.py --task t2v-A14B --ckpt_dir Wan2.2-T2V-A14B

        wan-loader run --quiet serve.py
    """
    from wan_loader.cli.distributed import fail_together
    from wan_loader.cli.interrupt import hand_over
    from wan_loader.cli.output import say
    from wan_loader.errors import OptionError, WanLoaderError
    from wan_loader.fastpath import FastPath

    if not script.is_file():
        raise OptionError(f"{script} is no script: name a Python file")
    script.open("rb").close()
    sys.argv = [str(script), *context.args]
    sys.path.insert(0, str(script.resolve().parent))
    path = FastPath()
    path.install()
    hand_over()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        sys.stdout.flush()
        sys.excepthook(type(error), error, _of_script(error, str(script)))
        if isinstance(error, WanLoaderError):
            fail_together(error)
        raise typer.Exit(1) from None
    finally:
        if not quiet:
            sys.stdout.flush()
            say(f"wan-loader: {path.summary()}")


def _of_script(error: Exception, script: str) -> TracebackType | None:
    """The traceback as the script alone would have it; None for a mistake in its syntax."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename != script:
        found = found.tb_next
    error.__traceback__ = found
    return found
