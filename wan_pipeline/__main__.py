"""The program `wan-pipeline`, also as `python -m wan_pipeline`."""

from __future__ import annotations

import sys
from typing import NoReturn

from wan_loader.cli import begin_program

__all__ = ["main"]


def main() -> NoReturn:
    """Run `wan-pipeline` in a process of its own."""
    begin_program()
    if sys.argv[1:2] in (["generate"], ["load"]) and "--help" not in sys.argv:
        _hand_over()
    from wan_pipeline.commands.app import main as run

    run()


def _hand_over() -> None:
    """Go on in a fork of the stand-by server, if there is one and it is not refused."""
    from wan_loader.cli import from_standby, say

    wanted = {"--standby": True, "--no-standby": False}
    words = [None, *(wanted[word] for word in sys.argv if word in wanted)]
    why = from_standby("wan_pipeline.__main__:main", first=sys.path[0], program="-m wan_pipeline", wanted=words[-1])
    if why:
        say(f"started directly: {why}")


if __name__ == "__main__":
    main()
