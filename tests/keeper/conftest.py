"""A keeper of the tests' own: its socket is in a directory of theirs."""

import pytest
import torch
from safetensors.torch import save_file

from wan_loader.keeper import client


@pytest.fixture
def runtime(tmp_path_factory, monkeypatch):
    """The runtime directory of a test, whose keeper ends with it."""
    place = tmp_path_factory.mktemp("runtime-" + 110 * "x")  # longer than the address of a socket may be
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    yield place
    client.stop()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small checkpoint of several dtypes; odd sizes."""
    torch.manual_seed(0)
    tensors = {f"block.{i}.weight": torch.randn(33, 17 + i) for i in range(20)}
    tensors |= {"ids": torch.arange(7), "half": torch.randn(1000).half(), "one": torch.tensor(2.5)}
    tensors |= {"none": torch.empty(0, 3), "large": torch.randn(700_001)}
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(tensors, path)
    return path
