"""The networks on their devices: carries out the steps of a preset.

Entering a step drops what it does not allow, starts fetching what it does, in order of first use, in the background,
and waits only for the network that is about to run. So the next network loads behind the running one, and a switch
to a fetched one costs nothing. Dropped weights are not copied anywhere: they are fetched again, out of the page cache
if it still holds them. A network that is streamed is resident with the part of its weights that has room, and is let go
like any other. Only the thread of the pipeline may call `use` and `close`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader import CancelToken, OptionError, clock_ns, prewarm_files
from wan_pipeline import modules, parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from wan_loader import LoadReport, Observer, Prewarm, StreamedBlocks, StreamReport
    from wan_pipeline.memory_plan import Streaming
    from wan_pipeline.presets import ResidencyStep
    from wan_pipeline.wan_checkpoint import Component

__all__ = ["BackgroundFetch", "FetchCancelledError", "ModuleResidency", "Placement"]

#: Whoever waits for a module asks so often whether to stop.
_ASK_S = 0.05
#: Threads that read a network's files into the page cache, when nothing else is to be done.
_READERS = 8


class FetchCancelledError(Exception):
    """A fetch was cancelled. Raised to whoever waits for it; the module is as empty as before."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A network, with the device and the dtype for its load."""

    component: Component
    device: torch.device
    dtype: torch.dtype | None
    decoder_only: bool = False
    run: parallel.DistributedRun | None = None
    """The processes that load it together."""
    streaming: Streaming | None = None
    """How its blocks are streamed; None: they are not."""
    keep: bool = False
    """Attach to its weights, if they are kept: until it is dropped, it counts as a user of theirs."""


class BackgroundFetch:
    """Work in a daemon thread of its own, which begins when the fetch before it has ended.

    Args:
        name: The name in messages.
        work: The work; it is given the token by which it is stopped.
        after: The fetch that must have ended, well or not, before this one begins.
    """

    def __init__(self, name: str, work: Callable[[CancelToken], None], after: BackgroundFetch | None = None) -> None:
        self.name = name
        self.failure: BaseException | None = None
        self._work = work
        self._after = after
        self._lock = threading.Lock()
        self._begun = False
        self._stop = CancelToken()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name=f"fetch {name}", daemon=True).start()

    @property
    def done(self) -> bool:
        """True once it has ended, well or not."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Wait for the end; raises what made it fail, or `FetchCancelledError`."""
        self._ended.wait()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Ask it to end at its next block; nothing happens to one that has ended."""
        self._stop.cancel(FetchCancelledError(f"fetching the {self.name} was cancelled"))

    def cancel(self) -> None:
        """Stop it, and wait for the end if it has begun; one that has not never will."""
        with self._lock:
            self.stop()
            begun = self._begun
        if begun:
            self._ended.wait()

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._after._ended.wait()
                # else each fetch would keep all that were before it
                self._after = None
            with self._lock:
                # under the lock: `cancel` either finds it begun and waits for the end, or keeps it from beginning
                self._stop.check()
                self._begun = True
            self._work(self._stop)
        # raised to whoever waits: a thread has nobody to raise to
        except BaseException as failure:
            self.failure = failure
        finally:
            self._ended.set()


@dataclass(slots=True)
class ResidencyLog:
    """The loads and the waits of a residency, for reports."""

    loads: list[tuple[str, int, int, LoadReport]] = field(default_factory=list)
    """Each load: network, start_ns, end_ns, report."""
    streams: dict[str, StreamReport] = field(default_factory=dict)
    """The course of each network that was streamed and let go, the last time."""
    waits: list[tuple[str, int, int]] = field(default_factory=list)
    """Each first use of a step: network, start_ns and end_ns of waiting for it."""
    device_peak_nbytes: int = 0
    """Bytes that tensors held at most."""
    device_reserved_nbytes: int = 0
    """Bytes that the allocator held at most."""


class ModuleResidency:
    """The keeper of networks on their devices, as the steps allow.

    Args:
        placements: The networks in the order of first use.
        steps: The steps of a generation.
        observer: An observer of the loads' spans.
        warm_ahead: Read what comes next into the page cache while a network runs.
        warming: A warm-up of their files that is under way.
        on_loaded: Told of every load, with the tensors by their names in the file, before anybody else has them.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        steps: Sequence[ResidencyStep],
        *,
        observer: Observer | None = None,
        warm_ahead: bool = False,
        warming: Prewarm | None = None,
        on_loaded: Callable[[str, Mapping[str, torch.Tensor]], None] | None = None,
    ) -> None:
        self._on_loaded = on_loaded
        self._placements: dict[str, Placement] = {p.component.name: p for p in placements}
        self._steps = {step.uses: step for step in steps}
        self._observer = observer
        self._warm_ahead = warm_ahead
        self._warming = warming
        self._modules: dict[str, torch.nn.Module] = {}
        self._current: str | None = None
        self._fetches: dict[str, BackgroundFetch] = {}
        self._weights: dict[str, dict[str, torch.Tensor]] = {}
        self._streamed: dict[str, StreamedBlocks] = {}
        self._last: BackgroundFetch | None = None
        self._lock = threading.Lock()
        self._built = threading.Condition(self._lock)
        self._closed = threading.Event()
        self.log = ResidencyLog()

    def start(self) -> None:
        """Begin fetching what the first step allows; returns at once. Needs no module yet."""
        self._prepare(next(iter(self._steps)))

    def provide(self, name: str, module: torch.nn.Module) -> None:
        """Say which module, built and empty, is a network; needed before it is used."""
        with self._lock:
            self._modules[name] = module
            self._bind(name)
            self._built.notify_all()

    def use(self, name: str) -> None:
        """Make a network ready to run: returns at once if it is, else when it has been fetched."""
        if name == self._current:
            return
        start_ns = clock_ns()
        self._prepare(name)
        self._finish(name)
        self._current = name
        self.log.waits.append((name, start_ns, clock_ns()))
        self.note_peak()

    def wait_all(self) -> None:
        """Wait until everything that was begun has arrived; raises the first failure."""
        # a copy: `_finish` takes out what failed
        for name in list(self._fetches):
            self._finish(name)

    def resident(self) -> tuple[str, ...]:
        """Name the networks that are loaded now."""
        return tuple(name for name, fetch in self._fetches.items() if fetch.done and fetch.failure is None)

    def cancel(self, name: str) -> None:
        """Stop fetching a network that is not needed after all; `use` fetches it again."""
        if (fetch := self._fetches.get(name)) is not None and not fetch.done:
            self._drop(name)

    def close(self) -> None:
        """Stop what is under way and free everything."""
        self._closed.set()
        if self._warming is not None:
            self._warming.stop()
        self.drop_all()

    def drop_all(self) -> tuple[str, ...]:
        """Free every network, those that are on their way, too, and name them; the next use of one fetches again."""
        names = tuple(self._fetches)
        # all are asked to end before one of them is waited for
        for fetch in self._fetches.values():
            fetch.stop()
        for name in names:
            self._drop(name)
        self._current = None
        return names

    @property
    def is_empty(self) -> bool:
        """True if no network is there or on its way."""
        return not self._fetches

    @property
    def weights_nbytes(self) -> int:
        """The bytes of the weights that are there."""
        return sum(modules.nbytes(module) for module in self._modules.values())

    def streams(self) -> dict[str, StreamReport]:
        """Return the course of each network that is streamed or was, until now."""
        return self.log.streams | {name: one.report for name, one in list(self._streamed.items())}

    def note_peak(self) -> None:
        """Add the device's peak so far to the log: each load lets the allocator's own begin anew."""
        device = next((p.device for p in self._placements.values() if p.device.type == "cuda"), None)
        if device is not None:
            import torch

            log, cuda = self.log, torch.cuda
            log.device_peak_nbytes = max(log.device_peak_nbytes, cuda.max_memory_allocated(device))
            log.device_reserved_nbytes = max(log.device_reserved_nbytes, cuda.max_memory_reserved(device))

    def _prepare(self, name: str) -> None:
        """Drop what the step of `name` does not allow, and start fetching what it does."""
        if self._closed.is_set():
            raise OptionError.because("the pipeline was closed", "make another; one that sleeps can be used again")
        allowed = self._steps[name].resident
        for other in [n for n in self._fetches if n not in allowed]:
            self._drop(other)
        # nothing is ready until `_finish`, also if that raises: the next `use` must not take what was dropped for there
        self._current = None
        # what runs first, then the others in the order of first use
        for wanted in sorted(allowed, key=lambda n: n != name):
            if wanted not in self._fetches:
                self._last = self._fetches[wanted] = BackgroundFetch(wanted, self._loading(wanted), self._last)
        if self._warm_ahead:
            order = [*self._placements]
            ahead = [n for n in order[order.index(name) + 1 :] if n not in allowed]
            # behind the last fetch, so that the load has the disk alone; nobody waits for it
            BackgroundFetch("files", lambda stop: self._warm(ahead), self._last)

    def _finish(self, name: str) -> None:
        """Wait for a fetch; one that failed may be tried again."""
        try:
            self._fetches[name].wait()
        except BaseException:
            self._fetches.pop(name, None)
            raise

    def _drop(self, name: str) -> None:
        # the end is waited for: weights that came later would stay
        self._fetches.pop(name).cancel()
        self.note_peak()
        self._weights.pop(name, None)
        if (streamed := self._streamed.pop(name, None)) is not None:
            self.log.streams[name] = streamed.report
            streamed.close()
        if name in self._modules:
            modules.empty(self._modules[name])
        if self._placements[name].device.type == "cuda":  # what the allocator kept would count against the contract
            import torch

            torch.cuda.empty_cache()

    def _loading(self, name: str) -> Callable[[CancelToken], None]:
        placement = self._placements[name]

        def load(cancel: CancelToken) -> None:
            if placement.streaming is not None:
                self._stream(name, placement, placement.streaming, cancel)
                return
            if self._warming is not None:  # the load has the disk alone; what was warmed, it finds
                self._warming.stop()
            self.note_peak()
            start_ns = clock_ns()
            if placement.run is not None:
                weights, report = parallel.fetch(
                    placement.run, placement.component, dtype=placement.dtype, cancel=cancel, observer=self._observer
                )
            else:
                weights, report = modules.fetch(
                    placement.component,
                    device=placement.device,
                    dtype=placement.dtype,
                    decoder_only=placement.decoder_only,
                    keep=placement.keep,
                    # views of mapped pages, where nothing is to be converted: they take no memory of this process
                    io="mapped" if placement.device.type == "cpu" else "auto",
                    cancel=cancel,
                    observer=self._observer,
                )
            if self._on_loaded is not None:
                self._on_loaded(name, weights)
            self._hand_over(name, weights)
            self.note_peak()
            self.log.loads.append((name, start_ns, clock_ns(), report))

        return load

    def _stream(self, name: str, placement: Placement, streaming: Streaming, cancel: CancelToken) -> None:
        """Fill a module whose blocks come as it runs: it must have been built, the parameters are its own."""
        with self._built:
            while name not in self._modules:
                cancel.check()
                self._built.wait(_ASK_S)
        start_ns = clock_ns()
        if streaming.cache_nbytes is not None:
            self._fill_cache(placement.component.files if not streaming.n_read else [], cancel)
        self.note_peak()
        streamed = self._streamed[name] = modules.stream(
            self._modules[name],
            placement.component,
            streaming,
            device=placement.device,
            dtype=placement.dtype,
            cancel=cancel,
            observer=self._observer,
        )
        self.note_peak()
        self.log.loads.append((name, start_ns, clock_ns(), streamed.report.load))

    def _fill_cache(self, files: Sequence[str], cancel: CancelToken) -> None:
        """Have a network's pages in the page cache: those that are registered would else come one by one."""
        if self._warming is not None:
            self._warming.stop()
        with prewarm_files(files, threads=_READERS) as filling:
            while not filling.wait(_ASK_S):
                cancel.check()

    def _hand_over(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Give weights to the module, if it is built already; else they are kept until `provide`."""
        with self._lock:
            self._weights[name] = weights
            self._bind(name)

    def _bind(self, name: str) -> None:
        """Give a network its weights, once both are there. The one place where weights and modules meet."""
        if name in self._modules and name in self._weights:
            modules.adopt(self._modules[name], self._placements[name].component, self._weights.pop(name))

    def _warm(self, names: Sequence[str]) -> None:
        if self._warming is not None:
            self._warming.stop()
        if not self._closed.is_set():
            self._warming = prewarm_files([file for n in names for file in self._placements[n].component.files])
