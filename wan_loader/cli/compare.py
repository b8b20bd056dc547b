"""`wan-loader compare`: two results side by side, and a failure where the second is worse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader.cli.options import JsonOut, Verbose, usage_errors
from wan_loader.sizes import format_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wan_loader.bench.compare import Comparison, MeasuredRun

__all__ = ["compare"]

_FAILED = 3
#: Times as much: from here on a change is told with fewer digits.
_MANY = 100


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="What to compare with.", show_default=False)],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="What to judge.", show_default=False)],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:PERCENT%",
            help="Exit with 3 if B is worse by more, or a loader of A fails in B; metrics: median, min, cpu, host, "
            "pinned, device, disk. May be repeated.",
        ),
    ] = None,
    json: JsonOut = False,
    verbose: Verbose = False,
) -> None:
    """Compare two results of bench, load --json or profile -o, and find what became worse.

    Examples:

        wan-loader compare before.json after.json

        wan-loader compare main.json branch.json --fail-if median:5% --fail-if host:10%
    """
    from wan_loader.bench.compare import compare_runs, newly_broken, parse_limit, read_run, regressions
    from wan_loader.cli.output import print_json
    from wan_loader.cli.render import print_warnings

    with usage_errors():
        limits = [parse_limit(text) for text in fail_if or []]
    runs = read_run(before), read_run(after)
    metrics = list(dict.fromkeys(["median", *(limit.metric for limit in limits)]))
    found = compare_runs(*runs, metrics)
    worse = regressions(found, limits)
    if json:
        print_json(_document(runs, found, worse))
    else:
        _print(found, worse)
    print_warnings(_doubts(runs))
    if worse or (limits and newly_broken(*runs)):
        raise typer.Exit(_FAILED)


def _document(
    runs: tuple[MeasuredRun, MeasuredRun], found: Sequence[Comparison], worse: Sequence[Comparison]
) -> dict[str, Any]:
    from wan_loader.bench.compare import newly_broken

    rows = [
        {
            "name": c.name,
            "metric": c.metric,
            "before": c.before,
            "after": c.after,
            "change": c.change if math.isfinite(c.change) else None,
            "within_noise": c.within_noise,
            "regression": c in worse,
        }
        for c in found
    ]
    return {
        "schema_version": 1,
        "command": "compare",
        "before": runs[0].path,
        "after": runs[1].path,
        "comparisons": rows,
        "regressions": len(worse),
        "broken": newly_broken(*runs),
        "warnings": _doubts(runs),
    }


def _doubts(runs: tuple[MeasuredRun, MeasuredRun]) -> list[str]:
    from wan_loader.bench.compare import newly_broken

    before, after = runs
    facts = ("cpu", "cores", "kernel", "gpu", "torch")
    different = [k for k in facts if before.machine.get(k) != after.machine.get(k)]
    notes = [f"the machines differ ({', '.join(different)}): changes may be theirs"] if different else []
    if apart := [f"{k}: {v}, {after.loaded[k]}" for k, v in before.loaded.items() if after.loaded.get(k, v) != v]:
        notes.append(f"not the same was loaded ({'; '.join(apart)}): changes may be due to that")
    broken = newly_broken(before, after)
    notes += [f"{name}: {status} in the second, which is worse than any time" for name, status in broken.items()]
    lost = len(set(before.values) - set(after.values) - set(broken))
    new = len(set(after.values) - set(before.values))
    if lost or new:
        notes.append(
            f"not compared: {format_count(lost, 'measurement')} that only the first has, {new} that only the second has"
        )
    return notes


def _print(found: Sequence[Comparison], worse: Sequence[Comparison]) -> None:
    from wan_loader.cli.render import output_console
    from wan_loader.console import marked
    from wan_loader.sizes import format_bytes, format_seconds
    from wan_loader.tables import Column, Columns

    table = Columns(
        Column("what", least=30),
        Column("metric", drop=1),
        *(Column(title, right=True) for title in ("before", "after", "change")),
        "",
    )
    for c in found:
        shown = format_bytes if c.metric in ("host", "pinned", "device", "disk") else format_seconds
        verdicts = ["[red]worse[/]"] * (c in worse) + ["within noise"] * bool(c.change and c.within_noise)
        change = f"{c.change:+.1%}" if abs(c.change) < _MANY else f"{c.change * 100:+.3g}%"
        table.add_row(c.name, c.metric, shown(c.before), shown(c.after), change, marked(", ".join(verdicts)))
    console = output_console()
    console.print(table)
    if worse:
        console.print(f"{len(worse)} of {len(found)} became worse than allowed", style="red")
