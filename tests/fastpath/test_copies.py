"""`load_state_dict` fills a module with mappings of the file, and nobody can tell them from copies."""

import gc
import os
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from versions import needs_torch  # noqa: E402

from wan_loader.fastpath.libraries import copies  # noqa: E402
from wan_loader.fastpath.libraries.copies import Copies  # noqa: E402
from wan_loader.fastpath.libraries.torch_load import TorchLoad  # noqa: E402
from wan_loader.fastpath.moving.moves import Moves  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402
from wan_loader.provenance.prove import prove  # noqa: E402

WIDTH = 100
SPARED = "copies by load_state_dict"


class Part(torch.nn.Module):
    """Parameters, buffers, and one buffer that is in no file."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.register_buffer("scale", torch.randn(WIDTH, dtype=dtype))
        self.register_buffer("rope", torch.ones(7), persistent=False)


def make_module(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.ModuleDict({name: Part(dtype) for name in ("first", "second")})


@pytest.fixture
def patches(tally, leases):
    patches = Patches(tally)
    Copies(tally, leases, min_nbytes=1).install(patches)
    TorchLoad(Tally(), leases, min_nbytes=0).install(patches)
    yield patches
    patches.undo()


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path)


def saved(tmp_path, dtype=torch.float32):
    torch.manual_seed(2)
    module = torch.nn.ModuleDict({name: Part(dtype) for name in ("first", "second")})
    torch.save(module.state_dict(), tmp_path / "x.pth")
    return tmp_path / "x.pth"


def mapped(module):
    return set(prove(dict(module.state_dict())).ranges)


def assert_equal(module, expected):
    found, expected = module.state_dict(), expected.state_dict()
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_filled_without_copies(patches, tally, tmp_path, dtype):
    path = saved(tmp_path, dtype)
    module, expected = make_module(dtype), make_module(dtype)
    module["first"].linear.bias.requires_grad_(False)
    objects = {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    versions = {name: tensor._version for name, tensor in expected.named_parameters()}
    assert module.load_state_dict(torch.load(path)) == expected.load_state_dict(torch.load(path, mmap=False))
    assert tally.spared == {SPARED: 6}
    assert mapped(module) == module.state_dict().keys()
    assert_equal(module, expected)
    assert {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]} == objects
    for name, tensor in expected.named_parameters():
        assert module.get_parameter(name)._version == tensor._version == versions[name] + 1
    assert not module["first"].linear.bias.requires_grad
    assert module["second"].linear.bias.requires_grad
    assert all(tensor.data_ptr() % 64 == 0 for tensor in module.state_dict().values())
    assert not tally.left


def test_writes_to_one_do_not_show_in_the_other(patches, path):
    state, module, other, expected = torch.load(path), make_module(), make_module(), make_module()
    expected.load_state_dict(torch.load(path, mmap=False))
    module.load_state_dict(state)
    other.load_state_dict(state)
    state["first.linear.weight"].zero_()
    state["first.linear.bias"].numpy()[:] = 7
    assert_equal(module, expected)
    with torch.no_grad():
        module["second"].linear.weight += 1
    module["second"].scale.data[3] = 5
    assert_equal(other, expected)
    assert torch.equal(state["second.linear.weight"], expected["second"].linear.weight)
    os.truncate(path, 10)
    assert_equal(other, expected)
    assert torch.equal(module["second"].linear.weight, expected["second"].linear.weight + 1)
    assert not state["first.linear.weight"].any()


def test_a_value_for_two_parameters_is_copied_twice(patches, tally, tmp_path):
    tensor = torch.randn(WIDTH, WIDTH)
    torch.save({"0.weight": tensor, "1.weight": tensor}, tmp_path / "y.pth")
    module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))
    module.load_state_dict(torch.load(tmp_path / "y.pth"))
    assert tally.spared == {SPARED: 2}
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(module[1].weight, tensor)


def test_strides_stay(patches, tally, tmp_path):
    """A kernel of one pixel is contiguous in both formats; convolutions ask the strides in which."""
    make = torch.nn.Conv2d(WIDTH, WIDTH, 1, bias=False).to
    torch.save(make().state_dict(), tmp_path / "y.pth")
    module = make(memory_format=torch.channels_last)
    strides = module.weight.stride()
    module.load_state_dict(torch.load(tmp_path / "y.pth"))
    assert module.weight.stride() == strides == (WIDTH, 1, WIDTH, WIDTH)
    assert not tally.spared


def test_then_a_move_takes_one_plan(patches, path):
    module, expected = make_module(), make_module()
    expected.load_state_dict(torch.load(path, mmap=False))
    module.load_state_dict(torch.load(path))
    moves = Moves(kinds=("cpu",), io="buffered", min_nbytes=0)
    moves.fetch(module, torch.device("cpu:0"), torch.bfloat16)
    assert moves.tally.total.n_plans == 1
    assert not mapped(module)
    assert_equal(module, expected.to(torch.bfloat16))


def test_training_goes_on(patches, path):
    modules = []
    for options in ({}, {"mmap": False}):
        module = make_module()
        module["first"].linear(torch.ones(2, WIDTH)).sum().backward()
        module.load_state_dict(torch.load(path, **options))
        for _ in range(2):
            module["first"].linear(torch.ones(2, WIDTH)).square().sum().backward()
            with torch.no_grad():
                for parameter in module["first"].linear.parameters():
                    parameter -= 0.1 * parameter.grad
        modules.append(module)
    assert_equal(*modules)


def test_the_memory_goes_with_the_parameters(patches, leases, path, open_files):
    gc.collect()
    before = open_files(path)
    module = make_module()
    module.load_state_dict(torch.load(path))
    gc.collect()
    assert open_files(path) == (before[0] + 1, 6)
    module["first"].linear.weight.data = torch.ones(3)
    assert open_files(path) == (before[0] + 1, 5)
    del module
    gc.collect()
    assert open_files(path) == before


def without_names(state):
    del state["first.linear.weight"]


def with_other_names(state):
    state["third"] = torch.ones(3)


def with_another_shape(state):
    state["second.linear.weight"] = torch.ones(3, 4)


def with_no_tensor(state):
    state["second.linear.weight"] = "a string"


@pytest.mark.parametrize("change", [without_names, with_other_names, with_another_shape, with_no_tensor])
@pytest.mark.parametrize("strict", [True, False])
def test_errors_and_results_are_the_original_s(patches, path, change, strict):
    outcomes, modules = [], []
    for options in ({}, {"mmap": False}):
        module, state = make_module(), torch.load(path, **options)
        change(state)
        try:
            outcomes.append(str(module.load_state_dict(state, strict=strict)))
        except RuntimeError as error:
            outcomes.append(str(error))
        modules.append(module)
    assert outcomes[0] == outcomes[1]
    assert_equal(*modules)
    assert mapped(modules[0])


def test_calls_that_make_no_sense_are_the_original_s(patches):
    module = make_module()
    with pytest.raises(TypeError, match="dict-like"):
        module.load_state_dict([1])
    with pytest.raises(TypeError):
        module.load_state_dict()
    with pytest.raises(TypeError):
        module.load_state_dict({}, nonsense=1)


def hold_a_view(module):
    return module["first"].linear.weight[3]


def hold_an_array(module):
    return module["first"].linear.weight.detach().numpy()


def hold_the_storage(module):
    return module["first"].linear.weight.untyped_storage()


def hold_the_data(module):
    return module["first"].linear.weight.data


def be_part_of_more(module):
    module["first"].linear.weight.data = torch.zeros(WIDTH + 1, WIDTH)[1:]


def be_shared_with_processes(module):
    module["first"].linear.weight.share_memory_()


def be_in_two_places(module):
    module["second"].linear.weight = module["first"].linear.weight


def be_turned(module):
    module["first"].linear.weight.data = torch.zeros(WIDTH, WIDTH).t()


@pytest.mark.parametrize(
    "arrange",
    [
        hold_a_view,
        hold_an_array,
        hold_the_storage,
        hold_the_data,
        be_part_of_more,
        be_shared_with_processes,
        be_in_two_places,
        be_turned,
    ],
)
def test_what_others_may_look_at_is_copied(patches, path, arrange):
    module, expected = make_module(), make_module()
    held, theirs = arrange(module), arrange(expected)
    address = module["first"].linear.weight.data_ptr()
    expected.load_state_dict(torch.load(path, mmap=False))
    module.load_state_dict(torch.load(path))
    assert_equal(module, expected)
    assert "first.linear.weight" not in mapped(module)
    assert "first.linear.bias" in mapped(module)
    assert module["first"].linear.weight.data_ptr() == address
    if hasattr(held, "tolist"):
        assert held.tolist() == theirs.tolist()


def own_loading(module):
    class Own(torch.nn.Module):
        def _load_from_state_dict(self, state_dict, *args):
            assert all(type(value) is torch.Tensor for value in state_dict.values())
            super()._load_from_state_dict(state_dict, *args)

    module["own"] = Own()


def hook_before(module):
    module["first"].linear.register_load_state_dict_pre_hook(
        lambda module, state_dict, prefix, *args: state_dict[prefix + "weight"].zero_()
    )


@pytest.mark.parametrize(
    "arrange", [own_loading, pytest.param(hook_before, marks=needs_torch(2, 5, "such hooks are private"))]
)
def test_code_of_others_sees_what_it_would_see(patches, tally, path, arrange):
    modules = []
    for options in ({}, {"mmap": False}):
        module = make_module()
        arrange(module)
        module.load_state_dict(torch.load(path, **options))
        modules.append(module)
    assert_equal(*modules)
    assert not mapped(modules[0])
    assert "code of its own" in str(tally.left)


def test_hooks_behind_it_are_called(patches, path):
    seen, module = [], make_module()
    module.register_load_state_dict_post_hook(lambda module, keys: seen.append(keys))
    result = module.load_state_dict(torch.load(path))
    assert seen == [result]
    assert mapped(module)


def test_what_is_assigned_is_assigned(patches, tally, path):
    state, module, other = torch.load(path), make_module(), make_module()
    module.load_state_dict(state, assign=True)
    assert module["first"].scale is state["first.scale"]
    # the original notes it in the dict
    other.load_state_dict(state)
    assert other["first"].scale is state["first.scale"]
    assert not tally.spared
    assert tally.left == {"load_state_dict: the dict is to be assigned": 0}


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_modes_of_torch_are_left_alone(patches, tally, path, mode):
    state, module = torch.load(path), make_module()
    with mode():
        module.load_state_dict(state)
    assert not mapped(module)
    assert not tally.spared


def test_values_that_were_written_to_are_copied(patches, tally, path):
    state, module = torch.load(path), make_module()
    state["first.linear.weight"].view(-1)[:: 4096 // 4].fill_(9)
    module.load_state_dict(state)
    assert torch.equal(module["first"].linear.weight, state["first.linear.weight"])
    assert "first.linear.weight" not in mapped(module)


def test_values_of_mapped_files_of_any_kind(patches, tally, tmp_path, monkeypatch):
    """The alignment of the file decides: results of some kernels depend on it."""
    monkeypatch.setattr(copies, "ALIGNMENT", 8)
    tensors = {"weight": torch.randn(WIDTH, WIDTH), "bias": torch.randn(WIDTH)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    module = torch.nn.Linear(WIDTH, WIDTH)
    module.load_state_dict(safetensors.torch.load_file(tmp_path / "x.safetensors"))
    assert mapped(module) == {"weight", "bias"}
    monkeypatch.setattr(copies, "ALIGNMENT", 1 << 20)
    other = torch.nn.Linear(WIDTH, WIDTH)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "x.safetensors"))
    assert not mapped(other)
    assert tally.left == {
        "load_state_dict: bytes that are not aligned in their file are copied": 4 * WIDTH * (WIDTH + 1)
    }
    os.truncate(tmp_path / "x.safetensors", 3)
    assert torch.equal(module.weight, tensors["weight"])


def test_what_cannot_be_leased_is_copied(patches, tally, path):
    state, module = torch.load(path), make_module()
    with path.open("r+b"):
        module.load_state_dict(state)
    assert not mapped(module)
    assert not tally.left, "the values were settled, and are in no file"
    state = torch.load(path, mmap=True)
    with path.open("r+b"):
        module.load_state_dict(state)
    assert not mapped(module)
    assert tally.left == {"load_state_dict: the file is not mapped: somebody has it open for writing": 0}


def test_an_unknown_torch_is_left_alone(patches, path, monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    module = make_module()
    module.load_state_dict(OrderedDict(torch.load(path)))
    assert not mapped(module)


def test_a_module_of_an_unknown_kind_is_left_alone(patches, tally, path):
    module, expected = make_module(), make_module()
    expected.load_state_dict(torch.load(path, mmap=False))
    module.named_modules = None
    module.load_state_dict(torch.load(path))
    assert_equal(module, expected)
    assert tally.left == {"load_state_dict: TypeError: 'NoneType' object is not callable": 0}
