"""Registered memory is unregistered before it is unmapped, whatever happens: else a later load reads old pages."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_loader
from wan_loader.devices import driver
from wan_loader.errors import CheckpointError


@pytest.fixture
def registered(monkeypatch):
    """Addresses that are registered with the driver at the moment."""
    addresses = set()
    register, unregister = driver.register, driver.unregister

    def registering(address, nbytes, context, *, read_only):
        register(address, nbytes, context, read_only=read_only)
        addresses.add(address)

    def unregistering(address, context):
        done = unregister(address, context)
        assert done
        addresses.discard(address)
        return done

    monkeypatch.setattr(driver, "register", registering)
    monkeypatch.setattr(driver, "unregister", unregistering)
    return addresses


@pytest.mark.gpu
@pytest.mark.parametrize("io", ["mapped", "direct", "buffered"])
def test_a_file_found_changed_at_the_end_leaves_nothing_registered(tmp_path, registered, io, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(3_000_000)}, path)
    facts = type(wan_loader.open_checkpoint(path).files[0])

    def changed(self):
        raise CheckpointError("changed")

    with monkeypatch.context() as patch:
        patch.setattr(facts, "check_unchanged", changed)
        with pytest.raises(CheckpointError):
            wan_loader.load_file(path, device="cuda", io=io)
    assert not registered
    for seed in range(5):
        torch.manual_seed(seed)
        save_file({"a": torch.randn(3_000_000)}, path)
        assert torch.equal(wan_loader.load_file(path, device="cuda", io=io)["a"].cpu(), load_file(path)["a"])
