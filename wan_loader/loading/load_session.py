"""One load from its first moment to its result: clocks, spans, memory peaks, and the clean-up after a failure.

The steps are called in their order, by whoever loads: `api` for one process, and the wrappers around a load (`cache`,
`distributed`) with steps of their own between them.

    request -> open -> plan -> run -> result
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from wan_loader.cancel import CancelToken
from wan_loader.devices.cuda import get_ready as get_device_ready
from wan_loader.devices.resolve import current, device_peak_bytes, reset_device_peak
from wan_loader.engine.activity import loading
from wan_loader.errors import HostMemoryError
from wan_loader.events import Recorder, clock_ns, span
from wan_loader.loading.probe import probe
from wan_loader.loading.report import MemoryReport
from wan_loader.loading.result import LoadResult
from wan_loader.loading.run import collect, run
from wan_loader.plan.engine_settings import MAX_READS
from wan_loader.plan.plan import make_plan
from wan_loader.system.interpreter import paused_gc, short_turns
from wan_loader.system.machine import free_memory, peak_resident, reset_peak_resident
from wan_loader.system.posix import trim_heap
from wan_loader.system.posix_aio import get_ready
from wan_loader.system.threads import in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    import torch

    from wan_loader.engine.open_files import Check
    from wan_loader.events import Observer, Span
    from wan_loader.formats.checkpoint_facts import Checkpoint
    from wan_loader.loading.run import TransferResult
    from wan_loader.plan.plan import LoadPlan
    from wan_loader.plan.request import LoadRequest
    from wan_loader.system.page_cache import Residency

__all__ = ["LoadSession"]

#: Between two unregistrations in the background: whoever uses the device meanwhile waits for one at most.
_RELEASE_PAUSE_S = 0.001


class _Watched:
    """A recorder of spans that also tells the caller's observer, until that fails: it is not obeyed, only reported."""

    def __init__(self, observer: Observer) -> None:
        self.recorder = Recorder()
        self.failure: Exception | None = None
        self._observer = observer

    def record(self, span: Span) -> None:
        self.recorder.record(span)
        # without a lock: threads may call a failing observer once more each, which does no harm
        if self.failure is None:
            try:
                self._observer.record(span)
            except Exception as failure:
                self.failure = failure.with_traceback(None)  # its frames hold what was running, weights included


class LoadSession:
    """A load under way. A context manager: leaving it with an error releases everything that was taken.

    Without an observer nothing is recorded but counters.

    Args:
        cancel: Stops the load.
        observer: Is told of spans; None: nobody.
        keeps_peaks: Leave the peaks of memory to the program: those of a load are counted from where they are set to
            now, by torch and the system, for the whole process.
    """

    def __init__(
        self, *, cancel: CancelToken | None = None, observer: Observer | None = None, keeps_peaks: bool = False
    ) -> None:
        self._keeps_peaks = keeps_peaks
        self.cancel = cancel or CancelToken()
        self._watched = None if observer is None else _Watched(observer)
        self._start_ns = clock_ns()
        self._transfer: TransferResult | None = None
        self._stack = ExitStack()

    @property
    def observer(self) -> Observer | None:
        """The one to tell of spans; None: nobody."""
        return self._watched

    def span(self, name: str) -> AbstractContextManager[None]:
        """Record the body as a span of a phase."""
        return span(self._watched, name)

    def __enter__(self) -> LoadSession:
        self._stack.enter_context(paused_gc())
        self._stack.enter_context(short_turns())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._stack:
            if error is not None:
                self.forget()
                # the frames of what was running hold weights, and a cancelled token keeps its error
                traceback.clear_frames(tb)

    def forget(self) -> None:
        """Release what the last run took, for another try.

        Memory must not go while the driver still has it registered: a later load would get its old pages.
        """
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.state.release()

    def open(self, request: LoadRequest) -> Checkpoint:
        """Read the headers, if nobody has. Meanwhile the system gets ready for reads, and the device for copies."""
        self.cancel.check()
        if str(request.device) != "cpu":
            get_ready(MAX_READS)
            get_device_ready(request.device, converts=request.policy.may_convert)
        with self.span("header"):
            return request.open()

    def plan(
        self,
        request: LoadRequest,
        checkpoint: Checkpoint,
        *,
        reads: Mapping[int, tuple[int, int]] | None = None,
        read_unit: int | None = None,
        n_sharers: int = 1,
        residency: Residency | None = None,
    ) -> LoadPlan:
        """Ask the system what must be known, and decide. The arguments are those of `make_plan` and `probe`."""
        self.cancel.check()
        facts = probe(checkpoint, request, n_sharers=n_sharers, residency=residency, observer=self._watched)
        if not self._keeps_peaks:
            reset_peak_resident()
            reset_device_peak(facts.device)
        make = partial(make_plan, request, checkpoint, reads=reads, read_unit=read_unit)
        with self.span("init"):
            try:
                return make(facts)
            except HostMemoryError:
                trim_heap()  # gives back what was freed and is kept for the next allocation
                return make(replace(facts, host_free=free_memory()))

    def run(
        self, plan: LoadPlan, check: Check | None = None, memory: Callable[[int], torch.Tensor] | None = None
    ) -> TransferResult:
        """Carry a plan out, to its end. The arguments are those of `run`."""
        with current(plan.facts.device), loading():
            arrivals = run(plan, check=check, memory=memory, cancel=self.cancel, observer=self._watched)
            self._transfer = collect(arrivals)
        self.cancel.check()  # while it still is all or nothing
        return self._transfer

    def result(
        self,
        plan: LoadPlan,
        transfer: TransferResult,
        *,
        warnings: Iterable[str] = (),
        settings: Mapping[str, object] | None = None,
    ) -> LoadResult:
        """End the load: from here on, what it took is released.

        Args:
            plan: The plan that was carried out.
            transfer: The result of the run.
            warnings: For the report, beside those of the plan.
            settings: For the report, beside those of the plan.
        """
        seconds, state, device = (clock_ns() - self._start_ns) / 1e9, transfer.state, plan.facts.device
        stats = state.stats()
        memory = MemoryReport(peak_resident(), stats.pinned_nbytes, device_peak_bytes(device), stats.registered_nbytes)
        # released below: an error from here on must not do so a second time
        self._transfer = None
        if plan.facts.cuda:  # unregistering takes time that nobody has to wait for
            in_background(partial(state.release, _RELEASE_PAUSE_S), "release")
        else:
            state.release()
        watched = self._watched
        if watched is not None and watched.failure is not None:
            failure = watched.failure
            warnings = (*warnings, f"the observer failed, and was told no more: {type(failure).__name__}: {failure}")
        return LoadResult(
            tensors=transfer.tensors,
            plan=plan,
            stats=stats,
            seconds=seconds,
            memory=memory,
            spans=tuple(watched.recorder.spans) if watched is not None else (),
            warnings=tuple(warnings),
            settings=dict(settings or {}),
        )
