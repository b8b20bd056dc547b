"""The command line: parse, call the public API, render. Imports torch only in commands that need it."""

from wan_loader.cli.app import main

__all__ = ["main"]
