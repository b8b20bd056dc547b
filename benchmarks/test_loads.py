"""Whole loads of small checkpoints on the CPU, beside what safetensors and torch take for the same."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_loader
from wan_loader.cache.build import wait_for_builds
from wan_loader.verify import verify


@pytest.mark.parametrize("dtype", [None, "bf16"], ids=["as_is", "to_bf16"])
@pytest.mark.parametrize("io", ["auto", "buffered", "direct"])
def test_ours(benchmark, checkpoint, io, dtype):
    tensors = benchmark(wan_loader.load_file, checkpoint, io=io, dtype=dtype)
    assert verify(checkpoint, tensors) == len(tensors)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as_is", "to_bf16"])
def test_safetensors(benchmark, checkpoint, dtype):
    benchmark(lambda: {name: t.to(dtype) if dtype else t for name, t in load_file(checkpoint).items()})


@pytest.fixture(scope="module")
def pth(tmp_path_factory, mb):
    path = tmp_path_factory.mktemp("pth") / "weights.pth"
    torch.save({f"block.{i}.weight": torch.randn(250) for i in range(mb * 1000)}, path)
    return path


def test_ours_from_pth(benchmark, pth):
    tensors = benchmark(wan_loader.load_file, pth)
    assert verify(pth, tensors) == len(tensors)


def test_torch_from_pth(benchmark, pth):
    benchmark(torch.load, pth, weights_only=True)


def test_into_a_module(benchmark, tmp_path, mb):
    """A module on meta, bound and filled."""
    layers = [torch.nn.Linear(250, 250) for _ in range(mb)]
    module = torch.nn.Sequential(*layers)
    path = tmp_path / "module.safetensors"
    save_file(dict(module.state_dict()), path)

    def run(empty):
        return wan_loader.load_into(empty, path, device="cpu")

    report = benchmark.pedantic(run, setup=lambda: ((module.to("meta"),), {}), rounds=5)
    assert report.n_tensors == 2 * mb


@pytest.mark.parametrize("load", ["without", "first", "second"])
def test_to_bf16_through_the_cache(benchmark, checkpoint, tmp_path, load):
    """Without the converted cache, the first load, which builds an entry behind it, and one that reads the entry."""
    cache = tmp_path / "cache"

    def run(directory):
        cached = {"cache": True, "cache_dir": directory} if load != "without" else {}
        return wan_loader.load(checkpoint, dtype="bf16", io="buffered", **cached)

    def fresh():
        wait_for_builds()
        if load == "first":
            shutil.rmtree(cache, ignore_errors=True)
        return (cache,), {}

    if load == "second":
        run(cache)
    loaded = benchmark.pedantic(run, setup=fresh, rounds=5)
    wait_for_builds()
    assert verify(checkpoint, loaded.tensors) == len(loaded.tensors)
    if load != "without":
        assert loaded.report.cache.state == {"first": "building", "second": "hit"}[load]
