"""Numbers out of blocks: bit for bit those of the gguf package, and the products of a few lines of torch."""

import pytest

torch = pytest.importorskip("torch")

from wan_loader.devices import dequantise as made_here  # noqa: E402
from wan_loader.devices.dequantise import apply_scale, dequantise  # noqa: E402
from wan_loader.formats.gguf import DEQUANTISED  # noqa: E402
from wan_loader.formats.gguf_types import GGUF_TYPES  # noqa: E402
from wan_loader.verify import same_bits  # noqa: E402

FOUND = {found.name: found for found in GGUF_TYPES.values()}
#: Where the float16 scales of a block begin: random ones would mostly be NaN or infinite in one block of thirty.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(kind, n, seed=0, *, odd=False):
    """Blocks of any bytes, whose scales are small numbers; `odd`: some are NaN, infinite, tiny or negative zero."""
    rng = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (n, FOUND[kind].block_nbytes), generator=rng, dtype=torch.uint8)
    for start in HALVES[kind]:
        halves = torch.randn(n, generator=rng).to(torch.float16)
        if odd:
            special = torch.tensor([float("nan"), float("inf"), -0.0, 6e-8, -65504.0], dtype=torch.float16)
            halves[: len(special)] = special
        blocks[:, start : start + 2] = halves.view(torch.uint8).view(n, 2)
    return blocks


def test_every_kind_that_is_promised_is_made():
    assert set(made_here._NUMBERS_OF) == set(DEQUANTISED) == set(HALVES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", sorted(DEQUANTISED))
def test_every_bit_is_that_of_the_gguf_package(kind, dtype):
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(kind, 700)
    expected = gguf.quants.dequantize(blocks.numpy().reshape(7, -1), gguf.GGMLQuantizationType[kind])
    expected = torch.from_numpy(expected).to(getattr(torch, dtype))
    assert same_bits(dequantise(blocks, kind, tuple(expected.shape), dtype), expected)


@pytest.mark.parametrize("kind", sorted(DEQUANTISED))
def test_odd_scales_give_the_same_numbers(kind):
    gguf, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    blocks = random_blocks(kind, 64, odd=True)
    with numpy.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    made = dequantise(blocks, kind, expected.shape, "float32")
    torch.testing.assert_close(made, torch.from_numpy(expected), rtol=0, atol=0, equal_nan=True)


def test_what_little_numpy_says_of_the_simplest_two():
    """Also where the gguf package is not there."""
    blocks = random_blocks("Q8_0", 5)
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    assert same_bits(dequantise(blocks, "Q8_0", (5, 32), "float32"), blocks[:, 2:].view(torch.int8).float() * d)
    blocks = random_blocks("Q4_0", 5)
    d, q = blocks[:, :2].contiguous().view(torch.float16).float(), blocks[:, 2:].to(torch.int32)
    expected = d * (torch.cat([q % 16, q // 16], dim=1) - 8).float()
    assert same_bits(dequantise(blocks, "Q4_0", (160,), "float32"), expected.view(160))


@pytest.mark.parametrize("kind", sorted(DEQUANTISED))
def test_many_blocks_are_made_some_at_a_time(kind, monkeypatch):
    blocks, size = random_blocks(kind, 50), FOUND[kind].block_elements
    whole = dequantise(blocks, kind, (50, size), "bfloat16")
    most = []
    monkeypatch.setattr(made_here, "_CPU_ELEMENTS", size * 7)
    numbers = made_here._NUMBERS_OF[kind]
    monkeypatch.setitem(made_here._NUMBERS_OF, kind, lambda some: most.append(len(some)) or numbers(some))
    assert same_bits(dequantise(blocks, kind, (50, size), "bfloat16"), whole)
    assert most == [7] * 7 + [1]


def test_nothing_gives_nothing():
    assert dequantise(torch.empty(0, 144, dtype=torch.uint8), "Q4_K", (0, 256), "bfloat16").shape == (0, 256)
    empty = torch.empty(0, 3, dtype=torch.float8_e4m3fn)
    assert apply_scale(empty, torch.tensor(2.0), "float32").shape == (0, 3)


FP8 = ["float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("at_once", [1, 5, 1000])
@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (6,), (6, 1)])
@pytest.mark.parametrize("source", FP8)
def test_scaled_floats_are_products_in_float32_rounded_once(source, scale_shape, at_once, monkeypatch):
    monkeypatch.setattr(made_here, "_CPU_ELEMENTS", at_once)
    raw = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).mul(50).to(getattr(torch, source))
    scale = torch.rand(scale_shape, generator=torch.Generator().manual_seed(2)) / 77
    factor = scale.view(-1, 1) if scale.numel() > 1 else scale.view(())
    for dtype in ("bfloat16", "float16", "float32"):
        expected = (raw.to(torch.float32) * factor).to(getattr(torch, dtype))
        assert same_bits(apply_scale(raw, scale, dtype), expected)


def test_a_scale_of_a_scalar_and_of_four_dimensions():
    scalar = torch.tensor(3.0).to(torch.float8_e4m3fn)
    assert apply_scale(scalar, torch.tensor(0.5), "float32").item() == 1.5
    kernel = torch.ones(2, 3, 4, 5).to(torch.float8_e4m3fn)
    made = apply_scale(kernel, torch.tensor([2.0, 3.0]), "float32")
    assert made.shape == kernel.shape
    assert made[0].unique().item() == 2
    assert made[1].unique().item() == 3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(DEQUANTISED))
def test_a_gpu_makes_the_same(kind):
    blocks, size = random_blocks(kind, 4000), FOUND[kind].block_elements
    for dtype in ("float32", "bfloat16", "float16"):
        on_host = dequantise(blocks, kind, (4000, size), dtype)
        assert same_bits(dequantise(blocks.cuda(), kind, (4000, size), dtype).cpu(), on_host)


@pytest.mark.gpu
@pytest.mark.parametrize("source", FP8)
def test_a_gpu_scales_the_same(source):
    raw = torch.randn(64, 500, generator=torch.Generator().manual_seed(1)).to(getattr(torch, source))
    for scale in (torch.tensor(0.3), torch.rand(64)):
        on_host = apply_scale(raw, scale, "bfloat16")
        assert same_bits(apply_scale(raw.cuda(), scale.cuda(), "bfloat16").cpu(), on_host)
