"""Options that several commands share."""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from wan_loader.dtypes import parse_dtype
from wan_loader.errors import OptionError

__all__ = [
    "OUTPUT",
    "CacheDir",
    "Device",
    "Dtype",
    "Force",
    "Io",
    "IoChoice",
    "JsonOut",
    "KeepFp32",
    "OutFile",
    "Part",
    "PathArgument",
    "Threads",
    "Verbose",
    "check_dtype",
    "checked",
    "usage_errors",
    "verbose",
]


#: The group of options, in the help of both programs, that say what is printed and written.
OUTPUT = "Output"


class IoChoice(enum.StrEnum):
    """Transports of bytes, or the choice among them."""

    AUTO = "auto"
    MAPPED = "mapped"
    DIRECT = "direct"
    BUFFERED = "buffered"


def verbose() -> bool:
    """Return True if -v stands on the command line."""
    return any(word in ("-v", "--verbose") for word in sys.argv[1:])


@contextmanager
def usage_errors() -> Iterator[None]:
    """Tell of a setting that the body refuses as of a mistake on the command line: exit code 2, not 1."""
    try:
        yield
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error


def check_dtype(value: str | None) -> str | None:
    """Return a dtype by its full name; a usage error for what is none."""
    with usage_errors():
        return None if value is None else parse_dtype(value)


def checked(parse: Callable[[str], object]) -> Callable[[str | list[str] | None], str | list[str] | None]:
    """Make a callback for an option: what `parse` refuses is a usage error that names the option."""

    def check(value: str | list[str] | None) -> str | list[str] | None:
        for text in [value] if isinstance(value, str) else value or ():
            with usage_errors():
                parse(text)
        return value

    return check


def _parse_device(text: str) -> None:
    """Raise `OptionError` for what names no device. If there is such a one is for the loader to say."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise OptionError.because(f"{text!r} is no device", "use auto, cpu, cuda or cuda:N")


PathArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="A .safetensors, .pth, .pt or .bin file, a *.index.json, a directory holding one checkpoint, "
        "or OWNER/NAME in the hub's cache.",
        show_default=False,
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Of a torch file that nests dicts, the one to take: state_dict, model.ema.",
        show_default="the whole file",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", callback=checked(_parse_device))]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Convert floating tensors to bf16, fp16 or fp32 on the target.",
        show_default="as in the file",
        callback=check_dtype,
    ),
]
Io = Annotated[
    IoChoice,
    typer.Option(
        metavar="WAY",
        help="How to read: mapped, direct, buffered, or auto, which chooses by what lies in the page cache.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=64, metavar="N", help="Reads side by side, 1 to 64.", show_default="chosen from the plan"),
]
KeepFp32 = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        metavar="PART",
        help="With a dtype, tensors whose dotted name has this part become float32; may be given several times.",
        show_default=False,
    ),
]
JsonOut = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout and nothing else.", rich_help_panel=OUTPUT)
]
OutFile = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write the JSON document to a file.", rich_help_panel=OUTPUT)
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite output files.", rich_help_panel=OUTPUT)]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where the converted cache is.", show_default="the user's cache directory")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks of errors.", rich_help_panel=OUTPUT)]
