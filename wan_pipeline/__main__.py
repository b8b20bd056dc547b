"""The program `wan-pipeline`, also as `python -m wan_pipeline`."""

from __future__ import annotations

from typing import NoReturn

from wan_loader.cli import begin_program

__all__ = ["main"]


def main() -> NoReturn:
    """Run `wan-pipeline` in a process of its own."""
    begin_program()
    from wan_pipeline.commands.app import main as run

    run()


if __name__ == "__main__":
    main()
