"""Versions of torch that lack something: one clear error, or the other place where it is."""

import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from wan_loader.distributed.liveness import own_connection
from wan_loader.dtypes import torch_dtype
from wan_loader.errors import CheckpointError, OptionError
from wan_loader.loading.fill_module import is_dtensor


def test_a_dtype_that_torch_lacks_is_named(monkeypatch):
    monkeypatch.delattr(torch, "float8_e5m2fnuz")
    torch_dtype.cache_clear()
    with pytest.raises(
        CheckpointError, match=rf"torch {torch.__version__.split('+')[0]}.* has no dtype float8_e5m2fnuz"
    ):
        torch_dtype("float8_e5m2fnuz")


class Old:
    """A store as it is in an old torch: what is called is a copy's, and none is made."""

    def __init__(self, store):
        self.underlying_store = store


def test_a_store_that_cannot_be_cloned_is_connected_to_once_more(monkeypatch):
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    first, second = (own_connection(Old(dist.PrefixStore("theirs", host))) for _ in range(2))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.get, "key")  # does not keep the others waiting
        second.set("key", "value")
        assert waiting.result(timeout=20) == b"value"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not own_connection(Old(host)).check(["key"])


def test_files_and_memory_are_stores_too(tmp_path):
    files = [own_connection(Old(dist.FileStore(str(tmp_path / "store"), -1))) for _ in range(2)]
    memory = dist.HashStore()
    for first, second in (files, [own_connection(Old(memory)) for _ in range(2)]):
        first.set("key", "value")
        assert second.get("key") == b"value"


def test_another_store_that_cannot_be_cloned_is_refused():
    with pytest.raises(OptionError, match=r"opens no second connection to a object: use a newer torch"):
        own_connection(object())


@pytest.mark.parametrize("place", ["torch.distributed.tensor", "torch.distributed._tensor"])
def test_dtensors_are_known_wherever_torch_has_them(monkeypatch, place):
    class DTensor:
        pass

    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert not is_dtensor(DTensor())
    monkeypatch.setattr(sys.modules[place], "DTensor", DTensor, raising=False)
    assert is_dtensor(DTensor())
    assert not is_dtensor(torch.ones(1))
