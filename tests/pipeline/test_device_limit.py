"""The bound of torch's allocator: told of it, and told of its end. A fake stands in for the device."""

import pytest
import torch

from wan_pipeline.device_limit import DeviceLimit


@pytest.fixture
def told(monkeypatch):
    """The fractions that the allocator was told of, of a device of 80 GB."""
    found = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 10**9, 80 * 10**9))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: found.append((share, str(device)))
    )
    return found


def test_the_allocator_is_told_until_the_end(told):
    limit = DeviceLimit(torch.device("cuda:0"), 20 * 10**9)
    assert told == [(0.25, "cuda:0")]
    limit.close()
    limit.close()
    assert told == [(0.25, "cuda:0"), (1.0, "cuda:0")]


@pytest.mark.parametrize(("device", "nbytes"), [("cuda:0", None), ("cpu", 10**9)])
def test_nobody_is_told_where_there_is_no_bound(told, device, nbytes):
    DeviceLimit(torch.device(device), nbytes).close()
    assert told == []


def test_a_bound_beyond_the_device_is_the_device(told):
    DeviceLimit(torch.device("cuda:1"), 10**12)
    assert told == [(1.0, "cuda:1")]
