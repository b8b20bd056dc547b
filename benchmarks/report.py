"""Writes README's performance tables from committed result files, or checks that they are what the files give.

    python benchmarks/report.py            # rewrite README.md and README.zh.md between the two markers
    python benchmarks/report.py --check    # exit with 1 where they differ

`benchmarks/results/readme.toml` names the files and cases: results of `wan-loader bench --export-json`, and of
load_expert.py beside this file. Numbers are medians, with the range of the samples; the fastest is in bold, whoever
it is. A figure needs at least five samples of ours and three of a rival: a table that has fewer is refused, unless
readme.toml says `few = true` for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: Samples that a figure in README needs at least.
OURS_AT_LEAST, RIVALS_AT_LEAST = 5, 3
BEGIN, END = "<!-- performance: begin (python benchmarks/report.py) -->", "<!-- performance: end -->"


@dataclass(frozen=True)
class Words:
    """What a table says, in one language: `readme.toml` has it for each file."""

    title: str
    """The key of a table's title."""
    heading: str
    columns: list[str]
    medians: str
    single: str
    where: str
    faster: str


CHOSEN = tomllib.loads((RESULTS / "readme.toml").read_text())
#: Which file is written in which words.
READMES = {name: Words(**words) for name, words in CHOSEN["words"].items()}
ENGLISH = READMES["README.md"]


@dataclass(frozen=True)
class Row:
    loader: str
    ours: bool
    seconds: float | None
    gbps: float | None = None
    of_limit: float | None = None
    cpu_s: float | None = None
    n: int = 0
    note: str = ""
    fastest: float = 0.0
    slowest: float = 0.0


def rows_of(document: dict, chosen: dict) -> list[Row]:
    """Return the rows of the one case that is chosen; ValueError unless there is exactly one."""
    rows = _rows_of_bench(document, chosen) if document.get("command") == "bench" else _rows_of_expert(document, chosen)
    if not rows:
        raise ValueError(f"{chosen['file']} has nothing that readme.toml asks for: {chosen}")
    return sorted(rows, key=lambda r: r.seconds if r.seconds is not None else float("inf"))


def _rows_of_bench(document: dict, chosen: dict) -> list[Row]:
    wanted = {key: chosen[key] for key in ("cache", "storage", "name") if key in chosen}
    cases = [c for c in document["cases"] if all(wanted.get(k, v) == v for k, v in _names(c).items())]
    if len(cases) != 1:
        raise ValueError(f"{chosen['file']}: {len(cases)} cases fit {wanted}: choose with cache, storage and name")
    return [_row_of_result(result) for result in cases[0]["results"]]


def _names(case: dict) -> dict:
    return {"cache": case["cache"], "storage": case["storage"]["name"], "name": case["name"]}


def _row_of_result(result: dict) -> Row:
    summary, ours = result["summary"], result["loader"].split()[0] == "ours"
    name = " ".join(["wan-loader", *result["loader"].split()[1:]]) if ours else result["loader"]
    if summary is None:
        return Row(name, ours, None, note=result["status"])
    status = "" if result["status"] == "ok" else result["status"]
    return Row(
        name,
        ours,
        summary["median_s"],
        result["gbps"],
        result["of_ceiling"],
        summary["cpu_s"],
        summary["n"],
        status,
        summary["min_s"],
        summary["max_s"],
    )


def _rows_of_expert(document: dict, chosen: dict) -> list[Row]:
    rows = []
    for case in document["cases"]:
        title, _, name = case["case"].partition(", ")
        samples = [s for s in case["samples"] if "error" not in s]
        if title != chosen["case"] or not samples:
            continue
        gbps, seconds = statistics.median(s["gbps"] for s in samples), [s["seconds"] for s in samples]
        ours = samples[0]["loader"] == "wan-loader"
        rows.append(
            Row(
                f"wan-loader io={name}" if ours else name,
                ours,
                statistics.median(seconds),
                gbps,
                gbps / document["copy_ceiling_gbps"],
                statistics.median(s["cpu_seconds"] for s in samples),
                len(samples),
                fastest=min(seconds),
                slowest=max(seconds),
            )
        )
    return rows


def table(document: dict, chosen: dict, words: Words = ENGLISH) -> str:
    """Write one titled table, the machine, and where we lose; ValueError for too few samples."""
    rows = rows_of(document, chosen)
    if (few := _too_few(rows)) and not chosen.get("few"):
        wanted = f"README wants {OURS_AT_LEAST} samples of ours and {RIVALS_AT_LEAST} of each rival"
        raise ValueError(f"{chosen['file']}: {wanted}, and there are fewer of {', '.join(few)}: measure again")
    ranges = any(row.n > 1 for row in rows)
    best = next((r for r in rows if r.seconds is not None and not r.note), None)
    columns = [name for place, name in enumerate(words.columns) if ranges or place != 1]
    heading = words.heading.format(title=chosen[words.title])
    lines = [heading, "", f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    lines += [_line(row, len(columns), ranges=ranges, best=row is best) for row in rows]
    machine = document["machine"]
    told = words.where.format(
        what=words.medians if ranges else words.single,
        gpu=machine.get("gpu") or "no GPU",
        cores=machine["cores"],
        torch=machine["torch"],
        versions=_versions(document),
        path=f"benchmarks/results/{Path(chosen['file'])}",
    )
    ours = next((r for r in rows if r.ours and r.seconds is not None), None)
    faster = [r for r in rows if not r.ours and r.seconds is not None and ours and r.seconds < ours.seconds]
    if faster:
        told += words.faster.format(names=", ".join(r.loader for r in faster))
    return "\n".join([*lines, "", told])


def _too_few(rows: list[Row]) -> list[str]:
    """Name the loaders that have fewer samples than a figure needs; one that failed has no figure."""
    least = {True: OURS_AT_LEAST, False: RIVALS_AT_LEAST}
    return [f"{row.loader} ({row.n})" for row in rows if row.seconds is not None and row.n < least[row.ours]]


def _versions(document: dict) -> str:
    """Write the versions of the rivals' packages, where the result has them."""
    found = {
        package: version
        for loader in document.get("loaders", [])
        if loader["name"] != "ours"
        for package, version in loader.get("packages", {}).items()
        if package != "torch" and version is not None
    }
    return "".join(f", {package} {version}" for package, version in sorted(found.items()))


def _line(row: Row, n_columns: int, *, ranges: bool, best: bool) -> str:
    name = f"**{row.loader}**" if best else row.loader
    if row.seconds is None:
        return f"| {name} | {row.note} " + "| " * (n_columns - 1) + "|"
    note = f" ({row.note})" if row.note else ""
    limit = f"{row.of_limit:.2f}" if row.of_limit is not None else ""
    between = [f"{_digits(row.fastest)} .. {_digits(row.slowest)}"] if ranges else []
    cells = [_digits(row.seconds), *between, _digits(row.gbps), limit, _digits(row.cpu_s), str(row.n)]
    return f"| {name}{note} | {' | '.join(cells)} |"


def _digits(value: float | None) -> str:
    """Write three digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:#.3g}" if value < 99.95 else f"{value:.0f}"


def section(words: Words = ENGLISH) -> str:
    """Write everything between the markers."""
    return "\n\n".join(table(json.loads((RESULTS / c["file"]).read_text()), c, words) for c in CHOSEN["table"])


def replaced(text: str, new: str) -> str:
    """Return README with a new section; ValueError where a marker is missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks {BEGIN} or {END}")
    return f"{head}{begin}\n{new}\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 where README differs")
    options = parser.parse_args()
    for name, words in READMES.items():
        text = (ROOT / name).read_text()
        new = replaced(text, section(words))
        if not options.check:
            (ROOT / name).write_text(new)
        elif new != text:
            sys.exit(f"{name} is not what the result files give: run python benchmarks/report.py")


if __name__ == "__main__":
    main()
