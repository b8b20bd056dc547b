"""The connection to torch's store that loads share."""

import pytest

torch = pytest.importorskip("torch")

from torch.distributed import HashStore, distributed_c10d  # noqa: E402

from wan_loader.distributed import shard_group  # noqa: E402


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
    monkeypatch.setattr(shard_group, "own_connection", lambda store: (opened.append(store), Connection())[1])
    return opened


def test_a_connection_serves_until_it_breaks_or_the_store_is_another(monkeypatch, opened):
    store, other = HashStore(), HashStore()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    first = shard_group._store()
    assert shard_group._store() is first
    first.broken = True
    second = shard_group._store()
    assert second is not first
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: other)
    assert shard_group._store() not in (first, second)
    assert opened == [store, store, other]


def test_a_store_that_is_gone_is_not_held(monkeypatch, opened):
    monkeypatch.setattr(distributed_c10d, "_get_default_store", HashStore)
    before = len(shard_group._connections)
    shard_group._store()
    opened.clear()
    assert len(shard_group._connections) == before
