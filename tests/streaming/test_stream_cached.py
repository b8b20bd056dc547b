"""The converted cache as a source: of its entry half the bytes come, the same values; without one, it is said."""

import os

import pytest
import torch
from entries import flip
from safetensors.torch import load_file, save_file
from streamed_models import empty_model, inputs, resident_model, save_model

import wan_loader
from wan_loader import OptionError

N = 5


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def path(tmp_path):
    return save_model(tmp_path, N)


@pytest.fixture
def options(tmp_path):
    return {"dtype": "bf16", "cache": True, "cache_dir": tmp_path / "cache"}


@pytest.fixture
def build(path, options):
    def build(**more):
        result = wan_loader.load(path, **(options | more))
        assert result.build is not None
        result.build.wait()

    return build


def forward(path, device, options):
    model = empty_model(N)
    with wan_loader.stream_blocks(model, path, device=device, **options) as streamed:
        return model(inputs(device, torch.bfloat16)), streamed.report


def nbytes(report):
    return report.nbytes_mapped + report.nbytes_direct + report.nbytes_buffered


def test_an_entry_is_streamed_with_half_the_bytes(path, device, options, build):
    expected = resident_model(path, N, device, "bf16")(inputs(device, torch.bfloat16))
    out, before = forward(path, device, options)
    assert torch.equal(out, expected)
    assert before.cache.state == "source"
    assert "no entry yet" in str(before)
    build()
    out, after = forward(path, device, options)
    assert torch.equal(out, expected)
    assert (after.cache.state, nbytes(after)) == ("hit", nbytes(before) / 2)
    assert after.load.target == str(path)


def test_what_stays_fp32_does_so_in_the_entry(path, device, options, build):
    options["keep_fp32"] = ["norm"]
    build(keep_fp32=["norm"])
    model = empty_model(N)
    with wan_loader.stream_blocks(model, path, device=device, **options) as streamed:
        assert streamed.report.cache.state == "hit"
        assert model.blocks[1].norm.weight.dtype == torch.float32
        assert model.blocks[1].up.weight.dtype == torch.bfloat16


def test_nobody_removes_an_entry_that_is_streamed(path, options, build):
    from wan_loader.cache.store import Store

    build()
    with wan_loader.stream_blocks(empty_model(N), path, device="cpu", **options):
        assert [entry.state for entry in Store(options["cache_dir"]).listed()] == ["in use"]
    assert [entry.state for entry in Store(options["cache_dir"]).listed()] == ["complete"]


def test_another_source_has_no_entry(path, options, build):
    build()
    changed = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(changed, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    out, report = forward(path, "cpu", options)
    assert report.cache.state == "source"
    assert torch.equal(out, resident_model(path, N, "cpu", "bf16")(inputs("cpu", torch.bfloat16)))


@pytest.mark.parametrize("place", [20, -1])
def test_a_damaged_entry_is_not_used(path, options, build, place):
    build()
    (file,) = (options["cache_dir"] / "entries").rglob("model.safetensors")
    times = file.stat()
    flip(file, place % times.st_size)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    out, report = forward(path, "cpu", options)
    assert report.cache.state == "source"
    assert "cannot be used" in report.cache.reason
    assert torch.equal(out, resident_model(path, N, "cpu", "bf16")(inputs("cpu", torch.bfloat16)))


def test_nothing_to_convert_and_no_cache(path, options):
    options["dtype"] = None
    model = empty_model(N)
    with wan_loader.stream_blocks(model, path, device="cpu", **options) as streamed:
        assert "nothing is converted" in streamed.report.cache.reason
    with pytest.raises(OptionError, match="without the cache"):
        wan_loader.stream_blocks(model, path, device="cpu", cache_dir=options["cache_dir"])


def test_a_cache_that_cannot_be_used_is_said(path, options):
    options["cache_dir"].write_text("no directory")
    out, report = forward(path, "cpu", options)
    assert "cannot be used" in report.cache.reason
    assert torch.equal(out, resident_model(path, N, "cpu", "bf16")(inputs("cpu", torch.bfloat16)))
