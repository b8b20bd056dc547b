"""A tensor that is handed over for a conversion: the expected one waits, and everything else is as without us."""

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from wan_loader.fastpath.deferral.convertible import Convertible  # noqa: E402
from wan_loader.fastpath.deferral.deferred import is_deferred, settle  # noqa: E402
from wan_loader.fastpath.deferral.waiting_cast import find_casts  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402


@pytest.fixture
def ordinary(tmp_path):
    safetensors.torch.save_file({"weight": torch.randn(30, 20)}, tmp_path / "model.safetensors")
    return safetensors.torch.load_file(tmp_path / "model.safetensors")["weight"]


@pytest.fixture
def convertible(ordinary):
    casts = find_casts({"": ordinary}, {"": torch.bfloat16}, Tally())
    return Convertible.of(ordinary, casts[""])


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.to(torch.bfloat16),
        lambda t: t.to(dtype=torch.bfloat16),
        lambda t: t.to(torch.bfloat16, non_blocking=True),
        lambda t: t.to("cpu", torch.bfloat16),
    ],
)
def test_the_expected_conversion_waits(convertible, ordinary, call):
    found = call(convertible)
    assert is_deferred(found)
    assert torch.equal(settle(found), ordinary.to(torch.bfloat16))


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.to(torch.float16),
        lambda t: t.to(torch.float32),
        lambda t: t.to("meta", torch.bfloat16),
        lambda t: t.to(torch.bfloat16, memory_format=torch.preserve_format),
        lambda t: t.to(torch.zeros(1, dtype=torch.float64)),
        lambda t: torch.zeros(1, dtype=torch.float64).to(t),
        lambda t: t.contiguous(),
        lambda t: t.detach(),
        lambda t: t.data,
        lambda t: t.view(-1)[3:],
        lambda t: torch.cat([t, t]),
        lambda t: torch.add(t, other=t),
        lambda t: t + 1,
    ],
)
def test_all_else_is_as_of_the_ordinary_tensor(convertible, ordinary, call):
    found, expected = call(convertible), call(ordinary)
    assert type(found) is type(expected) is torch.Tensor
    assert (found.dtype, found.device, found.shape) == (expected.dtype, expected.device, expected.shape)
    assert found.is_meta or torch.equal(found, expected)


def test_what_it_is_called_without_its_values(convertible, ordinary):
    assert isinstance(convertible, torch.Tensor)
    assert convertible.dtype == ordinary.dtype
    assert convertible.shape == ordinary.shape
    assert convertible.data_ptr() == ordinary.data_ptr()
    assert torch.is_floating_point(convertible)
    assert convertible.to(torch.float32) is ordinary
    with pytest.raises(TypeError, match=r"to\(\)"):
        convertible.to(1, 2, 3, 4, 5)
