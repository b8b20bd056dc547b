"""Modules that come back from a device wait for their files again, if they still are what the files hold."""

import gc
import os
import shutil
import weakref

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
import tied_net  # noqa: E402
from loader_cases import bits  # noqa: E402
from tied_net import WIDTH  # noqa: E402
from waiting_tensors import source_of  # noqa: E402

from wan_loader.fastpath import Accelerator  # noqa: E402
from wan_loader.fastpath.deferral.deferred import is_deferred, settle_all, settle_file  # noqa: E402
from wan_loader.fastpath.deferral.deferred_tensor import living  # noqa: E402
from wan_loader.fastpath.moving import loads, origins, returns  # noqa: E402
from wan_loader.system.posix import trim_heap  # noqa: E402

COPIES = "copies back to the CPU"
CHANGED = "comes back, and is not known to be what is in its file"
READ = "was read into memory, as somebody looked at it"
CAST = "was cast on the CPU, as somebody looked at it"


class Net(tied_net.Net):
    """With a buffer of truth values, and one that is in no file."""

    def __init__(self):
        super().__init__()
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("rope", torch.ones(7), persistent=False)


#: Objects of a module that are in its file; a parameter in two places is one.
N_OBJECTS = 7


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(1)
    net = Net()
    with torch.no_grad():
        net.second.weight[0, 0] = float("nan")
        net.second.weight[0, 1] = -0.0
    safetensors.torch.save_model(net, str(tmp_path / "model.safetensors"))
    return tmp_path / "model.safetensors"


@pytest.fixture
def build(path):
    """Modules as programs get them: their tensors are views of a mapped file."""

    return lambda: Net.mapped(path)


@pytest.fixture
def away(device):
    """Another device than the CPU; the CPU by its index is one, too, as far as torch's bookkeeping goes."""
    return torch.device(device, 0)


@pytest.fixture
def accelerator(away):
    with Accelerator(kinds=(str(away),), io="buffered", min_nbytes=0) as accelerator:
        yield accelerator


@pytest.fixture
def tally(accelerator):
    return accelerator.tally


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    if living():
        gc.collect()
    assert not living()


def values(module):
    """Look at everything."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(bits(tensor), bits(expected[name])), name


def waiting(module):
    return {name for name, tensor in module.state_dict(keep_vars=True).items() if is_deferred(tensor)}


BACK = {
    "cpu": lambda m: m.cpu(),
    "to": lambda m: m.to("cpu"),
    "not_blocking": lambda m: m.to("cpu", non_blocking=True),
    "device": lambda m: m.to(device=torch.device("cpu")),
}


@pytest.mark.parametrize("back", BACK.values(), ids=BACK)
def test_what_comes_back_waits_for_its_file(build, tally, away, back):
    module = build()
    module.second.bias.requires_grad_(False)
    expected = values(module)
    objects = {name: id(parameter) for name, parameter in module.named_parameters()}
    module.to(away)
    moved = module.scale
    assert back(module) is module
    assert waiting(module) == {*expected, "tied.weight"}
    assert {str(tensor.device) for tensor in module.state_dict().values()} == {"cpu"}
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == objects
    assert module.tied.weight is module.first.weight
    assert isinstance(module.first.weight, torch.nn.Parameter)
    assert module.first.weight.requires_grad
    assert not module.second.bias.requires_grad
    assert module.scale is not moved
    assert not is_deferred(moved), "who has the old buffer keeps it"
    assert tally.spared[COPIES] == N_OBJECTS
    assert tally.spared_nbytes[COPIES] == sum(t.nbytes for n, t in expected.items() if n != "tied.weight")
    assert CHANGED not in tally.left
    assert READ not in tally.left
    same(values(module), expected)
    settle_all()
    assert {type(parameter) for parameter in module.parameters()} == {torch.nn.Parameter}
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == objects


def test_each_round_trip_takes_one_plan(build, tally, away):
    module = build()
    expected = values(module)
    nbytes = sum(tensor.nbytes for name, tensor in expected.items() if name != "tied.weight")
    for turn in range(1, 4):
        module.to(away)
        assert not waiting(module)
        served = tally.components["Net"]
        assert (served.n_plans, served.nbytes) == (turn, turn * nbytes)
        if turn < 3:
            module.to("cpu")
            assert tally.spared[COPIES] == turn * N_OBJECTS
    assert "casts on the CPU" not in tally.spared
    same(values(module), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("is_cast_before", [True, False])
def test_what_was_converted_waits_for_its_cast(build, tally, away, dtype, is_cast_before):
    module = build()
    module.second.weight.data.nan_to_num_()
    expected = {n: t.to(dtype) if t.is_floating_point() else t for n, t in values(module).items()}
    if is_cast_before:
        module.to(dtype).to(away)
    else:
        module.to(away, dtype)
    module.cpu()
    assert waiting(module) >= {"first.weight", "first.bias", "second.bias", "scale", "counts"}
    module.to(away)
    assert tally.components["Net"].n_plans == 2
    module.cpu()
    same(values(module), expected)
    assert CAST in tally.left
    assert tally.spared["casts on the CPU"] == (8 if is_cast_before else 4)


def test_numbers_that_are_none_are_not_converted_elsewhere(build, tally, away):
    """A GPU keeps other bits of them than a processor."""
    module = build().bfloat16()
    expected = values(build().bfloat16().to(away))
    module.to(away).cpu()
    assert "second.weight" not in waiting(module)
    assert "first.weight" in waiting(module)
    assert tally.left[CHANGED] == WIDTH * WIDTH * 2
    same(values(module), expected)


def test_a_conversion_back_and_forth_is_known(build, away, accelerator):
    """What moves with a dtype, and has waited without one, is converted on the way."""
    module = build()
    module.second.weight.data.nan_to_num_()  # which NaN comes of one is the converting device's affair
    expected = {n: t.to(torch.float16) if t.is_floating_point() else t for n, t in values(module).items()}
    module.to(away).cpu()
    module.to(away, torch.float16)
    assert accelerator.tally.components["Net"].n_plans == 2
    same(values(module), expected)


def edit_in_place(module, away):
    with torch.no_grad():
        module.first.weight[3, 5] += 1
    return {"first.weight", "tied.weight"}


def edit_by_data(module, away):
    module.second.weight.data[7] = 0
    return {"second.weight"}


def edit_a_sign(module, away):
    """To numbers it is the same as before."""
    with torch.no_grad():
        module.second.weight[0, 1] = 0.0
    return {"second.weight"}


def edit_other_memory(module, away):
    module.second.bias.data = torch.full_like(module.second.bias.data, 3)
    return {"second.bias"}


def edit_a_buffer(module, away):
    module.counts += 1
    module.flag.logical_not_()
    return {"counts", "flag"}


def edit_the_last_element(module, away):
    module.second.weight.data[-1, -1] *= 2
    return {"second.weight"}


EDITS = (edit_in_place, edit_by_data, edit_a_sign, edit_other_memory, edit_a_buffer, edit_the_last_element)


@pytest.mark.parametrize("edit", EDITS)
def test_edits_on_the_device_survive(build, tally, away, edit, monkeypatch):
    monkeypatch.setattr(returns, "PIECE_BYTES", 4096)
    module = build()
    names = {*values(module), "tied.weight"}
    module.to(away)
    changed = edit(module, away)
    expected = values(module)
    module.cpu()
    assert waiting(module) == names - changed
    assert tally.spared[COPIES] == N_OBJECTS - len(changed - {"tied.weight"})
    same(values(module), expected)
    module.to(away).cpu()
    same(values(module), expected)


def test_an_optimiser_has_worked_on_it(build, tally, away):
    module = build()
    module.second.weight.data.nan_to_num_()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module.to(away)
    module(torch.ones(2, WIDTH, device=away)).sum().backward()
    optimiser.step()
    optimiser.zero_grad()
    expected = values(module)
    module.cpu()
    assert waiting(module) == {"scale", "counts", "flag"}
    same(values(module), expected)


def test_gradients_hooks_and_graphs_are_left(build, away, accelerator):
    module = build().to(away)
    module.first.weight.grad = torch.ones_like(module.first.weight)
    module.first.bias.register_hook(lambda grad: grad)
    view = module.second.bias.view(2, -1)
    module.cpu()
    assert not waiting(module) & {"first.weight", "tied.weight", "first.bias", "second.bias"}
    assert module.first.weight.grad.device == torch.device("cpu")
    assert view.shape == (2, WIDTH // 2)


def test_swaps_of_what_has_moved_go_on(build, away, accelerator):
    """Torch refuses them to what somebody refers to weakly."""
    module = build().to(away)
    assert not weakref.getweakrefs(module.first.weight)
    torch.utils.swap_tensors(module.second.weight, torch.nn.Parameter(torch.ones(WIDTH, WIDTH, device=away)))
    module.cpu()
    assert "second.weight" not in waiting(module)
    assert torch.equal(module.second.weight, torch.ones(WIDTH, WIDTH))


def test_other_tensors_at_a_noted_address(build, away, accelerator):
    """A note may be of what was there before: it is compared, and nothing else counts."""
    module, other = build().to(away), torch.nn.Linear(WIDTH, WIDTH, device="meta")
    other.weight = torch.nn.Parameter(module.first.weight.data)
    other.bias = torch.nn.Parameter(module.first.bias.data.zero_())
    expected = values(other)
    del module
    other.cpu()
    assert waiting(other) == {"weight"}
    same(values(other), expected)


def test_the_same_memory_as_something_else(build, away, accelerator):
    """Equal bits are not enough."""
    module = build().to(away)
    module.first.bias.data = module.first.bias.data.view(2, -1)
    module.second.weight.data = module.second.weight.data.t()
    module.counts = module.counts.view(torch.float64)
    expected = values(module)
    module.cpu()
    assert waiting(module) == {"first.weight", "tied.weight", "second.bias", "scale", "flag"}
    same(values(module), expected)


def test_several_parameters_of_the_same_bytes(path, away, tally):
    bias = safetensors.torch.load_file(path)["first.bias"]
    module = torch.nn.ParameterList([torch.nn.Parameter(bias) for _ in range(3)])
    module.to(away).cpu()
    assert waiting(module) == {"0", "1", "2"}
    with torch.no_grad():
        module[1].zero_()
    assert not torch.equal(module[0], module[1])
    assert torch.equal(module[2], bias)


def test_notes_are_few(build, away, accelerator, monkeypatch):
    monkeypatch.setattr(origins, "_MAX_NOTES", 3)
    module = build().to(away)
    expected = values(module)
    module.cpu()
    assert len(waiting(module)) == 3
    same(values(module), expected)


class TestFiles:
    """What may become of the file while the weights are on a device, or wait for it again."""

    @pytest.mark.parametrize("how", ["deleted", "replaced", "rewritten", "truncated", "touched"])
    def test_a_file_that_was_changed_meanwhile(self, build, path, tally, away, how):
        module = build()
        expected = values(module)
        module.to(away)
        if how == "deleted":
            os.unlink(path)
        elif how == "replaced":
            shutil.copy(path, f"{path}.new")
            os.replace(f"{path}.new", path)
        elif how == "touched":
            os.utime(path)
        else:
            size = path.stat().st_size
            with open(path, "r+b") as file:
                file.truncate(size // 2)
                file.truncate(size if how == "rewritten" else size // 2)
        module.cpu()
        assert not waiting(module)
        assert tally.left[CHANGED] == sum(t.nbytes for n, t in expected.items() if n != "tied.weight")
        same(values(module), expected)

    def test_a_file_that_is_changed_while_it_is_compared(self, build, path, tally, away, monkeypatch):
        module = build()
        expected = values(module)
        module.to(away)
        plain = returns._is_other

        def slow(mine, piece):
            os.utime(path)
            return plain(mine, piece)

        monkeypatch.setattr(returns, "_is_other", slow)
        module.cpu()
        assert not waiting(module)
        assert any("CheckpointError" in reason for reason in tally.left)
        same(values(module), expected)

    @pytest.mark.parametrize("remove", [os.unlink, lambda path: os.replace(shutil.copy(path, f"{path}.new"), path)])
    def test_a_file_that_is_gone_afterwards(self, build, path, accelerator, away, remove):
        module = build()
        expected = values(module)
        module.to(away).cpu()
        assert waiting(module)
        remove(path)
        same(values(module), expected)

    def test_a_file_that_the_program_saves_over(self, build, path, accelerator, away):
        module = build()
        expected = values(module)
        module.to(away).cpu()
        torch.save({"x": torch.zeros(3)}, path)
        assert not waiting(module)
        same(values(module), expected)

    def test_a_file_that_is_not_in_memory_any_more(self, build, path, tally, away, evict):
        module = build()
        expected = values(module)
        module.to(away)
        del module.rope
        gc.collect()
        evict(path)
        module.cpu()
        assert not waiting(module)
        assert "comes back, and its file is not in memory any more" in tally.left
        same(values(module), expected)

    def test_leaving_settles(self, build, path, away):
        module = build()
        expected = values(module)
        with Accelerator(kinds=(str(away),), io="buffered", min_nbytes=0):
            module.to(away).cpu()
            assert waiting(module)
        assert not waiting(module)
        same(values(module), expected)


class TestLeft:
    """Moves that are the original's."""

    @pytest.mark.parametrize(
        "back", [lambda m: m.to("cpu", torch.float16), lambda m: m.to("cpu").to(torch.float16), lambda m: m.half()]
    )
    def test_conversions(self, build, accelerator, away, back):
        module = build()
        module.second.weight.data.nan_to_num_()  # which NaN comes of one is the converting device's affair
        expected = {n: t.to(torch.float16) if t.is_floating_point() else t for n, t in values(module).items()}
        back(module.to(away)).cpu()
        same(values(module), expected)

    @pytest.mark.parametrize(
        "error", [RuntimeError("CUDA error"), torch.OutOfMemoryError("no room"), OSError(5, "EIO")]
    )
    def test_failures(self, build, tally, away, monkeypatch, error):
        def fail(*args):
            raise error

        module = build()
        expected = values(module)
        module.to(away)
        monkeypatch.setattr(returns, "_is_other", fail)
        module.cpu()
        assert not waiting(module)
        assert any(type(error).__name__ in reason for reason in tally.left)
        same(values(module), expected)

    def test_ctrl_c(self, build, tally, away, monkeypatch):
        def fail(*args):
            raise KeyboardInterrupt

        module = build().to(away)
        before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
        monkeypatch.setattr(returns, "_is_other", fail)
        with pytest.raises(KeyboardInterrupt):
            module.cpu()
        assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before

    def test_modes(self, build, accelerator, away):
        module = build().to(away)
        with torch.inference_mode():
            module.cpu()
        assert not waiting(module)

    def test_little(self, build, away):
        with Accelerator(kinds=(str(away),), io="buffered", min_nbytes=0) as accelerator:
            module = build().to(away)
            accelerator._seams[0].__self__.min_nbytes = 1 << 20
            module.cpu()
            assert not waiting(module)

    def test_memory_that_was_in_no_file(self, away):
        with Accelerator(kinds=(str(away),), io="buffered", min_nbytes=0) as accelerator:
            module = torch.nn.Linear(9, 9).to(away).cpu()
            assert not waiting(module)
            assert not accelerator.tally.spared


def anonymous():
    """Memory that is in no file, without what the C library keeps of what was freed."""
    gc.collect()
    trim_heap()
    with open("/proc/self/status") as status:
        return int(status.read().partition("RssAnon:")[2].split()[0]) << 10


def test_no_memory_is_taken(tmp_path, away, accelerator):
    """Neither for what comes back, nor for what is compared: 64 MiB are on their way."""
    path, nbytes = tmp_path / "large.safetensors", 64 << 20
    safetensors.torch.save_file({"weight": torch.ones(nbytes // 4096, 1024)}, path)
    module = torch.nn.Linear(1024, nbytes // 4096, bias=False)

    def load():
        module.load_state_dict(safetensors.torch.load_file(path), assign=True)

    load()
    module.to(away).cpu()
    load()
    before = anonymous()
    module.to(away).cpu()
    assert waiting(module) == {"weight"}
    assert anonymous() - before < 16 << 20
    with pytest.raises(ValueError, match="waits for no cast"):
        source_of(module.weight)
    settle_file(path)
    assert torch.equal(module.weight, torch.ones(nbytes // 4096, 1024))


@pytest.mark.gpu
def test_little_memory_of_the_device_is_taken(tmp_path):
    """Twenty pieces or so, whatever the size, and be it one tensor."""
    path, nbytes = tmp_path / "large.safetensors", 2 << 30
    safetensors.torch.save_file({"weight": torch.ones(nbytes // 2048, 1024, dtype=torch.bfloat16)}, path)
    module = torch.nn.Linear(1024, nbytes // 2048, bias=False, dtype=torch.bfloat16)
    module.load_state_dict(safetensors.torch.load_file(path), assign=True)
    with Accelerator() as accelerator:
        module.to("cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        module.cpu()
        assert torch.cuda.max_memory_allocated() - before <= 256 << 20
        assert torch.cuda.max_memory_reserved() - reserved <= 320 << 20
        assert torch.cuda.memory_allocated() < before - nbytes // 2
        assert accelerator.tally.spared_nbytes[COPIES] == nbytes


def test_pieces_are_compared_as_they_lie(build, tally, away, monkeypatch):
    """Tensors of several pieces, and pieces of several tensors."""
    for module in (loads, returns):
        monkeypatch.setattr(module, "PIECE_BYTES", 4096)
    module = build()
    expected = values(module)
    module.to(away).cpu()
    assert tally.spared[COPIES] == N_OBJECTS
    same(values(module), expected)


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_a_pipeline_whose_models_are_offloaded(tmp_path, away):
    """Accelerate's hooks move each model there before it is called, and back before the next one is."""
    pytest.importorskip("transformers", minversion="5.0")
    diffusers = pytest.importorskip("diffusers", minversion="0.36", reason="wan_pipeline asks for a newer diffusers")
    from wan_pipeline.synth import synth

    directory = synth(tmp_path / "tiny", layout="diffusers", task="t2v-A14B").directory
    options = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}

    def program():
        pipe = diffusers.WanPipeline.from_pretrained(directory, torch_dtype=torch.bfloat16)
        pipe.enable_model_cpu_offload(device=away)
        pipe.set_progress_bar_config(disable=True)
        for _ in range(2):
            yield pipe("a cat", guidance_scale=1.0, generator=torch.Generator().manual_seed(3), **options).frames

    expected = list(program())
    with Accelerator(kinds=(str(away),), io="buffered", min_nbytes=0) as accelerator:
        tally = accelerator.tally
        for turn, (found, wanted) in enumerate(zip(program(), expected, strict=True), 1):
            assert torch.equal(found, wanted)
            plans = {name: served.n_plans for name, served in tally.components.items()}
            assert plans == {"UMT5EncoderModel": turn, "WanTransformer3DModel": 2 * turn}
        assert tally.spared[COPIES] > 0
        assert tally.left.keys() == {"does not lie in the mapping of a file"}
