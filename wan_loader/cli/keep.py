"""`wan-loader standby keep`: weights that stay on a device between programs.

`keep PATH` keeps, the other commands look after.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from wan_loader.cli.options import (
    Device,
    Dtype,
    Io,
    IoChoice,
    JsonOut,
    KeepFp32,
    Part,
    PathArgument,
    Threads,
    Verbose,
    checked,
)
from wan_loader.entry_points import first_answer
from wan_loader.errors import KeepError, OptionError
from wan_loader.sizes import parse_size

if TYPE_CHECKING:
    from wan_loader.formats import Checkpoint
    from wan_loader.keeper.keeping import Kept
    from wan_loader.plan.dtype_policy import DtypePolicy

__all__ = ["app"]

_DEFAULT = "add"


class _WithDefault(TyperGroup):
    """A group whose first word may be the path of a checkpoint: then `add` is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put in the command that was left out."""
        helps = ctx.help_option_names
        if args and args[0] not in self.commands and args[0] not in helps:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="keep",
    cls=_WithDefault,
    help="Weights that stay on a device: `keep PATH` loads them once, and loads with --keep attach to them.",
    no_args_is_help=True,
)


@app.command(name=_DEFAULT)
def add(
    path: PathArgument,
    device: Device = "auto",
    dtype: Dtype = None,
    keep_fp32: KeepFp32 = None,
    max_gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What may be kept on this device in all, such as 60GB.",
            show_default="as it was; at first, all",
            callback=checked(parse_size),
        ),
    ] = None,
    io: Io = IoChoice.AUTO,
    threads: Threads = None,
    part: Part = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Load a checkpoint and leave it in the device's memory. The word `add` may be left out.

    Of a whole model's directory, each network is kept as the pipeline loads it; --dtype is that of the experts then.

    Loads of the same files, dtype and device that say --keep, or keep=True, attach to it: nothing is read, and no
    memory is taken. A small process in the background holds the memory, which outlives even that while it is in use.
    What nobody uses goes first where room is needed.

    Examples:

        wan-loader standby keep model/transformer --device cuda --dtype bf16

        wan-loader standby keep model.safetensors --max-gpu 60GB
    """
    import wan_loader
    from wan_loader.cli.output import print_json
    from wan_loader.cli.progress import reading_progress

    networks = _networks(path, part, dtype, keep_fp32)
    keep = wan_loader.keep  # is imported before there is a progress bar
    done: list[Kept] = []
    for checkpoint, policy in networks or [_checkpoint(path, part, dtype, keep_fp32)]:
        with reading_progress(checkpoint.nbytes) as observer:
            kept = keep(
                checkpoint,
                device,
                dtype=policy.dtype,
                keep_fp32=policy.keep_fp32,
                limit=max_gpu,
                io=io.value,
                threads=threads,
                observer=observer or wan_loader.Recorder(),
            )
        _check_together(kept, done)
        done.append(kept)
        if not json:
            _tell(kept)
    if json:
        each = [_as_json(one) for one in done]
        shown = {"target": os.path.abspath(path), "networks": each} if networks else each[0]
        print_json({"schema_version": 1, "command": "standby keep", **shown})


def _networks(
    path: Path, part: str | None, dtype: str | None, keep_fp32: list[str] | None
) -> list[tuple[Checkpoint, DtypePolicy]] | None:
    """Return the networks of a whole model's directory, as its pipeline loads them; None for one checkpoint."""
    from wan_loader.formats.hub_cache import locate

    if part is not None or not os.path.isdir(directory := locate(os.fspath(path))):
        return None
    found: list[tuple[Checkpoint, DtypePolicy]] | None = first_answer("wan_loader.networks", directory, dtype)
    if found and keep_fp32:
        reason = "the pipeline says which tensors of a whole model stay float32"
        raise OptionError.because(reason, "leave out --keep-fp32, or name one network", path=path)
    return found


def _checkpoint(
    path: Path, part: str | None, dtype: str | None, keep_fp32: list[str] | None
) -> tuple[Checkpoint, DtypePolicy]:
    from wan_loader.formats import open_checkpoint
    from wan_loader.plan.dtype_policy import DtypePolicy

    return open_checkpoint(path, part=part), DtypePolicy(dtype, tuple(keep_fp32 or ()))


def _check_together(kept: Kept, others: list[Kept]) -> None:
    """Raise `KeepError` if a network of a model had to go for another one of it."""
    gone = [one.identity.label for one in others if one.identity.label in kept.dropped]
    if gone:
        reason = f"the networks do not fit together: {gone[0]} had to go for {kept.identity.label}"
        raise KeepError.because(reason, "allow more with --max-gpu, or drop something else")


def _as_json(kept: Kept) -> dict[str, Any]:
    report, identity = kept.report, kept.identity
    document = {"key": identity.key, "device": identity.device, "dropped": list(kept.dropped)}
    return {"target": identity.label, **document, "load": None if report is None else report.to_json()}


def _tell(kept: Kept) -> None:
    from wan_loader.cli.render import output_console, print_load, print_warnings
    from wan_loader.printable import printable

    report, identity = kept.report, kept.identity
    if report is None:
        output_console().print(printable(f"{identity.label} is kept on {kept.device} already"))
    else:
        print_load(report)
        for label in kept.dropped:
            output_console().print(printable(f"dropped for it: {label}"))
        output_console().print(printable(f"kept on {kept.device}: {identity.label}"))
    print_warnings(() if report is None else report.warnings)


@app.command()
def status(json: JsonOut = False, verbose: Verbose = False) -> None:
    """Show what is kept, where, and by how many it is used.

    Example:

        wan-loader standby keep status
    """
    from wan_loader.cli.output import print_json
    from wan_loader.keeper import client

    found = client.status() or {"pid": None, "items": [], "limits": {}}
    if json:
        shown = {name: found[name] for name in ("pid", "items", "limits")}
        print_json({"schema_version": 1, "command": "standby keep status", **shown})
    else:
        _print_status(found)


def _print_status(found: dict[str, Any]) -> None:
    from wan_loader.cli.render import output_console
    from wan_loader.printable import printable
    from wan_loader.sizes import format_age, format_bytes
    from wan_loader.tables import Column, Columns

    console = output_console()
    if not found["items"]:
        console.print("nothing is kept")
        return
    table = Columns(
        "key",
        Column("size", right=True),
        Column("dtype", drop=3),
        Column("users", right=True, drop=2),
        Column("used", drop=1),
        "device",
        Column("path", least=30),
    )
    for one in sorted(found["items"], key=lambda one: float(one["idle_s"])):
        used = f"{format_age(one['idle_s'])} ago" if one["state"] == "kept" else one["state"]
        size, users = format_bytes(one["nbytes"]), str(one["n_users"])
        table.add_row(one["key"][:12], size, one["dtype"], users, used, one["device"], one["label"])
    console.print(table)
    for device, limit in found["limits"].items():
        console.print(printable(f"at most {format_bytes(limit)} on {device}"))


@app.command()
def drop(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PATH | KEY]",
            help="What was kept, a directory that it is in, or the beginning of its key.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything that is kept.")] = False,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Give memory back. What programs use goes when the last of them lets go of it. Exit code 1 if there was nothing.

    Examples:

        wan-loader standby keep drop model/transformer

        wan-loader standby keep drop --all
    """
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console
    from wan_loader.keeper import client
    from wan_loader.printable import printable
    from wan_loader.sizes import format_bytes

    if (path is None) is not everything:
        raise typer.BadParameter("name what is to go, or say --all", param_hint="PATH")
    dropped = client.drop() if path is None else _drop(path)
    if json:
        print_json({"schema_version": 1, "command": "standby keep drop", "dropped": dropped})
    for one in () if json else dropped:
        use = f", once {one['n_users']} more let go of it" if one["n_users"] else ""
        output_console().print(printable(f"{format_bytes(one['nbytes'])} given back{use}: {one['label']}"))
    if not dropped and not everything:
        raise OptionError.because("nothing of it is kept", "see `wan-loader standby keep status`", path=path)


def _drop(path: Path) -> list[dict[str, Any]]:
    """Drop by the path of a checkpoint, as it is opened or as it stands, of a whole model, or by a key's beginning."""
    from wan_loader.errors import CheckpointError
    from wan_loader.formats import open_checkpoint
    from wan_loader.formats.hub_cache import locate
    from wan_loader.keeper import client

    labels = [os.path.abspath(path)]
    with suppress(CheckpointError):  # its files may be gone
        labels.insert(0, os.path.abspath(open_checkpoint(path).path))
    for label in dict.fromkeys(labels):
        if dropped := client.drop(label=label):
            return dropped
    # a whole model's networks are files and directories in its own
    inside = os.path.join(os.path.abspath(locate(os.fspath(path))), "")
    items = (client.status() or {}).get("items", ())
    names = dict.fromkeys(item["label"] for item in items if item["label"].startswith(inside))
    if dropped := [one for name in names for one in client.drop(label=name)]:
        return dropped
    return client.drop(key=str(path)) if len(str(path)) >= _LEAST_KEY else []


#: So many digits of a key are enough to mean it.
_LEAST_KEY = 6


@app.command()
def verify(
    path: PathArgument,
    device: Device = "auto",
    dtype: Dtype = None,
    keep_fp32: KeepFp32 = None,
    part: Part = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Compare what is kept with the checksums that it had: whether a program has written to it. Exit code 1 if so.

    Example:

        wan-loader standby keep verify model/transformer --device cuda --dtype bf16
    """
    import wan_loader
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import output_console
    from wan_loader.printable import printable, some

    networks = _networks(path, part, dtype, keep_fp32) or [_checkpoint(path, part, dtype, keep_fp32)]
    wrong = [
        name
        for checkpoint, policy in networks
        for name in wan_loader.verify_kept(checkpoint, device, dtype=policy.dtype, keep_fp32=policy.keep_fp32)
    ]
    if json:
        print_json({"schema_version": 1, "command": "standby keep verify", "target": str(path), "damaged": wrong})
    elif wrong:
        output_console().print(printable(f"somebody has written to it: {some(wrong)}; drop it, and keep it anew"))
    else:
        output_console().print("every checksum is right")
    if wrong:
        raise typer.Exit(1)


@app.command()
def stop(verbose: Verbose = False) -> None:
    """End the keeper. Memory that programs use stays with them; all other is given back.

    Example:

        wan-loader standby keep stop
    """
    from wan_loader.cli.render import output_console
    from wan_loader.keeper import client

    output_console().print("the keeper has ended" if client.stop() else "there is no keeper")
