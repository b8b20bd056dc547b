"""A program in a fork behaves at a terminal as one that was started there."""

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time

import pytest
from standbys import is_there

_PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGWINCH, lambda *_: print("size", *os.get_terminal_size(), flush=True))
print("ready", os.getpid(), sys.stdin.isatty(), sys.stdout.line_buffering, flush=True)
while True:
    try:
        line = input()
    except (EOFError, OSError):  # it may be seen before SIGHUP comes by way of the client
        time.sleep(30)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise
    print("got", line)
"""


class Terminal:
    """A program that was started at a terminal of its own, and what it has printed there."""

    def __init__(self, words, env):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execvpe(words[0], words, env)
        self.said = ""

    def read_until(self, text):
        end = time.monotonic() + 20
        while text not in self.said:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, self.said
            try:
                self.said += os.read(self.fd, 4096).decode()
            except OSError:  # nobody has it open any more
                break
        assert text in self.said, self.said
        before, _, self.said = self.said.partition(text)
        return before

    def write(self, text):
        os.write(self.fd, text.encode())

    def resize(self, lines, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def wait(self, options=0):
        """The status, of a process that stops too if that is asked for."""
        end = time.monotonic() + 20
        while not (found := os.waitpid(self.pid, os.WNOHANG | options))[0]:
            assert time.monotonic() < end
            time.sleep(0.01)
        return found[1]

    def close(self):
        os.close(self.fd)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            return


@pytest.fixture
def terminal(standby, script):
    words = standby.words("run", "--quiet", script(_PROGRAM))
    terminal = Terminal(words, standby.env | {"PYTHONUNBUFFERED": ""})
    yield terminal
    terminal.close()


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def begin(terminal):
    terminal.read_until("ready ")
    pid, facts = terminal.read_until("\n").split(maxsplit=1)
    assert facts.strip() == "True True"
    assert int(pid) != terminal.pid
    return int(pid)


def test_lines_are_read_and_ctrl_c_interrupts(terminal):
    program = begin(terminal)
    terminal.write("one\n")
    terminal.read_until("got one")
    terminal.write("\x03")
    terminal.read_until("interrupted")
    terminal.read_until("KeyboardInterrupt")
    assert os.WTERMSIG(terminal.wait()) == signal.SIGINT
    assert not is_there(program)


def test_ctrl_z_stops_both_and_they_go_on(terminal):
    program = begin(terminal)
    terminal.write("\x1a")
    assert os.WIFSTOPPED(terminal.wait(os.WUNTRACED))
    assert is_stopped(program)
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.write("two\n")
    terminal.read_until("got two")
    terminal.write("\x1a")
    assert os.WIFSTOPPED(terminal.wait(os.WUNTRACED))
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.write("\x1c")  # Ctrl-\
    assert os.WTERMSIG(terminal.wait()) == signal.SIGQUIT
    assert not is_there(program)


def test_the_size_of_the_window(terminal):
    begin(terminal)
    terminal.resize(33, 77)
    terminal.read_until("size 77 33")


def test_a_terminal_that_is_closed(terminal):
    program = begin(terminal)
    os.close(terminal.fd)
    terminal.fd = os.open(os.devnull, os.O_RDONLY)
    assert os.WTERMSIG(terminal.wait()) == signal.SIGHUP
    assert not is_there(program)
