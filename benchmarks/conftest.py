"""The checkpoints that the suites measure on: of full size without weights, and small ones with them.

The sizes are small unless WAN_LOADER_BENCH_MB says otherwise, so that every suite also runs as a test.
"""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from sparse import make_sparse

import wan_loader

MB = 10**6


@pytest.fixture(scope="session")
def mb():
    """Return the size of the checkpoints that are really loaded, in MB."""
    return int(os.environ.get("WAN_LOADER_BENCH_MB", "8"))


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    """Make the four checkpoints of WAN2.2-T2V-A14B as published, 126 GB, without the weights."""
    directory = tmp_path_factory.mktemp("native")
    make_sparse(directory, layout="native", size="full")
    return [
        directory / name
        for name in ("models_t5_umt5-xxl-enc-bf16.pth", "high_noise_model", "low_noise_model", "Wan2.1_VAE.pth")
    ]


@pytest.fixture(scope="session")
def expert(tmp_path_factory):
    """Make one expert in the diffusers layout, bf16, without weights, and the empty module that it fills."""
    from diffusers import WanTransformer3DModel

    directory = tmp_path_factory.mktemp("expert")
    make_sparse(directory, layout="diffusers", size="full", components=["high_noise"], dtype="bf16")
    config = json.loads((directory / "transformer/config.json").read_text())

    def build():
        with wan_loader.empty_weights():
            return WanTransformer3DModel.from_config(config)

    return directory / "transformer", build


@pytest.fixture(scope="session", params=["one_large", "many_small"])
def checkpoint(request, tmp_path_factory, mb):
    """Make a file of the same bytes as 8 tensors, or as tensors of 1 kB."""
    path = tmp_path_factory.mktemp("loads") / f"{request.param}.safetensors"
    nbytes = 1024 if request.param == "many_small" else mb * MB // 8
    save_file({f"block.{i}.weight": torch.randn(nbytes // 4) for i in range(mb * MB // nbytes)}, path)
    return path
