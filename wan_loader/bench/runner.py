"""The sequence of a bench: places and cases one after the other, loaders in turn within each, one process a sample.

Within a case the loaders take turns, and each round begins with another one, so that what changes over time (heat,
neighbours, the disk's own cache) hits all of them alike. A loader that fails is reported and not run again in that
case; nothing that a loader does ends the bench.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_loader.bench.child import ask
from wan_loader.bench.contract import Loader, LoadTask, missing_package
from wan_loader.bench.storage import Place, copied_files, leftovers, part_of, read_into_cache, scratch
from wan_loader.errors import OutputError
from wan_loader.formats import open_checkpoint
from wan_loader.plan.dtype_policy import DtypePolicy
from wan_loader.profiler.probe.system_facts import storage_facts
from wan_loader.sizes import format_bytes, format_count, format_seconds
from wan_loader.warming.evict import evict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wan_loader.formats import Checkpoint

__all__ = ["Case", "LoaderSetup", "Result", "Settings", "distinct_names", "has_turn", "run_cases"]

_PACKED_SHARE = 1.05


@dataclass(frozen=True, slots=True)
class LoaderSetup:
    """A loader with settings: one line of a table."""

    label: str
    loader: Loader
    io: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a bench."""

    paths: Sequence[str]
    entries: Sequence[LoaderSetup]
    places: Sequence[Place]
    caches: Sequence[str]
    device: str
    """The device as it was resolved: cpu or cuda:N."""
    dtype: str | None = None
    repeat: int = 5
    rival_repeat: int | None = None
    """Samples of each rival; None: as many as of ours."""
    time_limit_s: float = 300.0
    part: int | None = None


@dataclass(slots=True)
class Result:
    """The samples of one loader with its settings in one case."""

    entry: LoaderSetup
    status: str = "ok"
    reason: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    compared_tensors: int | None = None
    conversion_s: float | None = None
    packed: str = ""

    def fail(self, answer: dict[str, Any]) -> None:
        """Take over a status that ends this loader's part in the case."""
        self.status, self.reason = answer["status"], answer.get("reason", "")


@dataclass(slots=True)
class Case:
    """One checkpoint in one place in one state of the page cache."""

    path: str
    name: str
    """The end of the path that tells it from the others."""
    place: Place
    cache: str
    files: list[str] = field(default_factory=list)
    nbytes: int = 0
    n_tensors: int = 0
    format: str = ""
    file_dtype: str = ""
    is_part: bool = False
    storage: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    failure: str = ""
    """The cause for which nothing was measured."""


def run_cases(settings: Settings, tell: Callable[[str], None], cases: list[Case]) -> None:
    """Measure everything.

    Args:
        settings: The checkpoints, places, states of the cache and loaders.
        tell: Given a line for each thing done.
        cases: The results go here, each when it is begun, so that what was measured is there if an interrupt ends it.

    Raises:
        CheckpointError: A checkpoint cannot be loaded as asked for; nothing was measured.
    """
    checkpoints = [open_checkpoint(path) for path in settings.paths]
    for checkpoint in checkpoints:
        DtypePolicy(settings.dtype).check(checkpoint, checkpoint.tensors)
    for path, name, checkpoint in zip(settings.paths, distinct_names(settings.paths), checkpoints, strict=True):
        for place in settings.places:
            _Bench(settings, tell, Case(path, name, place, ""), checkpoint).run(cases)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or as many as it takes to tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for count in range(1, max(map(len, parts), default=0)):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(paths)


def has_turn(number: int, total: int, wanted: int) -> bool:
    """Say if a loader that gets `wanted` of `total` rounds has one in round `number`, the first; they lie evenly."""
    return number * wanted // total != (number - 1) * wanted // total


class _Bench:
    """The measurement of one checkpoint in one place."""

    def __init__(self, settings: Settings, tell: Callable[[str], None], case: Case, checkpoint: Checkpoint) -> None:
        self._settings = settings
        self._tell = tell
        self._place = case.place
        self._files = part_of(checkpoint, settings.part)
        is_part = len(self._files) < len(checkpoint.files)
        facts = open_checkpoint(self._files) if is_part else checkpoint
        self._notes: list[str] = []
        self._converted: list[Result] = []
        if settings.part is not None and not is_part and facts.nbytes_file > settings.part:
            n_files, size = format_count(len(self._files), "file"), format_bytes(facts.nbytes_file)
            self._notes = [f"--part takes whole files: this is all of {case.name}, {n_files}, {size}"]
        # by bytes, not by tensors: norms are many and small
        weights: dict[str, int] = {}
        for tensor in facts.tensors:
            weights[tensor.dtype] = weights.get(tensor.dtype, 0) + tensor.nbytes
        self._case = replace(
            case,
            nbytes=facts.nbytes,
            n_tensors=len(facts.tensors),
            format=facts.format,
            file_dtype=max(weights, key=lambda d: weights[d], default="float32"),
            is_part=is_part,
        )

    def run(self, cases: list[Case]) -> None:
        """Measure in each state of the cache, and add the cases to the list as they begin."""
        caches = ["simulated"] if self._place.rate else list(self._settings.caches)
        n_before = len(cases)
        try:
            with ExitStack() as stack:
                for note in self._notes:
                    self._tell(note)
                self._warn_of_leftovers()
                files = stack.enter_context(copied_files(self._place, self._files))
                self._case = replace(self._case, files=files, storage=storage_facts(files[0]))
                prepared = [self._prepare(entry, stack) for entry in self._settings.entries]
                for cache in caches:
                    results = [replace(result, samples=[]) for result in prepared]
                    case = replace(self._case, cache=cache, notes=list(self._notes), results=results)
                    cases.append(case)
                    if cache == "cold" and case.storage.get("in_memory"):
                        case.failure = f"{case.storage['filesystem']} lies in memory: it is never cold"
                    else:
                        self._run_case(case)
        except OutputError as error:
            self._tell(f"{self._place.name}: {error}")
            left = caches[len(cases) - n_before :]
            cases += [replace(self._case, cache=c, failure=str(error)) for c in left]

    def _warn_of_leftovers(self) -> None:
        if self._place.directory is None:
            return
        if found := leftovers(self._place.directory):
            self._tell(f"{found[0]} was left by a bench that was killed or still runs: remove it if none does")
        size = format_bytes(sum(os.path.getsize(f) for f in self._files))
        self._tell(f"{self._place.name}: copying {size} to {self._place.directory}")

    def _task(self, result: Result, case: Case) -> LoadTask:
        entry = result.entry
        # reads of mapped pages would go past the throttle
        io = "buffered" if case.place.rate and entry.io == "auto" else entry.io
        return LoadTask(
            files=tuple(case.files),
            format=case.format,
            file_dtype=case.file_dtype,
            device=self._settings.device,
            dtype=self._settings.dtype,
            directory="" if case.is_part else str(Path(case.files[0]).absolute().parent),
            packed=result.packed,
            io=io,
            threads=entry.threads,
        )

    def _prepare(self, entry: LoaderSetup, stack: ExitStack) -> Result:
        """Find out whether a loader can take part, and convert for one that has its own format."""
        result = Result(entry)
        loader = entry.loader
        if (package := missing_package(loader)) is not None:
            result.fail({"status": "not installed", "reason": f"pip install {package}"})
        elif self._place.rate and (loader.name != "ours" or entry.io == "mapped"):
            reason = "only reads of our own loader's ring can be slowed down"
            result.fail({"status": "not applicable", "reason": reason})
        elif why := loader.why_not_applicable(self._task(result, self._case)):
            result.fail({"status": "not applicable", "reason": why})
        elif loader.convert is not None:
            self._convert(result, stack)
        return result

    def _convert(self, result: Result, stack: ExitStack) -> None:
        """Write a loader's own format, unless it was written for another loader of the same format."""
        loader = result.entry.loader
        for other in self._converted:
            if other.entry.loader.convert is loader.convert and other.status == "ok":
                result.packed, result.conversion_s = other.packed, other.conversion_s
                return
        self._tell(f"{self._place.name}: converting for {result.entry.label}")
        nbytes = int(sum(os.path.getsize(f) for f in self._case.files) * _PACKED_SHARE)
        try:
            # beside the checkpoint, so that both formats come from the same storage
            home = stack.enter_context(scratch(Path(self._case.files[0]).absolute().parent, nbytes))
        except OutputError as error:
            result.fail({"status": "failed", "reason": f"no room for its own format: {error}"})
            return
        result.packed = str(home / loader.packed_name)
        answer = self._ask("convert", result, self._case)
        if answer["status"] == "not applicable":
            result.fail(answer)
        elif answer["status"] != "ok":
            result.fail({**answer, "reason": f"while converting: {answer.get('reason', '')}"})
        result.conversion_s = answer.get("seconds")
        self._converted.append(result)

    def _ask(self, kind: str, result: Result, case: Case, **more: Any) -> dict[str, Any]:
        request = {"kind": kind, "loader": result.entry.loader.name, "task": asdict(self._task(result, case)), **more}
        return ask(request, time_limit_s=self._settings.time_limit_s)

    def _run_case(self, case: Case) -> None:
        self._measure_ceilings(case)
        ours, rivals = self._settings.repeat, self._settings.rival_repeat or self._settings.repeat
        total = max(ours, rivals)
        for number in range(total):
            shift = number % len(case.results)
            for result in (*case.results[shift:], *case.results[:shift]):
                wanted = ours if result.entry.loader.name == "ours" else rivals
                if result.status == "ok" and has_turn(number, total, wanted):
                    self._sample(case, result, f"{number + 1}/{total}")

    def _sample(self, case: Case, result: Result, number: str) -> None:
        watched = [result.packed] if result.packed else case.files
        if case.cache == "cold":
            evict(watched)
        elif case.cache in ("warm", "simulated"):
            read_into_cache(watched)
        # once is enough, and comparing takes longer than loading
        check = result.compared_tensors is None
        answer = self._ask("sample", result, case, check=check, rate=case.place.rate)
        result.samples.append(answer)
        name = f"{case.name}, {case.place.label}, {case.cache}, {number}: {result.entry.label}"
        if answer["status"] == "ok":
            result.compared_tensors = answer.get("compared_tensors", result.compared_tensors)
            self._tell(f"{name}: {format_seconds(answer['seconds'])}")
        else:
            result.fail(answer)
            self._tell(f"{name}: {result.status}: {result.reason}")

    def _measure_ceilings(self, case: Case) -> None:
        """Measure what the device and the storage can do, in this run and in this place."""
        names = ["h2d_pinned_gbps"] if self._settings.device.startswith("cuda") else []
        if case.cache == "cold":
            evict(case.files)
            names.append("disk_gbps")
        elif case.cache == "warm" and not names:
            names.append("page_cache_gbps")
        request = {"kind": "ceiling", "names": names, "files": case.files, "device": self._settings.device}
        answer = ask(request, time_limit_s=self._settings.time_limit_s)
        case.ceilings = dict(answer.get("values", {}))
        case.notes += answer.get("notes", [])
        if answer["status"] != "ok":
            case.notes.append(f"ceilings were not measured: {answer['reason']}")
        if case.place.rate:
            case.ceilings["simulated_gbps"] = case.place.rate / 1e9
