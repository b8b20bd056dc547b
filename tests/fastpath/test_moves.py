"""A module that moves is fetched from its files by one plan, and is what it would have become without us."""

import os

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from wan_loader.errors import DeviceMemoryError  # noqa: E402
from wan_loader.fastpath import Moves, Tally  # noqa: E402
from wan_loader.fastpath.moving import fetching  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402
from wan_loader.provenance.prove import prove  # noqa: E402

WIDTH = 300


class Part(torch.nn.Module):
    """Parameters, a persistent buffer, one of integers, and one that is in no file."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.randn(WIDTH))
        self.register_buffer("counts", torch.arange(WIDTH))
        self.register_buffer("rope", torch.ones(7), persistent=False)


def make_module():
    return torch.nn.ModuleDict({name: Part() for name in ("first", "second")})


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(1)
    safetensors.torch.save_file(make_module().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def module(path):
    """As programs get it: its tensors are views of a mapped file."""
    module = make_module()
    module.load_state_dict(safetensors.torch.load_file(path), assign=True)
    return module


@pytest.fixture
def planned(device):
    return Moves(kinds=(device,), io="buffered", min_nbytes=0)


def states(module):
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def assert_equal(module, expected):
    found = states(module)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8))


def test_one_plan_fetches_a_module(module, planned, device, path):
    expected = {name: tensor.clone() for name, tensor in states(module).items()}
    objects = {name: id(parameter) for name, parameter in module.named_parameters()}
    module["second"].linear.bias.requires_grad_(False)
    planned.fetch(module, torch.device(device), None)
    assert planned.tally.total.n_plans == 1
    assert planned.tally.total.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == objects
    assert not module["second"].linear.bias.requires_grad
    assert module["second"].linear.weight.requires_grad
    assert all(tensor.device.type == device for tensor in module.state_dict().values())
    assert prove(dict(module.state_dict())).ranges == {}, "what has moved is no view of the file any more"
    os.unlink(path)
    assert_equal(module, expected)
    assert planned.tally.left == {"does not lie in the mapping of a file": 2 * 7 * 4}


def test_tensors_move_as_a_module_that_has_them(module, planned, device):
    expected = {name: tensor.clone() for name, tensor in states(module).items()}
    parameters = dict(module.named_parameters())
    fetched = planned.fetch_tensors("Some", parameters, torch.device(device))
    assert all(fetched[name] is parameter for name, parameter in parameters.items())
    assert planned.tally.components["Some"].n_plans == 1
    assert all(planned.origins.take(parameter) for parameter in parameters.values()), "they may come back"
    assert_equal(module, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversions_happen_on_the_way(module, planned, device, dtype):
    expected = {n: t.to(device).to(dtype).cpu() if t.is_floating_point() else t for n, t in states(module).items()}
    planned.fetch(module, torch.device(device), dtype)
    assert planned.tally.total.n_plans == 1
    assert_equal(module, expected)


def test_what_was_written_to_is_left(module, planned, device):
    with torch.no_grad():
        module["first"].linear.weight[7, 3] += 1
    module["second"].linear.weight.data = torch.ones(WIDTH, WIDTH)
    expected = {name: tensor.clone() for name, tensor in states(module).items()}
    planned.fetch(module, torch.device(device), None)
    assert module["first"].linear.weight.device.type == "cpu"
    assert_equal(module, expected)
    assert planned.tally.left["was written to"] == WIDTH * WIDTH * 4


def test_what_is_written_to_meanwhile_is_left(module, planned, device, monkeypatch):
    plain = fetching.load

    def slow(*args, **options):
        loaded = plain(*args, **options)
        with torch.no_grad():
            module["first"].linear.weight += 1
        return loaded

    monkeypatch.setattr(fetching, "load", slow)
    expected = states(module)["first.linear.weight"] + 1
    planned.fetch(module, torch.device(device), None)
    assert torch.equal(states(module)["first.linear.weight"], expected)
    assert planned.tally.left["was written to meanwhile"] >= WIDTH * WIDTH * 4


def test_a_parameter_in_two_places_stays_one(module, planned, device):
    module["second"].linear.weight = module["first"].linear.weight
    planned.fetch(module, torch.device(device), None)
    assert module["second"].linear.weight is module["first"].linear.weight
    assert module["first"].linear.weight.device.type == device


def test_a_buffer_is_replaced_where_it_stands(module, planned, device):
    """As by torch: who holds the old one keeps it, and one in two places becomes two."""
    old = module["first"].scale
    module["second"].scale = old
    planned.fetch(module, torch.device(device), None)
    first, second = module["first"].scale, module["second"].scale
    assert first is not old
    assert old.device.type == "cpu"
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first.cpu(), old)
    assert torch.equal(second.cpu(), old)


def test_gradients_complex_numbers_and_eight_bit_floats_are_left(module, planned, device):
    module["first"].linear.weight.grad = torch.ones(WIDTH, WIDTH)
    planned.fetch(module, torch.device(device), torch.bfloat16)
    assert module["first"].linear.weight.dtype == torch.float32
    assert planned.tally.left["is no leaf, or has a gradient"] == WIDTH * WIDTH * 4


def test_with_tensors_on_the_meta_device_nothing_has_moved(module, planned, device):
    """The original raises for them, and what it has not come to is where it was."""
    module["second"].linear.bias = torch.nn.Parameter(torch.empty(WIDTH, device="meta"))
    weight = module["first"].linear.weight.data_ptr()
    planned.fetch(module, torch.device(device), None)
    assert module["first"].linear.weight.data_ptr() == weight
    assert planned.tally.left == {"has tensors on the meta device, which the original does not move": 0}


def test_parameters_without_a_size_are_left(module, planned, device):
    module["lazy"] = torch.nn.LazyLinear(3)
    planned.fetch(module, torch.device(device), None)
    assert planned.tally.total.n_plans == 1
    assert "is no plain tensor on the CPU" in planned.tally.left


def test_a_load_that_fails_changes_nothing(module, planned, device, monkeypatch):
    def fail(*args, **options):
        raise DeviceMemoryError("no room")

    monkeypatch.setattr(fetching, "load", fail)
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    planned.fetch(module, torch.device(device), None)
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before
    assert planned.tally.total.n_plans == 0
    assert any(reason.startswith("DeviceMemoryError: no room") for reason in planned.tally.left)


def test_little_is_not_worth_a_plan(module, device):
    planned = Moves(kinds=(device,))
    planned.fetch(module, torch.device(device), None)
    assert planned.tally.total.n_plans == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_modes_of_torch_are_left_alone(module, planned, device, mode):
    with mode():
        planned.fetch(module, torch.device(device), None)
    assert planned.tally.total.n_plans == 0


class TestInstalled:
    """The methods of modules, as programs call them."""

    @pytest.fixture
    def patches(self):
        return Patches(Tally())

    @pytest.fixture
    def planned(self, planned, patches):
        originals = torch.nn.Module.to, torch.nn.Module.cuda
        planned.install(patches)
        yield planned
        patches.undo()
        assert (torch.nn.Module.to, torch.nn.Module.cuda) == originals

    @pytest.mark.parametrize(
        "call", [lambda m, d: m.to(d), lambda m, d: m.to(device=d), lambda m, d: m.to(d, torch.float16)]
    )
    def test_a_move_takes_a_plan(self, module, planned, patches, device, call):
        plain = make_module()
        plain.load_state_dict({name: tensor.clone() for name, tensor in states(module).items()})
        assert call(module, device) is module
        assert planned.tally.total.n_plans == 1
        patches.undo()
        assert_equal(module, states(call(plain, device)))
        assert all(t.device == u.device for t, u in zip(module.buffers(), plain.buffers(), strict=True))

    def test_an_optimiser_goes_on(self, module, planned, device):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        module.to(device)
        before = module["first"].linear.weight.detach().clone()
        module["first"].linear(torch.ones(2, WIDTH, device=device)).sum().backward()
        optimiser.step()
        assert not torch.equal(module["first"].linear.weight, before)

    def test_calls_that_do_not_move_are_the_original_s(self, module, planned):
        module.to(torch.float16)
        module.to(memory_format=torch.channels_last)
        with pytest.raises(TypeError):
            module.to("cpu", 1, 2, 3, 4)
        with pytest.raises(RuntimeError):
            module.to("no such device")
        assert planned.tally.total.n_plans == 0

    def test_what_others_put_over_ours_stays(self, module, planned, patches, device):
        ours = torch.nn.Module.to

        def others(self, *args, **kwargs):
            return ours(self, *args, **kwargs)

        torch.nn.Module.to = others
        patches.undo()
        assert torch.nn.Module.to is others
        torch.nn.Module.to = ours.__wrapped__
        assert others(module, device) is module
        assert planned.tally.total.n_plans == 0, "ours only passes calls on"
