"""Bars on a terminal, nothing elsewhere."""

import io
import sys
import threading

from wan_loader.cli.progress import byte_progress, counting_progress, progress_bars, reading_progress
from wan_loader.events import Span


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())  # in the test: pytest sets stderr anew between fixtures and tests
    return sys.stderr


def test_without_a_terminal_there_is_nobody_to_tell(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bars("x") as tell, byte_progress("x") as bytes_tell, reading_progress(5) as observer:
        assert (tell, bytes_tell, observer) == (None, None, None)
    with counting_progress("x", 5) as add:
        add(3)
    assert sys.stderr.getvalue() == ""


def test_bytes_are_one_bar_and_steps_one_for_each_title(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with progress_bars("copying [b]", 2_000_000) as tell:
        tell("copying [b]", 1_000_000, 2_000_000)
    assert "copying [b]" in terminal.getvalue()
    assert "1.0/2.0 MB" in terminal.getvalue()
    with progress_bars(steps=True) as tell:
        tell("text", 1, 1)
        tell("denoise", 3, 50)
    assert "1/1" in terminal.getvalue()
    assert "3/50" in terminal.getvalue()


def test_what_several_threads_read_is_added_up(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with reading_progress(8_000_000) as observer:
        threads = [
            threading.Thread(target=lambda: [observer.record(Span("read", 0, 1, 1000)) for _ in range(1000)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        observer.record(Span("h2d", 0, 1, 1000))
    assert "8.0/8.0 MB" in terminal.getvalue()


def test_bytes_told_as_done_of_a_total(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with byte_progress("warming") as tell:
        tell(3_000_000, 4_000_000)
    assert "3.0/4.0 MB" in terminal.getvalue()
    with counting_progress("verifying", 4_000_000) as add:
        add(1_000_000)
        add(1_000_000)
    assert "2.0/4.0 MB" in terminal.getvalue()
