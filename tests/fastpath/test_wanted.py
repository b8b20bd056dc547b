"""Weights that a model is about to be given become what the library would have made of them, or are left to it."""

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from wan_loader.errors import DeviceMemoryError  # noqa: E402
from wan_loader.fastpath import Moves  # noqa: E402
from wan_loader.fastpath.deferral.deferred import is_deferred, settle  # noqa: E402
from wan_loader.fastpath.libraries.wanted import Wanted, serve  # noqa: E402
from wan_loader.fastpath.moving import fetching  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402


@pytest.fixture
def state(tmp_path):
    """Tensors of a mapped file."""
    torch.manual_seed(1)
    state = {"cast": torch.randn(30, 20), "same": torch.randn(7), "count": torch.arange(5)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    return safetensors.torch.load_file(tmp_path / "model.safetensors")


@pytest.fixture
def wanted(state):
    dtypes = {"cast": torch.bfloat16, "same": torch.float32, "count": None}
    return {name: Wanted(tensor, dtypes[name]) for name, tensor in state.items()}


@pytest.fixture
def planned():
    return Moves(Tally(), kinds=("cpu",), io="buffered", min_nbytes=0)


HOST, STAND_IN = torch.device("cpu"), torch.device("cpu:0")


def test_on_the_cpu_only_conversions_are_served(state, wanted, planned):
    served = serve("Model", wanted, HOST, planned)
    assert served.keys() == {"cast"}
    assert is_deferred(served["cast"])
    assert torch.equal(settle(served["cast"]), state["cast"].to(torch.bfloat16))


def test_for_a_device_all_are_served_by_one_plan(state, wanted, planned):
    addresses = {name: tensor.data_ptr() for name, tensor in state.items()}
    served = serve("Model", wanted, STAND_IN, planned)
    assert served.keys() == state.keys()
    assert planned.tally.components["Model"].n_plans == 1
    for name, weight in wanted.items():
        assert type(served[name]) is torch.Tensor
        assert torch.equal(served[name], state[name].to(weight.dtype or state[name].dtype))
        assert served[name].data_ptr() != addresses[name]
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == addresses, "who holds them keeps them"


def test_a_load_that_fails_leaves_all_conversions(wanted, planned, monkeypatch):
    def fail(*args, **options):
        raise DeviceMemoryError("no room")

    monkeypatch.setattr(fetching, "load", fail)
    assert "cast" not in serve("Model", wanted, STAND_IN, planned)
    assert not planned.tally.total.n_plans
    assert any(reason.startswith("DeviceMemoryError") for reason in planned.tally.left)


def test_what_is_in_no_file_is_converted_at_once(planned):
    tensor = torch.randn(5)
    served = serve("Model", {"": Wanted(tensor, torch.float16)}, HOST, planned)
    assert type(served[""]) is torch.Tensor
    assert torch.equal(served[""], tensor.to(torch.float16))


@pytest.mark.parametrize("make", [torch.nn.Parameter, lambda tensor: tensor.requires_grad_()])
def test_parameters_are_left(state, planned, make):
    assert serve("Model", {"": Wanted(make(state["cast"]), torch.float16)}, HOST, planned) == {}


def test_little_and_other_devices_are_left(wanted, planned):
    assert serve("Model", wanted, torch.device("meta"), planned) == {}
    assert planned.tally.left == {"goes to a device of kind meta": 0}
    planned.min_nbytes = 1 << 20
    assert serve("Model", wanted, STAND_IN, planned) == {}
