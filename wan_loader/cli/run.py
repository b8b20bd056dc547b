"""`wan-loader run`: a script with the fast path put in."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from wan_loader.cli.options import Verbose

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
    from wan_loader.errors import OptionError
    from wan_loader.fastpath import FastPath

    if not script.is_file():
        raise OptionError(f"{script} is no script: name a Python file")
    sys.argv = [str(script), *context.args]
    sys.path.insert(0, str(script.resolve().parent))
    path = FastPath()
    path.install()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except EOFError:  # the command line's library would take it for its own
        traceback.print_exc()
        raise typer.Exit(1) from None
    finally:
        if not quiet:
            sys.stdout.flush()
            print(f"wan-loader: {path.summary()}", file=sys.stderr)
