"""Streamed blocks of quantised files: bit for bit the numbers that load_into makes, and small in the file."""

import pytest
import torch
from gguf_files import blocks, gguf_bytes, plain
from safetensors.torch import save_file
from streamed_models import Model, save_model
from torch import nn

import wan_loader
from wan_loader import CheckpointError
from wan_loader.formats.gguf_types import GGUF_TYPES
from wan_loader.streaming import source
from wan_loader.system.posix import PAGE

FOUND = {found.name: found for found in GGUF_TYPES.values()}
N, WIDTH = 5, 256


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["whole", "in small parts"])
def chunks(request, monkeypatch):
    """Parts whose borders lie somewhere in a row."""
    if request.param != "whole":
        monkeypatch.setattr(source, "CHUNK_BYTES", PAGE)


def random_blocks(kind, shape):
    found = FOUND[kind]
    n = torch.Size(shape).numel() // found.block_elements
    raw = torch.randint(0, 256, (n, found.block_nbytes), dtype=torch.uint8)
    halves = {"Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[kind]
    for start in halves:  # small numbers: others would be NaN now and then
        raw[:, start : start + 2] = torch.randn(n).div(100).to(torch.float16).view(torch.uint8).view(n, 2)
    return raw


def save_gguf(directory, kind):
    """Matrices as blocks, vectors as float32, as converters do."""
    torch.manual_seed(3)
    state = Model(N, WIDTH).state_dict()
    path = directory / "model.gguf"
    path.write_bytes(
        gguf_bytes(
            {
                name: blocks(kind, t.shape, random_blocks(kind, t.shape)) if t.dim() == 2 else plain(t)
                for name, t in state.items()
            }
        )
    )
    return path


def save_scaled(directory, by_row, dtype=torch.float8_e4m3fn):
    torch.manual_seed(4)
    state = {}
    for name, tensor in Model(N, WIDTH).state_dict().items():
        state[name] = tensor
        if name.endswith((".up.weight", ".down.weight")):
            state[name] = tensor.mul(100).to(dtype)
            state[f"{name.removesuffix('weight')}scale_weight"] = torch.rand(len(tensor) if by_row else 1) / 50
    path = directory / "scaled.safetensors"
    save_file(state | {"scaled_fp8": torch.empty(2, dtype=dtype)}, path)
    return path


def compare(path, device, dtype, **options):
    def empty():
        with wan_loader.empty_weights():
            return Model(N, WIDTH)

    resident = empty()
    wan_loader.load_into(resident, path, device=device, dtype=dtype)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).to(device, resident.first.weight.dtype)
    expected = resident(x)
    assert dtype == "fp16" or expected.isfinite().all()
    model = empty()
    with wan_loader.stream_blocks(model, path, device=device, dtype=dtype, **options) as streamed:
        for _ in range(2):
            assert torch.equal(model(x), expected)
        if dtype == "fp32":
            with torch.autocast(device, torch.bfloat16):
                assert torch.equal(model(x), resident(x))
        seen = {}
        model.blocks[2].register_forward_pre_hook(
            lambda block, _: seen.update({name: tensor.clone() for name, tensor in block.state_dict().items()})
        )
        model(x)
        for name, tensor in resident.blocks[2].state_dict().items():
            assert torch.equal(seen[name].view(torch.uint8), tensor.view(torch.uint8)), name
        return streamed.report


@pytest.mark.parametrize(("io", "dtype"), [("auto", "bf16"), ("direct", "fp32")])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_blocks_of_gguf_become_the_numbers_of_load_into(tmp_path, device, chunks, kind, io, dtype):
    report = compare(save_gguf(tmp_path, kind), device, dtype, io=io, buffers=2)
    per_element = FOUND[kind].block_nbytes / FOUND[kind].block_elements
    matrices, vectors = 6 * WIDTH * WIDTH + WIDTH, 6 * WIDTH
    each = report.nbytes_mapped + report.nbytes_direct + report.nbytes_buffered
    assert each == N * (matrices * per_element + 4 * vectors)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("by_row", [False, True])
def test_scaled_floats_become_the_numbers_of_load_into(tmp_path, device, chunks, by_row, dtype):
    report = compare(save_scaled(tmp_path, by_row), device, dtype)
    each = report.nbytes_mapped + report.nbytes_direct + report.nbytes_buffered
    assert each == N * (6 * WIDTH * WIDTH + 4 * 7 * WIDTH)


def test_a_budget_counts_numbers(tmp_path, device):
    path = save_gguf(tmp_path, "Q8_0")
    least = compare(path, device, "bf16").device_nbytes
    block = 2 * (6 * WIDTH * WIDTH + 7 * WIDTH)
    report = compare(path, device, "bf16", device_memory=least + 3 * block)
    assert len(report.streamed) < N
    assert report.device_nbytes <= least + 3 * block


def test_what_load_into_refuses_is_refused(tmp_path):
    path = save_gguf(tmp_path, "Q8_0")
    model = Model(N, WIDTH)
    with pytest.raises(CheckpointError, match="pass a dtype"):
        wan_loader.stream_blocks(model, path, device="cpu")
    state = {"blocks.0.up.weight": torch.ones(768, 256).to(torch.float8_e4m3fn)}
    save_file(state | {"scaled_fp8": torch.empty(2).to(torch.float8_e4m3fn)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="lacks its scale"):
        wan_loader.stream_blocks(model, tmp_path / "odd.safetensors", device="cpu", dtype="bf16", strict=False)


def test_a_module_of_plain_weights_has_no_scales(tmp_path, device):
    path = save_model(tmp_path, N)
    with wan_loader.empty_weights():
        model = Model(N)
    with wan_loader.stream_blocks(model, path, device=device, dtype="bf16") as streamed:
        assert streamed.report.n_fetched == 3
        assert isinstance(model.first, nn.Linear)
