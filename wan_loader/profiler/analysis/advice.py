"""Rules over the evidence of one session that say what to change, and how for the very command that was profiled. Pure.

Each rule says what speaks for it in this session and what it leaves of the time, computed from this session's own
numbers. A rule without evidence says nothing, and wins below 2 % of the wall time, or below 5 ms, are not mentioned.
What several of them win together is `remedies`' matter.
"""

from __future__ import annotations

import os
from shlex import quote
from typing import TYPE_CHECKING

from wan_loader.profiler.analysis.case import Case, cold_share, in_gb, scaled
from wan_loader.profiler.analysis.commands import Program
from wan_loader.profiler.analysis.edits import Edit, converted_load, first_lines
from wan_loader.profiler.analysis.outside import OWN_END
from wan_loader.profiler.analysis.remedies import Part, Remedy, parts_of, worth_following
from wan_loader.profiler.analysis.session import Advice
from wan_loader.profiler.analysis.spared import spared
from wan_loader.sizes import format_seconds
from wan_loader.verdict import ideal_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from wan_loader.profiler.analysis.weight_files import OpenedFile
    from wan_loader.verdict import Evidence

__all__ = ["advise"]

_WORTH = 0.02
_WORTH_S = 0.005
#: A local NVMe drive, for the gain of leaving a slower one.
_NVME_GBPS = 3.0
#: What a start from the stand-by server takes itself.
_FORK_S = 0.3
_FORK = Part("other", "stand-by")
#: Our loader's imports take this share of torch's: 0.24 s of processor time for 1.6.
_LOADER_SHARE = 0.15
_LOADER = Part("import", "wan_loader")
#: Weights that are kept are mapped: measured, 22 ms for 5.6 GB.
_ATTACH_GBPS = 250.0
_SHORT = {"bfloat16": "bf16", "float16": "fp16"}
_MOST_NAMED = 3


def advise(
    e: Evidence,
    program: Program | None = None,
    *,
    files: Mapping[str, OpenedFile] | None = None,
    sources: Mapping[str, str] | None = None,
    target: str = "",
    served: float = 1.0,
) -> tuple[Advice, ...]:
    """Return what is worth following, the largest gain first, then what wins most beside that, and so on.

    Args:
        e: What was recorded.
        program: How it was started; without it, lines to type name no program.
        files: The weight files that were opened.
        sources: The text of the program's own files.
        target: The checkpoint, of a load.
        served: The share of imports that happen where a stand-by server would have done them before.
    """
    case = Case(
        evidence=e,
        parts=parts_of(e),
        program=program or Program(),
        files=files or {},
        sources=sources or {},
        target=target,
        served=served,
    )
    remedies = [remedy for rule in _RULES for remedy in rule(case)]
    return worth_following(case.parts, remedies, max(_WORTH * e.seconds, _WORTH_S))


def _fast_path(c: Case) -> Iterator[Remedy]:
    """Advise the fast path: initialisations and copies that nobody needs are left out, a GPU is served by one plan."""
    found = spared(c)
    if not found:
        return
    command = c.program.under_run()
    text = "start it with wan-loader's fast path inside" if command else "put wan-loader's fast path in"
    code = "with wan_loader.accelerate():" if c.program.inside else "import wan_loader; wan_loader.install()"
    advice = Advice("fast-path", text, "; ".join(why for why, _ in found), 0.0, command=command, code=code)
    yield Remedy(advice=advice, leaves={part: s for _, leaves in found for part, s in leaves.items()})


def _fp32_file(c: Case) -> Iterator[Remedy]:
    """Advise a converted copy, which halves what is read, and is not converted again."""
    e = c.evidence
    if e.kind == "load":
        yield from _fp32_load(c)
        return
    rows = [r for r in e.labels("cast") if "float32 to" in r[0] and r[0].split()[2] in _SHORT]
    nbytes, seconds = sum(r[2] for r in rows), sum(r[1] for r in rows)
    if not nbytes or c.program.is_ours:
        return
    dtype = _SHORT[rows[0][0].split()[2]]
    edits, paths = _edits(c, dtype)
    once = tuple(f"wan-loader cache build {quote(path)} --dtype {dtype}" for path in paths)
    share = min(1.0, nbytes / max(e.nbytes_file, nbytes))
    casts = {Part("cast", row[0]): c.parts.get(Part("cast", row[0]), 0.0) for row in rows}
    # however often they were converted, the copy's pages come once
    touched_s = min(nbytes, e.nbytes_file or nbytes) / 2 / e.ceilings.get("page_cache_gbps", _NVME_GBPS) / 1e9
    leaves = scaled(casts, touched_s / max(sum(casts.values()), touched_s, 1e-9))
    leaves |= scaled(c.seconds("read"), 1 - share / 2)
    evidence = f"{in_gb(nbytes)} of fp32 were converted to {dtype} in {seconds:.2f} s, after being read in full"
    later = "" if once else "; the first start writes it"
    advice = Advice(
        "fp32-file",
        f"keep a copy converted to {dtype}{later}",
        evidence,
        0.0,
        once=once,
        edits=edits,
        code="" if edits else f'wan_loader.load_file(PATH, dtype="{dtype}", cache=True)',
    )
    yield Remedy(advice=advice, leaves=leaves, adds={_LOADER: _loader_s(e)})


def _loader_s(e: Evidence) -> float:
    """Return what the imports of our loader take where torch's take what they took here."""
    torch_s = next((s for name, s, _ in e.labels("import") if name == "torch"), e.ceilings.get("import_torch_s", 1.5))
    return _LOADER_SHARE * torch_s


def _fp32_load(c: Case) -> Iterator[Remedy]:
    e = c.evidence
    if _SHORT.get(e.dtype or "", e.dtype) not in _SHORT.values() or e.fp32_bytes <= e.nbytes_file / 2:
        return
    dtype, path = _SHORT.get(e.dtype or "", e.dtype), c.target or "PATH"
    evidence = f"{in_gb(e.fp32_bytes)} of {in_gb(e.nbytes_file)} in the files are fp32, {dtype} was asked for"
    leaves = scaled(c.seconds("read", "h2d", "cast", "register"), 1 - e.fp32_bytes / e.nbytes_file / 2)
    advice = Advice(
        "fp32-file",
        f"keep a copy converted to {dtype}: cache=True, or --cache",
        evidence,
        0.0,
        once=(f"wan-loader cache build {quote(path)} --dtype {dtype}",),
        command=f"wan-loader load {quote(path)} --dtype {dtype} --cache",
        code=f'wan_loader.load_file({path!r}, dtype="{dtype}", cache=True)',
    )
    yield Remedy(advice=advice, leaves=leaves)


def _edits(c: Case, dtype: str) -> tuple[tuple[Edit, ...], list[str]]:
    """Rewrite the program's own lines that load; return them, and the files whose copies can be made before."""
    edits: dict[tuple[str, int], Edit] = {}
    paths: list[str] = []
    for path, file in c.files.items():
        source = c.sources.get(file.site[0]) if file.site else None
        if file.site is None or source is None:
            continue
        edit = converted_load(source, c.shown(file.site[0]), file.site[1], dtype)
        if edit is None:
            continue
        edits[edit.path, edit.line] = edit
        if "load_into" not in edit.replacement:  # what stays in fp32 is for the class to say, when it is loaded
            paths.append(c.shown(path))
    return tuple(edits.values()), paths[:_MOST_NAMED]


def _standby(c: Case) -> Iterator[Remedy]:
    """Advise the stand-by server, which has imported everything before."""
    command = c.program.forked()
    imports = c.seconds("import")
    if c.evidence.kind != "program" or not command or not imports:
        return
    end = {part: s for part, s in c.seconds("other").items() if part.label == OWN_END}
    rows = [f"{name} {format_seconds(s)}" for name, s, _ in c.evidence.labels("import")[:_MOST_NAMED]]
    evidence = f"imports took {sum(imports.values()):.2f} s ({', '.join(rows)})"
    if sum(end.values()) > _FORK_S:
        evidence += f", and Python's own end {sum(end.values()):.2f} s"
    # what is forked runs with the fast path inside
    found = [] if c.program.loads_in_children else spared(c)
    evidence = "; ".join([evidence, *(why for why, _ in found)])
    advice = Advice(
        "stand-by",
        "start it as a fork of a process that has imported everything"
        + (", with the fast path inside" if found else "")
        + "; from its second start on nothing is imported",
        evidence,
        0.0,
        once=("wan-loader standby start",),
        command=command,
    )
    leaves = {part: s for _, left in found for part, s in left.items()}
    leaves |= scaled({**imports, **end}, 1 - c.served) | {_LOADER: 0.0}
    yield Remedy(advice=advice, leaves=leaves, adds={_FORK: _FORK_S})


def _keep(c: Case) -> Iterator[Remedy]:
    """Advise that weights stay on the GPU between programs."""
    e, moved = c.evidence, c.seconds("read", "cast", "h2d", "register")
    to_device = sum(s.nbytes for s in e.of_phase("h2d"))
    if e.kind != "program" or not (e.cuda and to_device and e.nbytes_file):
        return
    if "--keep" in c.program.argv or any("float32 to" in row[0] for row in e.labels("cast")):
        return
    if c.program.generates:
        command, paths = c.program.with_option("--keep"), [c.program.value_of("--ckpt_dir")]
    else:
        command, paths = c.program.under_run("--keep"), c.weights()[:_MOST_NAMED]
    if not command or not all(paths):
        return
    seconds = sum(moved.values())
    advice = Advice(
        "keep",
        "leave the weights on the GPU between starts, where nothing writes to them",
        f"{in_gb(e.nbytes_file)} were brought to the GPU in {seconds:.2f} s",
        0.0,
        once=tuple(f"wan-loader standby keep {quote(path)} --device {e.device}" for path in paths),
        command=command,
    )
    attached_s = e.nbytes_file / _ATTACH_GBPS / 1e9
    yield Remedy(advice=advice, leaves=scaled(moved, attached_s / seconds if seconds else 0.0))


def _vram_limit(c: Case) -> Iterator[Remedy]:
    """Advise a limit of device memory where networks are sent to the GPU again and again."""
    e, copies = c.evidence, c.seconds("h2d")
    nbytes, device = sum(s.nbytes for s in e.of_phase("h2d")), e.facts.get("device_memory_bytes")
    given = {"--vram_limit", "--vram-limit", "--preset"} & set(c.program.argv)
    if not (c.program.generates and e.cuda and isinstance(device, int) and e.nbytes_file) or given:
        return
    if nbytes > 1.2 * e.nbytes_file:
        evidence = f"{in_gb(nbytes)} went to the GPU, of {in_gb(e.nbytes_file)} in the files: networks take turns there"
        limit = f"{device * 0.95 / 1e9:.0f}GB"
        text = f"let what fits into {limit} stay on the GPU"
        advice = Advice("vram-limit", text, evidence, 0.0, command=c.program.with_option("--vram_limit", limit))
        yield Remedy(advice=advice, leaves=scaled(copies, e.nbytes_file / nbytes))


def _construction(c: Case) -> Iterator[Remedy]:
    built = c.seconds("construct")
    seconds = sum(built.values())
    if rows := c.evidence.labels("construct"):
        evidence = f"building {rows[0][0]} took {rows[0][1]:.2f} s without the random numbers"
        advice = Advice(
            "construction",
            "build the model without memory, and fill it by wan_loader.load_into",
            evidence,
            0.0,
            code=f"with wan_loader.empty_weights():\n    model = {rows[0][0]}(...)\n"
            f"wan_loader.load_into(model, {(c.weights() or ['PATH'])[0]!r}, device={c.evidence.device!r})",
        )
        yield Remedy(advice=advice, leaves=scaled(built, 0.2 / seconds) if seconds > 0.2 else {})


def _one_reader(c: Case) -> Iterator[Remedy]:
    e = c.evidence
    tracks = {s.track for s in e.of_phase("read") if s.nbytes}
    ideal, seconds = ideal_seconds(e, "read"), e.blame.get("read", 0.0)
    if e.kind == "load" and len(tracks) == 1 and ideal is not None and ideal < 0.7 * seconds:
        evidence = f"one thread read everything: {seconds:.2f} s where several would need {ideal:.2f} s"
        command = f"wan-loader load {quote(c.target or 'PATH')}" + (f" --dtype {e.dtype}" if e.dtype else "")
        advice = Advice("one-reader", "read with several threads: leave out --threads", evidence, 0.0, command=command)
        yield Remedy(advice=advice, leaves=scaled(c.seconds("read"), ideal / seconds))


def _cold(c: Case) -> Iterator[Remedy]:
    """Advise to warm the page cache, which was cold though there is room for the files."""
    e, reads = c.evidence, c.seconds("read")
    cache = e.ceilings.get("page_cache_gbps")
    free = int(e.limits.get("memory_available_bytes") or 0)
    seconds = sum(reads.values()) * cold_share(e)
    if not (e.cold_bytes and cache and seconds and free > 2 * e.nbytes_file):
        return
    paths = c.weights()[:_MOST_NAMED] or ["PATH"]
    evidence = f"{in_gb(e.cold_bytes)} came from the disk, in about {seconds:.2f} s; {in_gb(free)} of memory are free"
    warm_s = min(seconds, e.cold_bytes / cache / 1e9)
    edits: tuple[Edit, ...] = ()
    imports_s = 0.0
    if e.kind == "program":
        new = ["import wan_loader", *(f"wan_loader.prewarm({path!r})" for path in paths)]
        edits, imports_s = _at_the_head(c, new), e.blame.get("import", 0.0)
    advice = Advice(
        "cold-cache",
        "read the files into the page cache before the start"
        + (", or beside its imports, by these lines" if edits else ""),
        evidence,
        0.0,
        once=tuple(f"wan-loader warm {quote(path)}" for path in paths),
        code="\n".join(edit.replacement for edit in edits) if imports_s else f"wan_loader.prewarm({paths[0]!r})",
    )
    yield Remedy(advice=advice, leaves=scaled(reads, 1 - (seconds - warm_s) / sum(reads.values())))


def _at_the_head(c: Case, new: list[str]) -> tuple[Edit, ...]:
    """Put lines before the first import of the program that loads."""
    for file in c.files.values():
        source = c.sources.get(file.site[0]) if file.site else None
        if file.site is not None and source is not None:
            edit = first_lines(source, c.shown(file.site[0]), new)
            return () if edit is None else (edit,)
    return ()


def _slow_storage(c: Case) -> Iterator[Remedy]:
    e = c.evidence
    network = bool(e.storage.get("network"))
    what = "a network file system" if network else "a disk that calls itself rotating"
    reads = c.seconds("read")
    seconds = sum(reads.values()) * cold_share(e)
    reached = e.cold_bytes / seconds / 1e9 if seconds > 0 else _NVME_GBPS
    if not network:  # virtual disks often call themselves rotating: what was measured of them counts
        reached = max(reached, e.ceilings.get("disk_gbps", 0.0))
    slow = reached < _NVME_GBPS / 10
    if not (e.cold_bytes and seconds and slow and (network or e.storage.get("rotational"))):
        return
    evidence = f"{in_gb(e.cold_bytes)} were read from {what} ({e.storage.get('filesystem')}) in about {seconds:.2f} s"
    fast_s = min(seconds, e.cold_bytes / _NVME_GBPS / 1e9)
    path = (c.weights() or ["PATH"])[0]
    advice = Advice(
        "slow-storage",
        "keep a copy of the files on a local NVMe drive, at DIR",
        evidence,
        0.0,
        once=(f"wan-loader stage {quote(path)} --to DIR",),
        command=c.program.with_path(path, f"DIR/{os.path.basename(path)}"),
    )
    yield Remedy(advice=advice, leaves=scaled(reads, 1 - (seconds - fast_s) / sum(reads.values())))


def _slots(c: Case) -> Iterator[Remedy]:
    waited = c.evidence.slot_wait_s
    if not waited:
        return
    evidence = f"readers waited {waited:.2f} s for a slot of the pinned ring while nothing else was at its limit"
    advice = Advice("slots", "allow more memory for the pinned ring, or fewer threads", evidence, 0.0)
    paced = c.seconds("wait", "read", "h2d")
    total = sum(paced.values())
    yield Remedy(advice=advice, leaves=scaled(paced, 1 - min(waited, total) / total) if total else {})


_RULES: tuple[Callable[[Case], Iterator[Remedy]], ...] = (
    _fast_path,
    _fp32_file,
    _standby,
    _keep,
    _vram_limit,
    _construction,
    _one_reader,
    _cold,
    _slow_storage,
    _slots,
)
