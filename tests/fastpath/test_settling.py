"""Compilers and tracers see ordinary tensors, whatever waited before."""

import subprocess

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from wan_loader.fastpath import Accelerator  # noqa: E402
from wan_loader.fastpath.deferral.deferred import is_deferred  # noqa: E402

WIDTH = 16


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(1)
    safetensors.torch.save_file(torch.nn.Linear(WIDTH, WIDTH).state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def build(path):
    def build():
        module = torch.nn.Linear(WIDTH, WIDTH)
        module.load_state_dict(safetensors.torch.load_file(path), assign=True)
        return module.bfloat16()

    return build


@pytest.fixture
def accelerator():
    with Accelerator(("cpu:0",), io="buffered", min_nbytes=0) as accelerator:
        yield accelerator


OPTIONS = {"backend": "eager", "fullgraph": True}


def in_place(module):
    module.compile(**OPTIONS)
    return module


def as_function(module):
    return torch.compile(lambda x: module(x), **OPTIONS)


def moved(module):
    compiled = torch.compile(module, **OPTIONS)
    compiled.to("cpu:0")
    assert not is_deferred(module.weight)
    return compiled


WAYS = {
    "module": lambda m: torch.compile(m, **OPTIONS),
    "in_place": in_place,
    "function": as_function,
    "moved": moved,
    "trace": lambda m: torch.jit.trace(m, torch.ones(1, WIDTH, dtype=torch.bfloat16)),
    "script": lambda m: torch.jit.script(m),
    "fx": lambda m: torch.fx.symbolic_trace(m),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_compiled_is_ordinary(build, accelerator, way):
    module, x = build(), torch.linspace(-1, 1, 3 * WIDTH, dtype=torch.bfloat16).view(3, WIDTH)
    assert is_deferred(module.weight)
    compiled = way(module)
    outcome = compiled(x)
    assert not is_deferred(module.weight)
    assert accelerator.tally.total.n_plans == (way is moved)
    accelerator.uninstall()
    accelerator.install()
    with torch.no_grad():
        assert torch.equal(outcome, torch.nn.functional.linear(x, module.weight, module.bias))


def test_what_waits_is_settled_at_the_end(build):
    with Accelerator(("cpu:0",), min_nbytes=0):
        module = build()
        assert is_deferred(module.weight)
    assert type(module.weight) is type(module.bias) is torch.nn.Parameter


def test_who_saves_over_the_file_saves_what_it_held(accelerator, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(WIDTH, WIDTH).state_dict(), path)
    module = torch.nn.Linear(WIDTH, WIDTH)
    module.load_state_dict(torch.load(path, mmap=True), assign=True)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in module.state_dict().items()}
    module.bfloat16()
    assert is_deferred(module.weight)
    torch.save(module.state_dict(), path)
    for name, tensor in torch.load(path).items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(module.state_dict()[name], expected[name])


def test_a_file_that_was_modified_is_told_to_whoever_looks(build, path):
    with Accelerator(("cpu:0",), min_nbytes=0):
        module = build()
        subprocess.run(["truncate", "--size=0", str(path)], check=True)
    assert is_deferred(module.weight)
    with pytest.raises(ValueError, match="was modified"):
        module(torch.ones(1, WIDTH, dtype=torch.bfloat16))
