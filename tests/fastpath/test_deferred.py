"""A tensor whose cast waits says what it is, and is an ordinary one as soon as anybody wants its values."""

import gc

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from wan_loader.fastpath import Tally  # noqa: E402
from wan_loader.fastpath.deferred import defer, defer_all, is_deferred, settle, settle_all, source_of  # noqa: E402
from wan_loader.fastpath.deferred_tensor import living  # noqa: E402

LOOKED = "was cast on the CPU, as somebody looked at it"
SHAPES = {"weight": (30, 41), "bias": (30,), "scale": ()}


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(1)
    safetensors.torch.save_file({n: torch.randn(s) for n, s in SHAPES.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def tally():
    return Tally()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    gc.collect()
    assert not living()


@pytest.fixture
def plain(path):
    """What programs get without us."""
    return {name: tensor.to(torch.bfloat16) for name, tensor in safetensors.torch.load_file(path).items()}


@pytest.fixture
def waiting(path, tally):
    sources = safetensors.torch.load_file(path)
    waiting = defer_all(sources, dict.fromkeys(sources, torch.bfloat16), tally)
    yield waiting
    waiting.clear()


def same(found, expected):
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert found.requires_grad == expected.requires_grad
    assert torch.equal(found.detach().view(torch.int16), expected.detach().view(torch.int16))


def test_it_waits(waiting, plain, tally):
    assert all(map(is_deferred, waiting.values()))
    assert not any(map(is_deferred, plain.values()))
    source, dtype = source_of(waiting["weight"])
    assert (source.dtype, dtype) == (torch.float32, torch.bfloat16)
    assert not tally.left
    with pytest.raises(ValueError, match="waits for no cast"):
        source_of(plain["weight"])


@pytest.mark.parametrize("name", SHAPES)
def test_it_settles_as_the_same_object(waiting, plain, name, tally):
    tensor = waiting[name]
    assert settle(tensor) is tensor
    assert not is_deferred(tensor)
    same(tensor, plain[name])
    assert vars(tensor) == {}
    assert tally.left == {LOOKED: tensor.nbytes}
    assert settle(tensor) is tensor


def test_all_settle(waiting, plain):
    settle_all()
    assert {name: type(tensor) for name, tensor in waiting.items()} == dict.fromkeys(SHAPES, torch.Tensor)


def test_one_alone(path, tally):
    assert is_deferred(defer(safetensors.torch.load_file(path)["weight"], torch.float16, tally))
    same(defer(torch.ones(3), torch.bfloat16, tally), torch.ones(3, dtype=torch.bfloat16))
