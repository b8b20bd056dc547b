"""A `DeviceWriter` without a device: for tests of the engine, and of what every writer promises."""

import ctypes
import queue
import threading
import time

from wan_loader.devices.writer import PinError
from wan_loader.system.posix import PAGE

_ONE_MORE = bytes(min(n + 1, 9) for n in range(256))


class FakeCopyEvent:
    def __init__(self, copies, segments):
        self.copies, self.segments = copies, segments
        self.event = threading.Event()

    def done(self):
        return self.event.is_set()

    def wait(self):
        self.event.wait()


class FakeStream:
    def __init__(self, device):
        self.device = device
        self.thread = threading.get_ident()

    def submit(self, sources):
        assert threading.get_ident() == self.thread, "a stream is for the thread that made it"
        return self.device.submit(sources)


class FakeDevice:
    """Copies late, from a thread of its own, out of the source as it is by then: early reuse shows as wrong bytes."""

    def __init__(self, sizes, *, delay_s=0.0, pin_s=0.0, can_pin=True, refuse=lambda n, read_only: False, fail_at=None):
        self.memory = [bytearray(n) for n in sizes]
        self.n_copied = [bytearray(n) for n in sizes]  # how often each byte was copied
        self.can_pin = can_pin
        self.threads = set()
        self.pinned, self.max_pinned, self.n_pins = {}, 0, 0
        self.n_submits, self.addresses = 0, set()
        self._delay_s, self._pin_s, self._refuse, self._fail_at = delay_s, pin_s, refuse, fail_at
        self._queue = queue.SimpleQueue()
        self._pending, self._n_told = [], 0
        self.n_bound = 0
        self._thread = threading.Thread(target=self._run, name="fake device", daemon=True)
        self._thread.start()

    def _run(self):
        while (copy_event := self._queue.get()) is not None:
            time.sleep(self._delay_s)
            for storage, at, source, nbytes in copy_event.copies:
                self.memory[storage][at : at + nbytes] = ctypes.string_at(source, nbytes)
                self.n_copied[storage][at : at + nbytes] = self.n_copied[storage][at : at + nbytes].translate(_ONE_MORE)
            copy_event.event.set()

    def bind(self, destinations):
        self.n_bound += len(destinations)

    def place(self, segment):
        return None

    def stream(self):
        assert self.n_bound
        return FakeStream(self)

    def pin(self, address, nbytes, *, read_only):
        self.threads.add(threading.get_ident())
        self.n_pins += 1
        if self._refuse(self.n_pins, read_only):
            raise PinError("refused by the fake")
        time.sleep(self._pin_s)
        self.pinned[address] = nbytes
        self.max_pinned = max(self.max_pinned, sum(self.pinned.values()))

    def unpin(self, address):
        self.pinned.pop(address, None)  # what was refused may be given back too
        return True

    def submit(self, sources):
        segments = [segment for source in sources for segment in source.block.segments]
        assert all(segment.storage < self.n_bound for segment in segments), "copied to what is not allocated yet"
        self.threads.add(threading.get_ident())
        self.n_submits += 1
        self.addresses.update(source.address // PAGE for source in sources)
        if self._fail_at is not None and self.n_submits >= self._fail_at[0]:
            raise self._fail_at[1]
        copies = [
            (p.storage, p.storage_start, source.address + p.file_start - source.block.start, p.nbytes)
            for source in sources
            for p in source.block.segments
        ]
        copy_event = FakeCopyEvent(copies, segments)
        self._pending.append(copy_event)
        self._queue.put(copy_event)
        return copy_event

    def arrived(self):
        there = [event for event in self._pending[self._n_told :] if event.event.is_set()]
        self._n_told += len(there)  # they are set in their order
        return [segment for event in there for segment in event.segments]

    def finish(self):
        for copy_event in self._pending:
            copy_event.event.wait()

    def close(self):
        self._queue.put(None)
        self._thread.join()
