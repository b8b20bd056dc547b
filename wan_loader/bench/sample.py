"""The program of the fresh process that takes one sample.

Reads a request as JSON from stdin and writes one result to the file that it names; what a loader prints goes wherever
the parent sent it. The order is: imports, the device's context, counters and residency, the clock, the load, the
device's end (on the CPU: every page of the tensors touched, since some loaders only map the file), counters, and last
the comparison of the tensors. Ends without clean-up: how long a loader takes to shut down is not measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.bench.contract import Loader, LoadTask, NotApplicableError, Outcome
from wan_loader.bench.loaders import LOADERS
from wan_loader.bench.throttle import throttle_reads
from wan_loader.events import clock_ns
from wan_loader.system.files import write_text
from wan_loader.system.machine import machine_card, peak_resident, processors, reset_peak_resident
from wan_loader.system.page_cache import knowledge_of
from wan_loader.warming.evict import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["answer", "main", "take_sample"]

_PAGE = 4096


def main() -> None:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.buffer.read())
    result = answer(request)
    write_text(Path(request["result"]), json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what is asked for; a failure is an answer too: {"status", "reason"}."""
    try:
        match request["kind"]:
            case "ceiling":
                return measure_ceiling(request)
            case "convert":
                return convert(request)
            case "device":
                return describe_device(request["device"])
        return take_sample(request)
    except NotApplicableError as reason:
        return {"status": "not applicable", "reason": str(reason)}
    except Exception as error:  # whatever a loader raises is its result
        text = " ".join(str(error).split())[:300]
        return {"status": "failed", "reason": f"{type(error).__name__}: {text}"}


def _task(request: Mapping[str, Any]) -> LoadTask:
    fields = dict(request["task"])
    return LoadTask(**{**fields, "files": tuple(fields["files"])})


def convert(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the loader's own format; say how long that took, which is stated beside its times."""
    loader, task = LOADERS[request["loader"]], _task(request)
    assert loader.convert is not None
    _make_ready(loader, task)
    start_ns = clock_ns()
    loader.convert(task)
    seconds = (clock_ns() - start_ns) / 1e9
    with open(task.packed, "rb") as packed:
        os.fsync(packed.fileno())  # writing back would disturb what is measured next
    return {"status": "ok", "seconds": seconds}


def describe_device(device: str) -> dict[str, Any]:
    """Return the device by its full name, and the machine's card."""
    from wan_loader.devices.resolve import device_card, resolve_device

    found = resolve_device(device)
    return {"status": "ok", "device": str(found), "machine": {**machine_card(), **device_card(str(found))}}


def measure_ceiling(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the GB/s of this machine at best: copies to the device, O_DIRECT reads of cold files, the page cache."""
    from wan_loader.profiler.probe import measure

    files, found, notes = request["files"], {}, []
    for name in request["names"]:
        try:
            if name == "h2d_pinned_gbps":
                device = request["device"]
                found[name] = measure.measure_device(int(device.partition(":")[2] or 0))[name]
            elif name == "disk_gbps":
                found[name] = measure.measure_disk(files, seconds=3)
            else:
                found[name] = measure.measure_page_cache(files)
        except (measure.UnmeasuredError, OSError, RuntimeError) as error:
            notes.append(f"{name} was not measured: {error}")
    return {"status": "ok", "values": found, "notes": notes}


def take_sample(request: Mapping[str, Any]) -> dict[str, Any]:
    """Take one load, timed, counted and, if asked for, compared."""
    loader, task = LOADERS[request["loader"]], _task(request)
    if reason := loader.why_not_applicable(task):
        raise NotApplicableError(reason)
    if request.get("rate"):
        throttle_reads(request["rate"])
    _make_ready(loader, task)
    _start_device(task.device)
    watched = [task.packed] if task.packed else list(task.files)
    facts = {
        "status": "ok",
        "nbytes_watched": sum(os.path.getsize(path) for path in watched),
        "resident_before": resident_bytes(watched),
        "residency": knowledge_of(watched).name.lower(),
    }
    outcome, measured = _timed(loader, task)
    memory = _memory(task.device, outcome.tensors.values())
    report = outcome.report() if outcome.report is not None else None
    if report is not None:
        memory["pinned_bytes"] = report["memory"]["pinned_bytes"]
    result = {**facts, **measured, **memory, "report": _short_report(report)}
    if request.get("check"):
        result |= _checked(task, outcome)
    return result


def _make_ready(loader: Loader, task: LoadTask) -> None:
    """Set a loader's variables and import it, before any clock; it may find that it cannot do the task."""
    os.environ.update(loader.environment)
    for module in loader.modules:
        import_module(module)
    if loader.prepare is not None:
        loader.prepare(task)


def _timed(loader: Loader, task: LoadTask) -> tuple[Outcome, dict[str, Any]]:
    """Time the load itself: all that is between the two readings of the clock, and of the counters."""
    reset_peak_resident()
    gc.collect()  # what the imports have left: the collector would come for it in the middle of some load
    read_before, busy_before = _read_bytes_of_all(), _busy_seconds()  # the slow one is outside of the other
    start_ns = clock_ns()
    outcome = loader.load(task)
    returned_ns = clock_ns()
    if task.device.startswith("cuda"):
        _synchronize(task.device)
    else:
        _touch(outcome.tensors.values())
    end_ns = clock_ns()
    busy, read = _busy_seconds(), _read_bytes_of_all()
    seconds = (end_ns - start_ns) / 1e9
    measured = {
        "seconds": seconds,
        "call_seconds": (returned_ns - start_ns) / 1e9,
        "read_bytes": None if read is None or read_before is None else read - read_before,
        **_difference(busy_before, busy, seconds),
        "phases": _phases(outcome.spans, start_ns, end_ns),
    }
    if outcome.spans and task.device == "cpu":
        measured["phases"]["touch"] = [[measured["call_seconds"], seconds]]
    return outcome, measured


def _checked(task: LoadTask, outcome: Outcome) -> dict[str, Any]:
    from wan_loader.bench.check import compare_tensors

    compared, problems = compare_tensors(task, outcome)
    if problems:
        return {"status": "wrong", "reason": "; ".join(problems), "compared_tensors": compared}
    return {"compared_tensors": compared}


def _start_device(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        # makes the context, which takes up to seconds and is no part of a load
        torch.zeros(1, device=device)
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _synchronize(device: str) -> None:
    import torch

    torch.cuda.synchronize(device)


def _touch(tensors: Iterable[Any]) -> None:
    """Read a byte of every page, so that what was only mapped is read now."""
    import torch

    for tensor in tensors:
        nbytes, address = tensor.untyped_storage().nbytes(), tensor.untyped_storage().data_ptr()
        if nbytes > 2 * _PAGE:
            # of the whole storage, through one view of bytes: dtypes do not matter, and views are not read twice
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())[::_PAGE].sum()
        elif nbytes:
            _ = ctypes.c_ubyte.from_address(address).value, ctypes.c_ubyte.from_address(address + nbytes - 1).value


def _busy_seconds() -> tuple[float, float]:
    """Return the CPU-seconds until now: of this process with children that it has waited for, and of the machine."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used), _machine_busy_s()


def _read_bytes_of_all() -> int | None:
    """Return the bytes fetched from storage until now, by this process and all that it started. Costs milliseconds.

    None where the kernel does not tell. Of processes that have just ended nothing is known any more.
    """
    own = _read_bytes("self")
    return None if own is None else own + sum(_read_bytes(pid) or 0 for pid in _descendants())


def _descendants() -> list[int]:
    import psutil

    return [p.pid for p in psutil.Process().children(recursive=True)]


def _read_bytes(pid: int | str) -> int | None:
    """Return the bytes fetched from storage by a process and children that it has waited for; page faults included."""
    try:
        return int(Path(f"/proc/{pid}/io").read_text().partition("\nread_bytes: ")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _machine_busy_s() -> float:
    """Return the CPU-seconds that all processors spent on anything but waiting, since boot."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        # user nice system idle iowait irq softirq steal; what guests use is in user already
        idle = int(words[3]) + int(words[4])
        return (sum(int(w) for w in words[:8]) - idle) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _difference(before: tuple[float, float], after: tuple[float, float], seconds: float) -> dict[str, Any]:
    used, busy = after[0] - before[0], after[1] - before[1]
    others = max(0.0, busy - used)
    return {
        "cpu_seconds": used,
        # the kernel counts in ticks of 10 ms: of a short load nothing can be said
        "others_share": min(1.0, others / (seconds * processors())) if seconds > 0.3 else None,
    }


def _memory(device: str, tensors: Iterable[Any]) -> dict[str, Any]:
    """Return peaks in bytes; None for what cannot be known of a loader, such as one that allocates by itself."""
    import torch

    peaks: dict[str, Any] = {"host_peak_bytes": peak_resident(), "pinned_bytes": None, "device_peak_bytes": None}
    if device.startswith("cuda"):
        peaks["pinned_bytes"] = _pinned_by_torch()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        peak = torch.cuda.max_memory_allocated(device)
        peaks["device_peak_bytes"] = peak if peak >= sum(storages.values()) else None
    return peaks


def _pinned_by_torch() -> int | None:
    """Return the peak of torch's own pinned allocator, where this torch tells it and the loader used it."""
    import torch

    stats: dict[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()
    return int(stats.get("allocated_bytes.peak", 0)) or None


def _phases(spans: Iterable[Any], start_ns: int, end_ns: int) -> dict[str, list[list[float]]]:
    """Return when each phase was busy, in seconds from the start; neighbours that no picture tells apart are one."""
    gap = (end_ns - start_ns) / 400
    merged: dict[str, list[list[float]]] = {}
    for span in sorted(spans, key=lambda s: s.start_ns):
        row = merged.setdefault(span.name, [])
        if row and span.start_ns - row[-1][1] <= gap:
            row[-1][1] = max(row[-1][1], span.end_ns)
        else:
            row.append([span.start_ns, span.end_ns])
    return {name: [[(a - start_ns) / 1e9, (b - start_ns) / 1e9] for a, b in row] for name, row in merged.items()}


def _short_report(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {key: report[key] for key in ("io", "phases", "bottleneck", "memory", "settings", "warnings")}


if __name__ == "__main__":
    main()
