"""Which GPU a process of a group loads to, what is refused before a collective begins, and the connection of loads."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.distributed import HashStore, distributed_c10d  # noqa: E402

from wan_loader.distributed import shard_group as group_module  # noqa: E402
from wan_loader.distributed.exchange import _Collectives, check_usable  # noqa: E402
from wan_loader.distributed.shard_group import ShardGroup, _check_devices  # noqa: E402
from wan_loader.errors import DistributedError, OptionError  # noqa: E402


class Group:
    """As much of a process group as is asked for here."""

    def __init__(self, bound=None):
        self.bound_device_id = bound
        self.aborted = []

    def _get_backend(self, device):
        return SimpleNamespace(abort=lambda: self.aborted.append(device))


def shard_group(bound) -> ShardGroup:
    group: Any = Group(bound)
    liveness: Any = SimpleNamespace(rank=1, ranks=(0, 1))
    return ShardGroup(liveness, group, {(0, 1): group})


@pytest.mark.parametrize("device", ["cuda", "auto", "cuda:1", 1, torch.device("cuda"), torch.device("cuda", 1)])
def test_the_gpu_of_the_group_is_meant(device):
    assert shard_group(torch.device("cuda", 1)).device(device) == torch.device("cuda", 1)


@pytest.mark.parametrize("device", ["cuda:0", 0, torch.device("cuda", 0)])
def test_another_gpu_is_refused(device):
    with pytest.raises(OptionError) as error:
        shard_group(torch.device("cuda", 1)).device(device)
    assert "bound to 'cuda:1'" in error.value.reason
    assert "device='cuda'" in error.value.remedy


@pytest.mark.parametrize(("bound", "device"), [(torch.device("cuda", 1), "cpu"), (None, "cuda"), (None, "cuda:3")])
def test_what_the_group_does_not_decide_stays(bound, device):
    assert shard_group(bound).device(device) == device


def test_two_processes_on_one_gpu_are_named():
    _check_devices((0, 2, 5), ["host a", "", ""])
    _check_devices((0, 2), ["host a", "host b"])
    with pytest.raises(DistributedError) as error:
        _check_devices((0, 2, 7), ["host a", "host b", "host b"])
    assert error.value.reason == "processes 2 and 7 load to the same GPU"


@pytest.mark.parametrize("ends", [True, False])
def test_what_still_runs_after_a_failure_is_aborted(ends, monkeypatch):
    """And the group, whose next message would meet it, is not used again."""
    monkeypatch.setattr("wan_loader.distributed.exchange._GRACE_S", 0.01)
    monkeypatch.setattr(
        "wan_loader.distributed.exchange._start_gather",
        lambda *_: SimpleNamespace(is_completed=lambda: ends or group.aborted),
    )
    group: Any = Group()
    device, liveness = torch.device("cpu"), SimpleNamespace()

    def exchange():
        with _Collectives(group, device, liveness) as collectives:
            collectives.gather(torch.empty(4), torch.empty(2))
            raise RuntimeError("the link is down")

    with pytest.raises(RuntimeError, match="link"):
        exchange()
    assert group.aborted == ([] if ends else [device])
    if ends:
        check_usable(group)
    else:
        with pytest.raises(DistributedError) as error:
            check_usable(group)
        assert "destroy_process_group" in error.value.remedy


class Connection:
    """One that may break."""

    broken = False

    def check(self, keys):
        if self.broken:
            raise RuntimeError("Connection reset by peer")
        return True


@pytest.fixture
def opened(monkeypatch):
    """The stores to which connections were opened."""
    opened = []
    monkeypatch.setattr(group_module, "own_connection", lambda store: (opened.append(store), Connection())[1])
    return opened


def test_a_connection_serves_until_it_breaks_or_the_store_is_another(monkeypatch, opened):
    store, other = HashStore(), HashStore()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    first = group_module._store()
    assert group_module._store() is first
    first.broken = True
    second = group_module._store()
    assert second is not first
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: other)
    assert group_module._store() not in (first, second)
    assert opened == [store, store, other]


def test_a_store_that_is_gone_is_not_held(monkeypatch, opened):
    monkeypatch.setattr(distributed_c10d, "_get_default_store", HashStore)
    before = len(group_module._connections)
    group_module._store()
    opened.clear()
    assert len(group_module._connections) == before
