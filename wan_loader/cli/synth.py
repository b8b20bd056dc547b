"""`wan-loader synth`: hands over to `wan-pipeline synth`, which knows the model's shapes.

A separate process, because this package never imports `wan_pipeline`.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import typer

from wan_loader.errors import OptionError

__all__ = ["synth"]

#: Under our name: it stands in the usage.
_PROGRAM = "import sys; sys.argv[0] = 'wan-loader'; from wan_pipeline.commands.app import main; main()"


def synth(context: typer.Context) -> None:
    """Make a WAN2.2-shaped checkpoint of random weights (needs the pipeline extra).

    Example:

        wan-loader synth /tmp/wan --layout native --size tiny
    """
    if find_spec("wan_pipeline") is None or find_spec("diffusers") is None:
        raise OptionError("synth needs the pipeline extra: pip install 'wan-loader[pipeline]'")
    os.execv(sys.executable, [sys.executable, "-c", _PROGRAM, "synth", *context.args])
