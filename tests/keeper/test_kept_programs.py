"""Programs that know nothing of us, and weights that are kept: the same bytes of the same files are not read."""

import gc

import pytest
import torch
from keepers import user_count, wait_until
from programs import run as run_program
from safetensors.torch import load_file, save_file

import wan_loader
from wan_loader.fastpath import Moves, Tally
from wan_loader.fastpath.accelerator import Accelerator
from wan_loader.keeper import client
from wan_loader.keeper.attached import attach_ranges
from wan_loader.plan.dtype_policy import DtypePolicy


def make_module():
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 7))


@pytest.fixture
def path(tmp_path):
    save_file(make_module().state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def module(path):
    module = make_module()
    module.load_state_dict(load_file(path), assign=True)
    return module.eval()


def moves(device, *, keep=True):
    return Moves(Tally(), kinds=(device,), io="buffered", min_nbytes=0, keep=keep)


def states(module):
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def check_equal(module, expected, dtype=None):
    for name, tensor in states(module).items():
        wanted = expected[name]
        assert torch.equal(tensor, wanted.to(dtype) if dtype and wanted.is_floating_point() else wanted), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_module_that_moves_is_attached(runtime, path, module, device, dtype):
    wan_loader.keep(path, device, dtype=dtype)
    expected, planned, on = states(module), moves(device), torch.device(device)
    planned.fetch(module, on, dtype)
    assert planned.tally.spared["loads of kept tensors"] == len(expected)
    assert planned.tally.total.nbytes == 0
    check_equal(module, expected, dtype)
    assert user_count() == 1
    module.to("meta")
    gc.collect()
    wait_until(lambda: user_count() == 0)


def test_what_is_not_kept_is_read(runtime, path, module, device):
    """Kept as another dtype, in part, or not at all."""
    wan_loader.keep(path, device, dtype="fp16")
    expected, planned, on = states(module), moves(device), torch.device(device)
    planned.fetch(module, on, torch.bfloat16)
    assert planned.tally.spared["loads of kept tensors"] == 1  # the integer
    assert planned.tally.total.nbytes > 0
    check_equal(module, expected, torch.bfloat16)


def test_nobody_attaches_who_did_not_ask(runtime, path, module, device):
    wan_loader.keep(path, device)
    moves(device, keep=False).fetch(module, torch.device(device), None)
    assert user_count() == 0


def test_without_a_keeper_everything_is_read(runtime, path, module, device):
    expected, planned = states(module), moves(device)
    planned.fetch(module, torch.device(device), None)
    assert not planned.tally.spared
    assert planned.tally.total.nbytes > 0
    check_equal(module, expected)


def test_ranges_by_other_names_and_of_changed_files(runtime, path, device):
    from dataclasses import replace

    wan_loader.keep(path, device)
    checkpoint, on = wan_loader.open_checkpoint(path), wan_loader.resolve_device(device)
    renamed = replace(checkpoint, tensors=tuple(t._replace(name=f"x.{t.name}") for t in checkpoint.tensors))
    found = attach_ranges(renamed, DtypePolicy(), on)
    assert {name.removeprefix("x.") for name in found} == set(checkpoint.names)
    other = replace(checkpoint, files=(replace(checkpoint.files[0], ctime_ns=1),))
    assert attach_ranges(other, DtypePolicy(), on) == {}
    shorter = tuple(t._replace(shape=(*t.shape[:-1], 1)) for t in checkpoint.tensors if t.shape)
    assert attach_ranges(replace(checkpoint, tensors=shorter), DtypePolicy(), on) == {}
    bent = tuple(t._replace(stride=t.stride[::-1]) for t in checkpoint.tensors if len(t.shape) == 2)
    assert attach_ranges(replace(checkpoint, tensors=bent), DtypePolicy(), on) == {}
    client.drop()
    assert attach_ranges(checkpoint, DtypePolicy(), on) == {}


def test_only_as_long_as_somebody_has_it_in():
    accelerator = Accelerator()
    with accelerator.keep():
        assert accelerator.keeps
    assert not accelerator.keeps


@pytest.mark.parametrize("keep", [True, False])
def test_the_wish_arrives(tmp_path, keep):
    """In a script, and in the processes that a program starts."""
    script = tmp_path / "script.py"
    script.write_text("import torch, wan_loader; print(wan_loader.accelerate().keeps)\n")
    words = ["-m", "wan_loader", "run", "--quiet", *(["--keep"] if keep else [])]
    assert run_program(*words, script).stdout == f"{keep}\n"
    code = "import os; print(os.environ.get('WAN_LOADER_KEEP') == '1')"
    assert run_program(*words, "--", "python", "-c", code).stdout == f"{keep}\n"


@pytest.mark.gpu
def test_a_program_that_moves_its_model_to_a_gpu(runtime, tmp_path):
    path = tmp_path / "large.safetensors"
    save_file({"weight": torch.randn(4000, 3000)}, path)
    wan_loader.keep(path, "cuda")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "net = torch.nn.Linear(3000, 4000, bias=False)\n"
        "net.load_state_dict(load_file(sys.argv[1]), assign=True)\n"
        "expected = net(x := torch.randn(2, 3000))\n"
        "before = torch.cuda.memory_allocated()\n"
        "net.to('cuda')\n"
        "assert torch.cuda.memory_allocated() == before\n"
        "assert torch.allclose(net(x.cuda()).cpu(), expected, atol=1e-2)\n"
    )
    done = run_program("-m", "wan_loader", "run", "--keep", script, path)
    assert done.returncode == 0, done.stderr
    assert "1 loads of kept tensors" in done.stderr
