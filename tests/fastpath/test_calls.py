"""Calls that take the fast path give what the originals give; everything else goes to the originals."""

import os
import subprocess
import sys
import textwrap
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from programs import check_error, wan_loader

from wan_loader.fastpath import FastPath
from wan_loader.verify import same_bits

ORIGINAL_LOAD, ORIGINAL_LOAD_FILE = torch.load, safetensors.torch.load_file


@pytest.fixture
def fast():
    """Installed, for the CPU too, and taken out again."""
    path = FastPath(safetensors_devices=("cpu", "cuda"))
    path.install()
    yield path
    torch.load = torch.serialization.load = ORIGINAL_LOAD
    safetensors.torch.load_file = ORIGINAL_LOAD_FILE


@pytest.fixture
def state():
    base = torch.randn(6, 8)
    return OrderedDict(
        w=torch.randn(3, 5), view=base[2:4], same=base, turned=base.t(), n=torch.arange(3), s=torch.ones(())
    )


def saved(tmp_path, value, **options):
    path = tmp_path / "x.pth"
    torch.save(value, path, **options)
    return path


def test_torch_load_is_the_same(fast, state, tmp_path):
    state._metadata = {"": {"version": 1}}
    path = saved(tmp_path, state)
    ours, theirs = torch.load(path, map_location="cpu"), ORIGINAL_LOAD(path, map_location="cpu")
    assert fast.n_loads == 1
    assert type(ours) is type(theirs)
    assert ours._metadata == theirs._metadata
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor)
        assert (ours[name].stride(), ours[name].requires_grad) == (tensor.stride(), tensor.requires_grad)
    ours["view"].zero_()
    assert not ours["same"][2:4].any(), "what shares memory in the file shares it here"


def test_one_tensor_under_two_names_stays_one(fast, tmp_path):
    tensor = torch.randn(4)
    ours = torch.load(saved(tmp_path, {"a": tensor, "b": torch.ones(2), "c": tensor}), map_location="cpu")
    assert fast.n_loads == 1
    assert ours["a"] is ours["c"]
    assert torch.equal(ours["a"], tensor)


@pytest.mark.parametrize("attribute", [{"extra": torch.ones(3)}, {"_metadata": {"": {"scale": torch.ones(3)}}}])
def test_tensors_in_a_dict_s_attributes(fast, state, tmp_path, attribute):
    vars(state).update(attribute)
    ours = torch.load(saved(tmp_path, state), map_location="cpu")
    assert fast.left == {"torch.load of a dict with attributes of its own": 1}
    assert "device='meta'" not in repr(vars(ours))


def test_torch_load_gives_memory_of_its_own(fast, tmp_path):
    path = saved(tmp_path, {"w": torch.ones(1 << 20)})
    tensors = torch.load(path, map_location=torch.device("cpu"), weights_only=True)
    assert fast.n_loads == 1
    os.truncate(path, 10)
    assert tensors["w"].sum() == 1 << 20


def test_a_shard_is_the_file_that_was_named(fast, tmp_path):
    for number in (1, 2):
        tensors = {f"w{number}": torch.full((3,), number)}
        safetensors.torch.save_file(tensors, tmp_path / f"x-0000{number}-of-00002.safetensors")
        torch.save(tensors, tmp_path / f"x-0000{number}-of-00002.bin")
    assert list(safetensors.torch.load_file(tmp_path / "x-00001-of-00002.safetensors")) == ["w1"]
    assert list(torch.load(tmp_path / "x-00001-of-00002.bin", map_location="cpu")) == ["w1"]
    assert fast.n_loads == 2


def test_load_file_of_any_name_is_fast_if_the_content_is_safetensors(fast, tmp_path):
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "blob")
    assert safetensors.torch.load_file(tmp_path / "blob")["w"].tolist() == [1, 1, 1]
    assert fast.n_loads == 1
    torch.save({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert fast.left == {"load_file of a file that is not safetensors": 1}


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_load_file_is_the_same(fast, state, tmp_path, kind):
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({n: t.clone().contiguous() for n, t in state.items()}, path)
    ours, theirs = safetensors.torch.load_file(path, device=kind), ORIGINAL_LOAD_FILE(path, device=kind)
    assert fast.n_loads == 1
    assert type(ours) is dict
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor)
        assert ours[name].device == tensor.device


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ({"a": {"b": torch.ones(2)}}, {}),
        ([torch.ones(2)], {}),
        ({"a": torch.ones(2), "step": 3}, {}),
        ({"a": torch.nn.Parameter(torch.ones(2))}, {}),
        ({"a": torch.ones(2, requires_grad=True)}, {}),
        ({"a": torch.ones(2)}, {"_use_new_zipfile_serialization": False}),
    ],
)
def test_other_contents_go_to_the_original(fast, tmp_path, value, options):
    path = saved(tmp_path, value, **options)
    ours, theirs = torch.load(path, map_location="cpu"), ORIGINAL_LOAD(path, map_location="cpu")
    assert fast.n_loads == 0
    assert sum(fast.left.values()) == 1
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"map_location": "meta"},
        {"map_location": {"cuda": "cpu"}},
        {"map_location": lambda storage, _: storage},
        {"map_location": "cpu", "weights_only": False},
        {"map_location": "cpu", "mmap": True},
        {"map_location": "cpu", "weights_only": False, "encoding": "ascii"},
    ],
)
def test_other_arguments_go_to_the_original(fast, tmp_path, options):
    path = saved(tmp_path, {"w": torch.ones(3)})
    assert torch.load(path, **options)["w"].shape == (3,)
    assert fast.n_loads == 0
    assert sum(fast.left.values()) == 1


def test_files_modes_and_errors_go_to_the_original(fast, tmp_path):
    path = saved(tmp_path, {"w": torch.ones(3)})
    with path.open("rb") as file:
        assert torch.load(file, map_location="cpu")["w"].sum() == 3
    with torch.inference_mode():
        assert torch.load(path, map_location="cpu")["w"].is_inference()
    with torch.device("meta"):
        torch.load(path, map_location="cpu")
    with pytest.raises(FileNotFoundError) as error:
        torch.load(tmp_path / "none.pth", map_location="cpu")
    assert "wan_loader" not in type(error.value).__module__
    assert fast.n_loads == 0
    assert sum(fast.left.values()) == 4
    assert "inference" in fast.summary()


def run(tmp_path, script, *words):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    return wan_loader("run", path, *words)


def test_a_script_runs_as_by_itself(tmp_path):
    saved(tmp_path, {"w": torch.ones(3)})
    (tmp_path / "beside.py").write_text("VALUE = 7")
    script = """
        import sys, beside, torch
        from torch import load
        path = __file__.replace("script.py", "x.pth")
        print(__name__, sys.argv[1:], beside.VALUE, load(path, map_location="cpu"))
        sys.exit(5)
        """
    done = run(tmp_path, script, "--help", "-v", "--", "x")
    assert done.returncode == 5, done.stderr
    assert done.stdout == "__main__ ['--help', '-v', '--', 'x'] 7 {'w': tensor([1., 1., 1.])}\n"


def test_errors_of_a_script_are_its_own(tmp_path):
    for text in ("def f():\n    1 / 0\ntry:\n    f()\nexcept ValueError:\n    pass", "raise EOFError", "print('a"):
        done = run(tmp_path, text)
        alone = subprocess.run(
            [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == alone.returncode == 1
        assert done.stderr.removesuffix("wan-loader: 0 loads took the fast path\n") == alone.stderr
    done = run(tmp_path, "input()")  # stdin is empty
    assert done.returncode == 1
    assert "EOFError" in done.stderr
    check_error(wan_loader("run", "none.py"), "error: none.py is no script")
