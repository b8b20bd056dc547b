"""Versions of torch that lack something: one clear error, or the other place where it is."""

import sys
import types

import pytest
import torch

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


def test_a_store_that_opens_no_second_connection_is_refused():
    with pytest.raises(OptionError, match=r"do not run with torch .*: install torch"):
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
