"""Messages of processes beside the collectives: that they live, how far they are, what failed.

It all goes through the store that torch.distributed was started with (a small key-value server), so it works while a
collective hangs and before the first one. Each process counts up a heartbeat; a process that fails leaves its error;
the others notice either within seconds. A process that is gone without a word (killed, out of memory) is noticed when
its heartbeat has stood still for `SILENCE_S`; one that ended without ever coming, by its exit note (`exit_note`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from wan_loader.distributed.exit_note import read_exit_note
from wan_loader.errors import DistributedError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

__all__ = ["GRACE_S", "SILENCE_S", "Liveness", "own_connection"]

#: A process whose heartbeat stands still for so long counts as gone.
SILENCE_S = 6.0
#: How long a process has to end by itself after another one failed.
GRACE_S = 1.5
_BEAT_S = 0.25
_POLL_S = 0.01
#: Polls between two looks at whether the process that is waited for has ended.
_POLLS_A_LOOK = 25
_MAX_TEXT = 4000
_REACH_S = 5.0


def own_connection(store: Any) -> Any:
    """Open another connection to a store: one that others use may be held for as long as they wait.

    Raises:
        DistributedError: The process that holds the store is gone; torch would try for half an hour.
        OptionError: An old torch opens no other connection to a store of this kind.
    """
    base = store
    while hasattr(base, "underlying_store"):  # under its prefixes
        base = base.underlying_store
    try:
        if hasattr(base, "port"):
            socket.create_connection((base.host, base.port), timeout=_REACH_S).close()
    except OSError as error:
        raise DistributedError(_store_is_gone(error)) from error
    return store.clone() if hasattr(store, "clone") else _connect_again(base)


def _connect_again(base: Any) -> Any:
    """Do what `clone` does, which an old torch lacks (2.7 does, 2.13 does not).

    The prefixes of a store cannot be asked for. In their place comes what they are for, in a run of torchrun: keys of
    an attempt that has failed are not found in the next one.
    """
    import torch.distributed

    stores: Any = torch.distributed
    match type(base).__name__:
        case "TCPStore":
            store = stores.TCPStore(base.host, base.port, None, False, base.timeout, wait_for_workers=False)
        case "FileStore":
            store = stores.FileStore(base.path, -1)
        case "HashStore":  # of this process alone
            store = base
        case name:
            raise OptionError.because(
                f"torch {torch.__version__} opens no second connection to a {name}", "use a newer torch"
            )
    return stores.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Liveness:
    """The processes of a run or a load, as one of them sees them. A context manager that tells the others of an error.

    All of them make one with the same name, which no two runs share.

    Args:
        store: The key-value store, through a connection of its own (`own_connection`).
        rank: This process.
        ranks: All processes that take part, this one among them.
        name: The prefix of its keys in the store.
        patience_s: The time that `agree` waits for a process that has not come yet; None waits for ever.
        on_failure: Called with what happened, in a thread of its own, when another process has failed or is gone and
            this one has not closed `GRACE_S` later: it may hang in a collective.
        outer: The run that this load belongs to, where there is one; what happens there happens here, too.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: Sequence[int],
        name: str,
        *,
        patience_s: float | None = None,
        on_failure: Callable[[str], None] | None = None,
        outer: Liveness | None = None,
    ) -> None:
        self.rank = rank
        self.ranks = tuple(ranks)
        self.patience_s = patience_s
        self.on_failure = on_failure
        self._outer = outer
        self._store = store
        self._name = name
        self._here: set[int] = {rank}
        self._problem: str | None = None
        self._noticed = threading.Event()
        self._end = threading.Event()
        self._watch = threading.Thread(target=self._watching, name="liveness", daemon=True)

    def __enter__(self) -> Liveness:
        try:
            self._store.set(self._key("beat", self.rank), "0")
        except RuntimeError as error:
            raise DistributedError(_store_is_gone(error)) from error
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        if error is not None:
            self.fail(error)

    def close(self) -> None:
        """Stop watching and being watched, after the last `agree`."""
        self._end.set()
        if self._watch.ident is not None:
            # never without a limit: a call to a store that is stopped but not dead does not return
            self._watch.join(1.0)

    def fail(self, error: BaseException) -> None:
        """Leave an error for the others, unless one of them was first. What waits here ends, too."""
        self._problem = self._known() or _sentence(self.rank, error)[:_MAX_TEXT]
        text = json.dumps([self.rank, self._problem])
        with contextlib.suppress(Exception):  # the store may be gone with its process
            # only the first failure counts: those that follow are its consequences
            self._store.compare_set(f"{self._name}/failed", "", text)
            self._store.set(self._key("left", self.rank), "")

    def linger(self, limit_s: float) -> None:
        """Wait, after `fail` in the process that holds the store, until the others have learnt from it what failed."""
        others = [self._key("left", rank) for rank in self.ranks if rank != self.rank]
        end = time.monotonic() + limit_s
        with contextlib.suppress(RuntimeError):
            while not self._store.check(others) and time.monotonic() < end:
                time.sleep(_POLL_S)

    def check(self) -> None:
        """Look whether all live, which costs nothing.

        Raises:
            DistributedError: A process has failed or is gone.
        """
        if (problem := self._known()) is not None:
            raise DistributedError(problem)

    def _known(self) -> str | None:
        return (self._outer._known() if self._outer is not None else None) or self._problem

    def agree(self, stage: str, fact: str = "") -> list[str]:
        """Wait until every process has come to `stage`.

        Args:
            stage: A name, the same in all of them.
            fact: The text that this process gives to the others.

        Returns:
            What each gave, in the order of `ranks`.

        Raises:
            DistributedError: A process failed, ended, is gone, or did not come in time.
        """
        try:
            self._store.set(self._key(stage, self.rank), fact)
            start = time.monotonic()
            for rank in self.ranks:
                self._await(rank, stage, start)
                self._here.add(rank)
            return [self._store.get(self._key(stage, rank)).decode() for rank in self.ranks]
        except DistributedError:
            raise
        except RuntimeError as error:
            raise self.explained(error) from error

    def _await(self, rank: int, stage: str, start: float) -> None:
        key = self._key(stage, rank)
        for poll in itertools.count():
            if self._store.check([key]):
                return
            self.check()
            if self.patience_s is not None and time.monotonic() - start > self.patience_s:
                raise DistributedError.because(
                    f"process {rank} did not come to {stage!r} within {self.patience_s:.0f} s",
                    "see whether it was started, and whether every process makes the same calls",
                )
            if poll % _POLLS_A_LOOK == 0:
                why = read_exit_note(self._store, rank)
                if why is not None and not self._store.check([key]):  # it may have come, and ended then
                    raise DistributedError.because(
                        f"process {rank} ended{f' with {why}' * bool(why)} before it came to {stage!r}",
                        "see its own output, and whether every process makes the same calls",
                    )
            time.sleep(_POLL_S)

    def leave(self) -> None:
        """Leave after the last `agree`. The first process may hold the store: it stays until no other needs it."""
        key = self._key("left", self.rank)
        with contextlib.suppress(RuntimeError):
            self._store.set(key, "")
            if self.rank == self.ranks[0]:
                self.agree("left")
        self.close()

    def wait(self, work: Any) -> None:
        """Wait for an asynchronous collective; a failure of another process ends the waiting.

        Raises:
            DistributedError: A process failed or is gone, or the collective itself failed.
        """
        try:
            pause = 0.0001
            while not work.is_completed():
                self.check()
                time.sleep(pause)
                # short ones end at once, and long ones must not take a processor
                pause = min(pause * 1.5, 0.005)
            work.wait()
        except DistributedError:
            raise
        except RuntimeError as error:
            raise self.explained(error) from error

    def explained(self, error: RuntimeError) -> DistributedError:
        """Make the failure behind a broken connection, if that comes out, of what torch says of it."""
        # the connection often breaks before the note of the failure is read, so the watcher gets time for that
        self._noticed.wait(SILENCE_S + 4 * _BEAT_S)
        return DistributedError(self._problem or f"torch.distributed failed: {_first_line(error)}")

    def _key(self, stage: str, rank: int) -> str:
        return f"{self._name}/{stage}/{rank}"

    def _watching(self) -> None:
        beats: dict[int, bytes] = {}
        silent: dict[int, int] = {}
        count = 0
        while not self._end.wait(_BEAT_S) and self._problem is None:
            count += 1
            try:
                self._store.set(self._key("beat", self.rank), str(count))
                found = self._left_error() or self._gone(beats, silent)
            except RuntimeError as error:
                found = _store_is_gone(error)
            self._problem = self._problem or found  # this process may have failed meanwhile
        self._noticed.set()
        if self._problem is not None and not self._end.wait(GRACE_S) and self.on_failure is not None:
            self.on_failure(self._problem)

    def _left_error(self) -> str | None:
        key = f"{self._name}/failed"
        if not self._store.check([key]):
            return None
        rank, what = json.loads(self._store.get(key))
        return None if rank == self.rank else str(what)

    def _gone(self, beats: dict[int, bytes], silent: dict[int, int]) -> str | None:
        """Say who is gone. It counts its own beats, not seconds: a machine that was suspended has lost nobody."""
        others = sorted(self._here - {self.rank})
        for rank, beat in zip(others, self._store.multi_get([self._key("beat", r) for r in others]), strict=True):
            silent[rank] = silent.get(rank, 0) + 1 if beats.get(rank) == beat else 0
            beats[rank] = beat
            if silent[rank] * _BEAT_S >= SILENCE_S:
                return (
                    f"process {rank} is gone: no sign of life for {SILENCE_S:.0f} s; look for its own error or a kill"
                )
        return None


def _sentence(rank: int, error: BaseException) -> str:
    if isinstance(error, DistributedError):  # it names its process already
        return str(error)
    return f"process {rank} failed: {type(error).__name__}{f': {error}' if str(error) else ''}"


def _store_is_gone(error: Exception) -> str:
    return f"the process that holds the store of torch.distributed is gone (rank 0?): {_first_line(error)}"


def _first_line(error: Exception) -> str:
    """Cut a message of torch before the stack trace that it appends."""
    return str(error).partition("\n")[0]
