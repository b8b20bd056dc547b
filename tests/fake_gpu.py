"""A GPU without a GPU: streams whose work is done late, in any order that their events allow, by a driver of fakes.

Device memory is host memory, and a copy takes the bytes that are at its source when it is carried out: a slot, a buffer
or a destination that is used too early shows as wrong bytes.
"""

import ctypes
from collections import defaultdict, deque
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import torch

from wan_loader.devices import cuda


class Happening:
    """What an event stands for since it was last recorded."""

    def __init__(self, *, is_over):
        self.is_over = is_over
        self.at = 0


class FakeGpu:
    """The names of `devices.driver` that `CudaWriter` uses, and those of torch. `rng` decides what is done when."""

    def __init__(self, rng, monkeypatch):
        self._rng = rng
        self._haste = rng.choice([0.0, 0.3, 0.6])
        """How likely it is that some work is done at once."""
        self._queues = defaultdict(deque)
        self._speeds = defaultdict(lambda: rng.choice([1, 30]))
        self._events, self._numbers = {}, count(1)
        self._current = 0
        self.callers = 0
        """The stream that the caller of a load queues work on."""
        self.n_buffers = 0
        self.n_streams = 0
        self.now = 0
        """Pieces of work that were done: the device's clock."""
        monkeypatch.setattr(cuda, "driver", self)
        monkeypatch.setattr(cuda, "_copy_all", self._copy_all)
        monkeypatch.setattr(torch.cuda, "Event", lambda: TorchEvent(self))
        self.torch = SimpleNamespace(
            OutOfMemoryError=torch.OutOfMemoryError, uint8=torch.uint8, inference_mode=torch.inference_mode
        )
        self.torch.empty = self._empty
        self.torch.cuda = SimpleNamespace(
            ExternalStream=lambda handle, device: handle,
            current_stream=lambda device: CallersStream(self, self.callers),
            set_device=lambda device: None,
            stream=self._on,
        )

    def writer(self, observer=None):
        made = cuda.CudaWriter(0, observer)
        made.torch = self.torch
        return made

    # carrying out

    def queue(self, stream, work):
        """Have work done on a stream: a call, or something that must have happened before it goes on."""
        self._queues[stream].append(work)
        while self._rng.random() < self._haste and self._step():
            pass

    def _step(self):
        """Do the next work of one of the streams that need not wait; return False if there is none."""
        ready = [n for n, q in self._queues.items() if q and (not isinstance(q[0], Happening) or q[0].is_over)]
        if not ready:
            return False
        (stream,) = self._rng.choices(ready, [self._speeds[n] for n in ready])
        self.now += 1
        if not isinstance(work := self._queues[stream].popleft(), Happening):
            work()
        return True

    def _until(self, is_over):
        while not is_over():
            assert self._step(), "the streams wait for each other"

    def drain(self):
        """Do everything that is left on any stream."""
        self._until(lambda: not any(self._queues.values()))

    # torch

    def _empty(self, nbytes, *, dtype, device):
        self.n_buffers += 1
        memory = torch.randint(256, (nbytes,), dtype=dtype).as_subclass(DeviceBytes)
        DeviceBytes.gpu = self
        self.queue(self.callers, lambda: memory.fill_(9))  # somebody's work, who had this memory before
        return memory

    @contextmanager
    def _on(self, stream):
        before, self._current = self._current, stream
        yield
        self._current = before

    def _copy_all(self, _, targets, sources):
        mode = torch.is_inference_mode_enabled()

        def copy():
            with torch.inference_mode(mode):
                torch._foreach_copy_(targets, [source.as_subclass(torch.Tensor) for source in sources])

        self.queue_current(copy)

    def queue_current(self, work):
        self.queue(self._current, work)

    # the driver

    def current_context(self):
        return 1

    @contextmanager
    def within(self, context):
        yield

    def take_stream(self, context):
        self.n_streams += 1
        return next(self._numbers)

    def give_stream_back(self, stream, context):
        assert not self._queues[stream]
        self.n_streams -= 1

    def make_event(self, *, timed=False, sleeps=False):
        self._events[event := next(self._numbers)] = Happening(is_over=True)
        return event

    def destroy_event(self, event):
        del self._events[event]

    @property
    def n_events(self):
        return len(self._events)

    def record(self, event, stream):
        self._events[event] = happening = Happening(is_over=False)

        def happen():
            happening.is_over, happening.at = True, self.now

        self.queue(stream, happen)

    def elapsed_ns(self, start, end):
        return self._events[end].at - self._events[start].at

    def is_over(self, event):
        return self._events[event].is_over

    def wait_for(self, event):
        self._until(lambda: self._events[event].is_over)

    def wait_for_stream(self, stream):
        self._until(lambda: not self._queues[stream])

    def wait_in_stream(self, stream, event):
        self.queue(stream, self._events[event])

    def allocation(self, address):
        return address, address

    def copy_to_device(self, copies, stream, *, quick):
        for to, source, nbytes in list(copies):
            self.queue(stream, lambda to=to, source=source, nbytes=nbytes: ctypes.memmove(to, source, nbytes))


class CallersStream:
    """The part of `torch.cuda.Stream` that the writer needs."""

    def __init__(self, gpu, number):
        self._gpu = gpu
        self.cuda_stream = number

    def wait_event(self, event):
        self._gpu.wait_in_stream(self.cuda_stream, event.cuda_event)


class TorchEvent:
    """The part of `torch.cuda.Event` that the writer needs."""

    def __init__(self, gpu):
        self._gpu = gpu
        self.cuda_event = gpu.make_event()

    def record(self, stream):
        self._gpu.record(self.cuda_event, stream.cuda_stream)


class DeviceBytes(torch.Tensor):
    """Device memory, of which a clone is made when its stream comes to it."""

    gpu: FakeGpu

    def clone(self):
        made = torch.empty_like(self).as_subclass(DeviceBytes)
        to, source, nbytes = made.data_ptr(), self.data_ptr(), self.nbytes
        self.gpu.queue_current(lambda: ctypes.memmove(to, source, nbytes))
        self.gpu.queue_current(lambda: made)  # keeps it until then
        return made
