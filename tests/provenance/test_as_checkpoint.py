"""Proven tensors as a checkpoint: one load brings them bit for bit, whatever views they are."""

import os

import pytest
import safetensors.torch
import torch
from loader_cases import random_tensor, same, storable, zoo

import wan_loader
from wan_loader.errors import CheckpointError
from wan_loader.formats import StorageFacts
from wan_loader.plan import plan as plan_module
from wan_loader.provenance.as_checkpoint import as_checkpoint
from wan_loader.provenance.proof import FileRange, Proof
from wan_loader.provenance.prove import prove
from wan_loader.system import own_pages

pytestmark = pytest.mark.skipif(own_pages._honest_look() is None, reason="the kernel does not tell")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files: everything that safetensors can hold, and two large tensors."""
    directory = tmp_path_factory.mktemp("w")
    safetensors.torch.save_file(storable(zoo()), directory / "zoo.safetensors")
    large = {
        "a": random_tensor(torch.float32, (1000, 900)).nan_to_num(),
        "b": random_tensor(torch.bfloat16, (999, 901)),
    }
    safetensors.torch.save_file(large, directory / "large.safetensors")
    return directory / "zoo.safetensors", directory / "large.safetensors"


@pytest.fixture
def tensors(files):
    """All tensors of both, and views of all kinds."""
    small, large = map(safetensors.torch.load_file, files)
    a = large["a"]
    views = {
        "rows": a[100:300],
        "overlapping rows": a[200:400],
        "one row": a[150],
        "column": a[:, 5],
        "transposed": a.T,
        "steps": a[3::7, 1::2],
        "expanded": a[5, 6].expand(3, 4),
        "scalar": a[999, 899],
        "bytes": a.view(torch.uint8)[2:, 3:],
        "parameter": torch.nn.Parameter(a[7:9]),
        "again": safetensors.torch.load_file(files[1])["a"],
    }
    return {**small, **large, **views, "tied": a}


def strides(tensor):
    """Strides that matter."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("io", ["auto", "direct", "buffered", "mapped"])
def test_a_load_brings_what_was_proven(tensors, device, io):
    proof = prove(tensors)
    checkpoint = as_checkpoint(proof)
    loaded = wan_loader.load(checkpoint, device=device, io=io).tensors
    assert loaded.keys() == proof.ranges.keys() == {name for name, tensor in tensors.items() if tensor.numel()}
    for name, tensor in loaded.items():
        same(tensor, tensors[name].detach())
        assert strides(tensor) == strides(tensors[name])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_load_converts_as_torch_does(tensors, device):
    large = {name: tensor for name, tensor in tensors.items() if not name[0].isdigit()}
    loaded = wan_loader.load(as_checkpoint(prove(large)), device=device, dtype="bf16").tensors
    for name, tensor in loaded.items():
        dtype = torch.bfloat16 if large[name].is_floating_point() else large[name].dtype
        same(tensor, large[name].detach().to(device).to(dtype))


@pytest.mark.parametrize("block", [4096, 65536, 1 << 20])
def test_overlapping_ranges_over_many_blocks(tensors, monkeypatch, block):
    """Bytes that several tensors have are read for each, however the blocks are cut."""
    monkeypatch.setattr(plan_module, "block_bytes", lambda nbytes, unit: block)
    large = {name: tensor for name, tensor in tensors.items() if not name[0].isdigit()}
    for dtype in (None, "float16"):
        result = wan_loader.load(as_checkpoint(prove(large)), io="buffered", dtype=dtype)
        assert len(list(result.plan.blocks)) > 5
        for name, tensor in result.tensors.items():
            wanted = torch.float16 if dtype and large[name].is_floating_point() else large[name].dtype
            same(tensor, large[name].detach().to(wanted))


def test_only_names_of_one_object_share_memory(tensors):
    loaded = wan_loader.load(as_checkpoint(prove(tensors)), io="buffered").tensors
    loaded["a"].fill_(3)
    assert (loaded["tied"] == 3).all()
    for name in ("rows", "overlapping rows", "one row", "again", "transposed"):
        same(loaded[name], tensors[name])


def test_names_are_the_callers_and_order_is_the_files(files):
    second = safetensors.torch.load_file(files[1])
    checkpoint = as_checkpoint(prove({"x.b": second["b"], "x.a": second["a"], "0": second["a"][5]}))
    assert sorted(checkpoint.names) == ["0", "x.a", "x.b"]
    places = [checkpoint.storages[facts.storage] for facts in checkpoint.tensors]
    assert places == sorted(places)
    assert checkpoint.path == str(files[1])
    part = wan_loader.load(checkpoint, names=["x.a"]).tensors
    same(part["x.a"], second["a"])


def test_what_was_written_is_left_out(files):
    large = safetensors.torch.load_file(files[1])
    large["a"][3] = 1
    checkpoint = as_checkpoint(prove(large))
    assert checkpoint.names == ("b",)


def test_nothing_proven_is_an_empty_checkpoint():
    checkpoint = as_checkpoint(prove({"a": torch.ones(3)}))
    assert (checkpoint.names, checkpoint.files, checkpoint.storages) == ((), (), ())
    assert wan_loader.load(checkpoint).tensors == {}


def test_a_file_that_changes_after_the_proof_is_an_error(tmp_path, files):
    path = tmp_path / "w.safetensors"
    path.write_bytes(files[1].read_bytes())
    checkpoint = as_checkpoint(prove(safetensors.torch.load_file(path)))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(CheckpointError, match="modified"):
        wan_loader.load(checkpoint, io="buffered")


def test_storages_of_ties():
    place = FileRange(0, 8, 16, "float32", (4,), (1,))
    other = FileRange(1, 0, 4, "float32", (), ())
    proof = Proof((), {"a": other, "b": place, "c": place, "d": place}, {}, {"d": "b"})
    checkpoint = as_checkpoint(proof)
    assert checkpoint.storages == (StorageFacts(0, 8, 16), StorageFacts(0, 8, 16), StorageFacts(1, 0, 4))
    assert {facts.name: facts.storage for facts in checkpoint.tensors} == {"b": 0, "c": 1, "d": 0, "a": 2}
