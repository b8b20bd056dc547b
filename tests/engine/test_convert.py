"""The threads that convert: failures, cancelling, and what is promised to whoever drives them."""

import errno
import os
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

import wan_loader
from wan_loader.engine import convert
from wan_loader.plan import engine_settings
from wan_loader.plan.blocks import Transport
from wan_loader.plan.engine_settings import TransferMode


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(engine_settings, "_PIECE_BYTES", 8192)
    monkeypatch.setattr(engine_settings, "_PIECE_BYTES_OF_MANY", 8192)


@pytest.fixture
def path(tmp_path):
    save_file({f"w{i}": torch.randn(100_000) for i in range(4)}, tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


def converters():
    return [thread for thread in threading.enumerate() if thread.name.startswith("converter")]


def test_the_plan_says_so_and_threads_end(path):
    result = wan_loader.load(path, dtype="bfloat16", threads=3)
    assert result.plan.settings.mode is TransferMode.CONVERTED
    assert result.plan.settings.threads == result.plan.settings.n_slots == 3
    assert result.report.memory.pinned_bytes == 0
    assert not converters()


def test_a_read_that_fails_names_the_file(path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(convert, "read_at", failing)
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, dtype="bfloat16")
    assert caught.value.path == str(path)
    assert not converters()


def test_a_short_read_is_continued(path, monkeypatch):
    plain = convert.read_at
    monkeypatch.setattr(convert, "read_at", lambda fd, address, n, offset: plain(fd, address, min(n, 1001), offset))
    loaded = wan_loader.load_file(path, dtype="bfloat16")
    expected = wan_loader.load_file(path)
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_a_file_that_ends_too_soon_is_an_error(path, monkeypatch):
    monkeypatch.setattr(convert, "read_at", lambda *_: 0)
    with pytest.raises(wan_loader.CheckpointError, match="truncated"):
        wan_loader.load_file(path, dtype="bfloat16")


def test_cancelling_ends_all_within_a_second(path, monkeypatch):
    token, plain = wan_loader.CancelToken(), convert.read_at

    def slow(*args):
        time.sleep(0.05)
        return plain(*args)

    monkeypatch.setattr(convert, "read_at", slow)
    timer = threading.Timer(0.2, token.cancel)
    timer.start()
    start = time.monotonic()
    with pytest.raises(wan_loader.LoadCancelledError):
        wan_loader.load_file(path, dtype="bfloat16", cancel=token)
    assert time.monotonic() - start < 1.5
    assert not converters()


def test_a_read_that_hangs_keeps_what_it_writes_to(path, monkeypatch):
    """The load ends at once, and its memory goes when the read returns."""
    token, plain, go, closed = wan_loader.CancelToken(), convert.read_at, threading.Event(), threading.Event()
    close = convert.PinnedRing.close

    def hanging(*args):
        token.cancel()
        go.wait(20)
        return plain(*args)

    monkeypatch.setattr(convert, "read_at", hanging)
    monkeypatch.setattr(convert.PinnedRing, "close", lambda self: closed.set() or close(self))
    start = time.monotonic()
    with pytest.raises(wan_loader.LoadCancelledError):
        wan_loader.load_file(path, dtype="bfloat16", cancel=token)
    assert time.monotonic() - start < 3
    assert not closed.is_set()
    go.set()
    assert closed.wait(10)


def test_what_has_arrived_is_passed_on_however_quick_the_threads_are(tmp_path, monkeypatch):
    """They leave no piece for which the calling thread would wait: it still does not allocate all that there is."""
    save_file({f"w{i}": torch.randn(1 << 18) for i in range(40)}, tmp_path / "f.safetensors")
    plain, n_drawn = convert._Conversion._add, []

    def add(self, blocks, destinations):
        plain(self, blocks, destinations)
        n_drawn.append(len(blocks))
        while self._pieces.qsize() or not self._done:
            time.sleep(0.001)

    monkeypatch.setattr(convert._Conversion, "_add", add)
    arrivals = wan_loader.iter_file(tmp_path / "f.safetensors", io="buffered", dtype="bfloat16", threads=2)
    next(arrivals)
    assert sum(n_drawn) <= 8  # two batches
    assert sum(1 for _ in arrivals) == 39
    assert sum(n_drawn) > 30


def test_a_thread_that_cannot_begin_is_an_error(path, monkeypatch):
    """Nobody else would take the pieces that are left for it."""

    def failing():
        raise MemoryError("no room for a thread's own")

    monkeypatch.setattr(convert, "divide_nothing", failing)
    with pytest.raises(MemoryError):
        wan_loader.load_file(path, dtype="bfloat16", threads=2)
    assert not converters()


def test_where_no_thread_is_allowed_the_caller_converts(path, monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(convert.threading.Thread, "start", refused)
    loaded = wan_loader.load_file(path, dtype="bfloat16")
    monkeypatch.undo()
    expected = wan_loader.load_file(path)
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_only_what_is_in_the_page_cache_is_read_so(path):
    def mode(*transports, **options):
        return engine_settings.engine_settings(
            set(transports), io="auto", threads=None, memory_limit=1 << 36, processors=4, **options
        ).mode

    converts = {"cuda": False, "converts": True, "reads_in_place": True, "resident": True}
    assert mode(Transport.BUFFERED, **converts) is TransferMode.CONVERTED
    assert mode(Transport.BUFFERED, Transport.DIRECT, **converts) is TransferMode.IN_PLACE
    assert mode(Transport.BUFFERED, **converts | {"resident": False}) is TransferMode.IN_PLACE
    assert mode(Transport.BUFFERED, **converts | {"converts": False}) is TransferMode.IN_PLACE
    assert mode(Transport.BUFFERED, **converts | {"reads_in_place": False}) is TransferMode.STAGED
