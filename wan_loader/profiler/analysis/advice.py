"""Rules over the evidence of one session that say what to change. Pure.

Each rule says what speaks for it in this session and what it would win, computed from this session's own numbers. A
rule without evidence says nothing, and wins below 2 % of the wall time, or below 5 ms, are not mentioned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.profiler.analysis.session import Advice
from wan_loader.verdict import ideal_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wan_loader.verdict import Evidence

__all__ = ["advise"]

_WORTH = 0.02
_WORTH_S = 0.005
#: A local NVMe drive, for the gain of leaving a slower one.
_NVME_GBPS = 3.0
_EMPTY = "build the model under `with wan_loader.empty_weights():`"


def advise(e: Evidence) -> tuple[Advice, ...]:
    """Return all that applies, the largest gain first."""
    found = [advice for rule in _RULES for advice in rule(e) if advice.gain_s >= max(_WORTH * e.seconds, _WORTH_S)]
    return tuple(sorted(found, key=lambda a: -a.gain_s))


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _fp32_file(e: Evidence) -> Iterator[Advice]:
    """Advise a converted copy, which halves what is read: fp32 in the file, less wanted."""
    if e.kind == "load" and e.dtype in ("bf16", "fp16", "bfloat16", "float16") and e.fp32_bytes > e.nbytes_file / 2:
        moved = sum(e.blame.get(name, 0.0) for name in ("read", "h2d", "cast", "register"))
        evidence = f"{_gb(e.fp32_bytes)} of {_gb(e.nbytes_file)} in the files are fp32, {e.dtype} was asked for"
        gain = moved * e.fp32_bytes / e.nbytes_file / 2
        yield Advice(
            "fp32-file",
            f"keep a copy converted to {e.dtype}: cache=True, or --cache",
            evidence,
            gain,
        )
    rows = [r for r in e.labels("cast") if "float32 to" in r[0] and r[0].split()[2] in ("bfloat16", "float16")]
    nbytes, seconds = sum(r[2] for r in rows), sum(r[1] for r in rows)
    if e.kind == "program" and nbytes:
        evidence = f"{_gb(nbytes)} of fp32 were converted in {seconds:.2f} s, after being read in full"
        gain = seconds + e.blame.get("read", 0.0) / 2
        yield Advice("fp32-file", "store the weights in the dtype you use", evidence, gain)


def _random_init(e: Evidence) -> Iterator[Advice]:
    """Advise against weights that are drawn and then overwritten."""
    seconds = e.blame.get("random_init", 0.0)
    if seconds and (e.nbytes_file or "assign" in e.phases):
        nbytes = e.phases["random_init"].nbytes
        loaded = ", and weights are loaded over them" if e.nbytes_file else ""
        evidence = f"{_gb(nbytes)} were filled with random numbers in {seconds:.2f} s{loaded}"
        text = f"{_EMPTY}, then fill it: wan_loader.load_into(module, path, device=...)"
        yield Advice("random-init", text, evidence, seconds)


def _construction(e: Evidence) -> Iterator[Advice]:
    seconds = e.blame.get("construct", 0.0)
    if rows := e.labels("construct"):
        evidence = f"building {rows[0][0]} took {rows[0][1]:.2f} s without the random numbers"
        text = f"{_EMPTY}: memory is not allocated twice"
        yield Advice("construction", text, evidence, max(0.0, seconds - 0.2))


def _cpu_cast(e: Evidence) -> Iterator[Advice]:
    """Advise against converting on the CPU before a copy to a GPU."""
    rows = [r for r in e.labels("cast") if "on the CPU" in r[0] or "converting copy" in r[0]]
    seconds, nbytes = sum(r[1] for r in rows), sum(r[2] for r in rows)
    if rows and e.cuda:
        ideal = nbytes / e.ceilings.get("cast_gpu_gbps", 500.0) / 1e9
        evidence = f"{_gb(nbytes)} were converted on the CPU in {seconds:.2f} s"
        text = "copy first, convert on the GPU: tensor.to(device).to(dtype), or wan_loader.load_file(..., dtype=...)"
        yield Advice("cpu-cast", text, evidence, min(e.blame.get("cast", 0.0), seconds) - ideal)


def _pageable(e: Evidence) -> Iterator[Advice]:
    rows = [r for r in e.labels("h2d") if "pageable" in r[0]]
    seconds, nbytes = sum(r[1] for r in rows), sum(r[2] for r in rows)
    rate = e.ceilings.get("h2d_pinned_gbps")
    if rows and rate:
        evidence = (
            f"{_gb(nbytes)} went to the GPU from pageable memory in {seconds:.2f} s; pinned reaches {rate:.0f} GB/s"
        )
        yield Advice("pageable", "copy from pinned memory: wan_loader does it", evidence, seconds - nbytes / rate / 1e9)


def _one_reader(e: Evidence) -> Iterator[Advice]:
    tracks = {s.track for s in e.of_phase("read") if s.nbytes}
    ideal, seconds = ideal_seconds(e, "read"), e.blame.get("read", 0.0)
    if len(tracks) == 1 and ideal is not None and ideal < 0.7 * seconds:
        evidence = f"one thread read everything: {seconds:.2f} s where several would need {ideal:.2f} s"
        text = "read with several threads" + ("" if e.kind == "program" else ": leave out --threads")
        yield Advice("one-reader", text, evidence, seconds - ideal)


def _cold(e: Evidence) -> Iterator[Advice]:
    """Advise to warm the page cache, which was cold though there is room for the files."""
    seconds, cache = e.blame.get("read", 0.0), e.ceilings.get("page_cache_gbps")
    free = int(e.limits.get("memory_available_bytes") or 0)
    if e.cold_bytes and cache and free > 2 * e.nbytes_file:
        evidence = f"{_gb(e.cold_bytes)} came from the disk; {_gb(free)} of memory are free"
        text = "read the files into the page cache before: wan-loader warm PATH; or beside it: wan_loader.prewarm(PATH)"
        yield Advice("cold-cache", text, evidence, seconds - e.nbytes_file / cache / 1e9)


def _slow_storage(e: Evidence) -> Iterator[Advice]:
    network = bool(e.storage.get("network"))
    what = "a network file system" if network else "a disk that calls itself rotating"
    seconds = e.blame.get("read", 0.0)
    reached = e.cold_bytes / seconds / 1e9 if seconds > 0 else _NVME_GBPS
    if not network:  # virtual disks often call themselves rotating: what was measured of them counts
        reached = max(reached, e.ceilings.get("disk_gbps", 0.0))
    slow = reached < _NVME_GBPS / 10
    if e.cold_bytes and slow and (network or e.storage.get("rotational")):
        evidence = f"{_gb(e.cold_bytes)} were read from {what} ({e.storage.get('filesystem')}) in {seconds:.2f} s"
        gain = seconds - e.cold_bytes / _NVME_GBPS / 1e9
        yield Advice("slow-storage", "keep a copy of the files on a local NVMe drive", evidence, gain)


def _taking_turns(e: Evidence) -> Iterator[Advice]:
    """Advise against reading, converting and copying one after the other."""
    parts = [e.blame.get(name, 0.0) for name in ("read", "cast", "h2d", "assign")]
    gain = sum(parts) - max(parts)
    busy = sum(e.phases[n].busy_s for n in ("read", "cast", "h2d", "assign") if n in e.phases)
    if e.kind == "program" and gain and busy < 1.1 * sum(parts):
        evidence = f"reading, converting, copying took turns: {sum(parts):.2f} s, the longest alone {max(parts):.2f} s"
        yield Advice("sequential", "load through wan-loader, which does them at the same time", evidence, gain)


def _imports(e: Evidence) -> Iterator[Advice]:
    for package, seconds, _ in e.labels("import"):
        if package not in ("torch", "python") and seconds > 0.3:
            text = f"import {package} only where it is used, or while the weights are being read"
            yield Advice("import", text, f"importing {package} itself took {seconds:.2f} s", seconds)


def _pressure(e: Evidence) -> Iterator[Advice]:
    stalled = float(e.limits.get("memory_stalled_s") or 0.0)
    if stalled > 0.1:
        evidence = f"processes of this machine stalled on memory for {stalled:.2f} s meanwhile"
        yield Advice(
            "memory-pressure", "give the program more memory, or hold fewer copies of the weights", evidence, stalled
        )


def _slots(e: Evidence) -> Iterator[Advice]:
    seconds = e.slot_wait_s
    if seconds:
        evidence = f"readers waited {seconds:.2f} s for a slot of the pinned ring while nothing else was at its limit"
        yield Advice("slots", "allow more memory for the pinned ring, or fewer threads", evidence, seconds)


_RULES: tuple[Callable[[Evidence], Iterator[Advice]], ...] = (
    _fp32_file,
    _random_init,
    _construction,
    _cpu_cast,
    _pageable,
    _one_reader,
    _cold,
    _slow_storage,
    _taking_turns,
    _imports,
    _pressure,
    _slots,
)
