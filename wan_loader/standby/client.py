"""The process that a user has started, while its program runs in a fork of the server: it stands for the program.

Signals go on to the program, what becomes of it comes back: this process stops when it stops, and ends as it ends.
Imports little; where there is no server, next to nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from wan_loader.standby import place

if TYPE_CHECKING:
    import socket
    from typing import Any

__all__ = ["PATIENCE_S", "ask", "connect", "hand_over"]

#: How long a server may take to answer: with more, a direct start is as good.
PATIENCE_S = 10.0
#: As siginfo has it for signals that the terminal sends, to all processes in its foreground.
_SI_KERNEL = 0x80


def hand_over(entry: str, *, first: str, program: str, fast_path: bool) -> str:
    """Have a program run in a fork of the server, and end as it ends; return if it must be started directly.

    Args:
        entry: The function that runs it, as `module:function`; it finds its arguments in `sys.argv`.
        first: The directory in which its modules are looked for first.
        program: Its file, or -m and its module.
        fast_path: Whether it is to have the fast path, which is in place from the beginning if torch is.

    Returns:
        Why there is no fork: "" if there is no server.
    """
    if not os.path.lexists(place.socket_path()):
        return ""
    import signal

    from wan_loader.standby import world

    given = world.capture() | {"entry": entry, "first": os.path.realpath(first)}
    given |= {"program": program, "fast_path": fast_path}
    if why := world.refusal(given):
        return why
    # from here on none is lost
    signals = _forwarded()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    answer = _offer(given)
    if not isinstance(answer, str):
        _stand_for_it(answer, signals, given["fds"])
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return answer


def ask(document: dict[str, Any]) -> dict[str, Any] | None:
    """Ask the server something; None if there is none, or it does not answer."""
    from wan_loader.standby import wire

    connection = connect()
    if isinstance(connection, str):
        return None
    with connection:
        try:
            wire.send(connection, document)
        except OSError:
            return None
        return wire.receive(connection)


def connect() -> socket.socket | str:
    """Connect to the server, or say why not."""
    import socket

    from wan_loader.system.peers import is_own_peer, not_private, own_directory

    if why := not_private(own_directory()):
        return f"the server's directory {own_directory()} {why}"
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_S)
    try:
        connection.connect(place.socket_path())
    except OSError as error:
        connection.close()
        return f"the server does not answer ({error.strerror or 'it is too busy'})"
    if not is_own_peer(connection):
        connection.close()
        return "the server is somebody else's"
    return connection


def _offer(given: dict[str, Any]) -> socket.socket | str:
    """Offer a program to the server; return the connection if it takes it, or else why not."""
    from wan_loader.standby import wire

    connection = connect()
    if isinstance(connection, str):
        return connection
    cwd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        wire.send(connection, given)
        answer = wire.receive(connection)
        if answer is not None and "ready" in answer:
            # not before: descriptors that nobody takes would stay open
            wire.send(connection, {"go": True}, [*given["fds"], cwd])
            return connection
    except OSError:
        answer = None
    finally:
        os.close(cwd)
    connection.close()
    return "the server does not answer (it has ended)" if answer is None else str(answer["direct"])


def _forwarded() -> set[int]:
    """Return the signals that are for the program: all but those that are about this process, or end it at once."""
    import signal

    own = ["KILL", "STOP", "CHLD", "SEGV", "BUS", "FPE", "ILL", "TRAP", "SYS", "PIPE", "TTIN", "TTOU"]
    return {int(n) for n in signal.valid_signals()} - {int(getattr(signal, f"SIG{name}")) for name in own}


def _stand_for_it(connection: socket.socket, signals: set[int], fds: list[int]) -> NoReturn:
    """Pass signals on for as long as the program runs."""
    import _thread
    import signal

    from wan_loader.standby import wire

    # what this process holds open, others would wait for
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(nothing, fd)
    connection.settimeout(None)
    for number in signals:
        signal.signal(number, signal.SIG_DFL)  # by which it may have to end; they are blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])  # of the connection nobody wants it
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    _thread.start_new_thread(_end_as_it_ends, (connection,))
    while True:
        found = signal.sigwaitinfo(signals)
        is_for_all = found.si_code == _SI_KERNEL or found.si_signo == signal.SIGCONT
        try:
            wire.send(connection, {"signal": found.si_signo, "group": is_for_all})
        except OSError:
            signal.pause()  # it has ended, and so will this process


def _end_as_it_ends(connection: socket.socket) -> NoReturn:
    """Stop and end when the program does; what nobody can tell of has been killed with who watched over it."""
    import _thread
    import resource
    import signal

    from wan_loader.standby import wire

    while (message := wire.receive(connection)) is not None and "stopped" in message:
        os.kill(os.getpid(), signal.SIGSTOP)
    code = -signal.SIGKILL if message is None else message["ended"]
    if code >= 0:
        os._exit(code)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
    )  # the program has left one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
    signal.pthread_kill(_thread.get_ident(), -code)  # the other thread takes those that are for the process
    os._exit(128 - code)
