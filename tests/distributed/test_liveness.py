"""What processes tell each other: two of them as threads of this one, over a store in memory."""

import threading
import time

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

from wan_loader.distributed import liveness as module  # noqa: E402
from wan_loader.distributed.liveness import Liveness  # noqa: E402
from wan_loader.errors import CheckpointError, DistributedError  # noqa: E402


@pytest.fixture
def store():
    return dist.HashStore()


def pair(store, **options):
    return [Liveness(store, rank, (0, 1), "test", **options) for rank in range(2)]


def beside(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_they_wait_for_each_other_and_hear_what_was_said(store):
    first, second = pair(store)
    heard = []
    with first, second:
        other = beside(lambda: heard.extend(second.agree("stage", "two")))
        time.sleep(0.05)
        assert heard == []
        assert first.agree("stage", "one") == ["one", "two"]
        other.join()
    assert heard == ["one", "two"]


def test_the_first_error_reaches_the_others(store):
    first, second = pair(store)
    with pytest.raises(CheckpointError), second:
        raise CheckpointError("a.safetensors is damaged")
    told = pytest.raises(DistributedError, match=r"^process 1 failed: CheckpointError: a.safetensors is damaged$")
    with told, first:
        first.agree("stage")


def test_what_one_tells_of_another_is_told_as_it_is(store):
    first, second = pair(store)
    with pytest.raises(DistributedError), second:
        raise DistributedError("process 7 is gone: look for its own error")
    with pytest.raises(DistributedError, match=r"^process 7 is gone: look for its own error$"), first:
        first.agree("stage")


def test_what_ends_a_run_ends_its_loads_with_its_reason(store):
    run, other_run = pair(store)
    one, other = (Liveness(store, rank, (0, 1), "load", outer=(run, other_run)[rank]) for rank in range(2))
    other_run.fail(CheckpointError("a.safetensors is damaged"))
    told = r"^process 1 failed: CheckpointError: a.safetensors is damaged$"
    with pytest.raises(DistributedError, match=told):
        other.agree("stage")
    with pytest.raises(RuntimeError, match="cancelled"), other:
        raise RuntimeError("cancelled")
    with pytest.raises(DistributedError, match=told), one:
        one.agree("next")


def test_a_process_that_came_and_ended_is_not_missed(store):
    first, second = pair(store)
    with first, second:
        other = beside(lambda: second.agree("stage"))
        time.sleep(0.05)
        store.set("wan_loader/ended/1", "")
        assert first.agree("stage") == ["", ""]
        other.join()
        with pytest.raises(DistributedError, match="process 1 ended before it came to 'next'"):
            first.agree("next")


def test_a_silent_process_is_gone_and_whoever_hangs_is_told(store, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_S", 0.5)
    monkeypatch.setattr(module, "GRACE_S", 0.2)
    told = []
    first, second = pair(store, on_failure=told.append)
    with first, second:
        other = beside(lambda: second.agree("stage"))
        first.agree("stage")
        other.join()
        second.close()  # from here on it gives no sign
        with pytest.raises(DistributedError, match="process 1 is gone"):
            first.agree("next")
        time.sleep(0.5)
    assert len(told) == 1
    assert "process 1 is gone" in told[0]


def test_a_process_that_ends_in_time_is_not_told(store, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    told = []
    first, second = pair(store, on_failure=told.append)
    second.fail(OSError("full"))
    with pytest.raises(DistributedError), first:
        first.agree("stage")
    time.sleep(0.7)
    assert told == []


def test_patience_ends(store):
    with (
        Liveness(store, 0, (0, 1), "test", patience_s=0.1) as alone,
        pytest.raises(DistributedError, match="did not come"),
    ):
        alone.agree("stage")


def test_a_broken_collective_is_explained_by_what_broke_it(store):
    class PendingBlocks:
        def is_completed(self):
            return True

        def wait(self):
            raise RuntimeError("Connection closed by peer\nstack ...")

    first, second = pair(store)
    with first:
        second.fail(OSError("disk full"))
        with pytest.raises(DistributedError, match="process 1 failed: OSError: disk full"):
            first.wait(PendingBlocks())
