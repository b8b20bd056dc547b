"""Several processes load together: what they hold equals what one would load, and every byte is read once in all."""

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A network of odd sizes in several formats, and a file with shared, transposed, scalar and empty tensors."""
    here = tmp_path_factory.mktemp("together")
    torch.manual_seed(11)
    embed = torch.randn(1031, 96)
    state = {
        "embed.weight": embed,
        "body.0.weight": torch.randn(1500, 96),
        "body.0.bias": torch.randn(1500),
        "body.1.weight": torch.randn(1500),
        "body.1.bias": torch.randn(1500),
        "body.2.weight": torch.randn(3, 1500),
        "body.2.bias": torch.randn(3),
        "body.3.weight": torch.randn(1, 3),
        "body.3.bias": torch.randn(1),
        "tail.weight": torch.randn(96, 1),
        "tail.bias": torch.randn(96),
        "head.weight": embed,
        "scalar": torch.tensor(0.25),
        "empty": torch.empty(0, 5),
        "steps": torch.arange(700_001) * 3,
    }
    torch.save(state, here / "net.pth")
    torch.save(state, here / "legacy.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({**state, "head.weight": embed.clone()}, here / "net.safetensors")
    base = torch.randn(9, 4)
    odd = {
        "one": torch.randn(1, 7),
        "three": torch.randn(3, 2, 5).bfloat16(),
        "large": torch.randn(1027, 301, dtype=torch.float64)[:, :64].contiguous(),
        "shared_a": base,
        "shared_b": base[3:],
        "turned": torch.randn(6, 10).t(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "kept": torch.randn(5, 70_000),
        "flags": torch.tensor([True, False, True, True, False]),
    }
    torch.save(odd, here / "odd.pth")
    torch.save(odd, here / "odd-legacy.pth", _use_new_zipfile_serialization=False)
    return here


@pytest.mark.parametrize(
    ("device", "n"), [("cpu", 4), *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (2, 4))]
)
def test_equal_bit_for_bit_and_read_once(ranks, checkpoints, device, n):
    if device == "cuda" and torch.cuda.device_count() < n:
        pytest.skip(f"fewer than {n} GPUs")
    for ended in ranks("worker_equal.py", n, checkpoints, device):
        assert ended.code == 0, ended.output
