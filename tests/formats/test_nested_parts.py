"""Nested torch checkpoints: one part is loaded by its name, and without a name the error lists what there is."""

from collections import OrderedDict

import pytest
import torch

from wan_loader import CheckpointError, open_checkpoint
from wan_loader.formats.torch_pickle import load_torch_pickle

ONE, TWO = torch.ones(2), torch.full((3,), 2.0)
NESTED = {
    "state_dict": OrderedDict(w=ONE, v=TWO),
    "ema": {"model": {"w": TWO}, "decay": 0.999},
    "a.b": {"x": ONE},
    "optimizer": {"state": {0: {"step": ONE}}, "param_groups": [{"betas": (0.9, 0.999)}]},
    "epoch": 3,
}
FORMATS = {"torch-zip": {}, "torch-pickle": {"_use_new_zipfile_serialization": False}}


@pytest.fixture(params=FORMATS)
def saved(request, tmp_path):
    """A function that saves a state in either format and returns the path."""

    def save(state):
        torch.save(state, tmp_path / "model.pth", **FORMATS[request.param])
        return tmp_path / "model.pth"

    return save


@pytest.mark.parametrize(
    ("part", "names"),
    [("state_dict", {"w", "v"}), ("ema.model", {"w"}), ("a.b", {"x"})],
    ids=["a key", "two keys", "a key with a dot"],
)
def test_a_part_is_a_checkpoint_of_its_own(saved, part, names):
    checkpoint = open_checkpoint(saved(NESTED), part=part)
    assert set(checkpoint.names) == names
    assert checkpoint.part == part
    assert checkpoint.nbytes == {"state_dict": 20, "ema.model": 12, "a.b": 8}[part]


def test_a_part_is_read_from_its_own_bytes(saved):
    path = str(saved(NESTED))
    assert load_torch_pickle(path, "cpu", "ema.model")["w"].tolist() == [2, 2, 2]
    checkpoint = open_checkpoint(path, part="ema.model")
    if checkpoint.format == "torch-zip":
        with open(path, "rb") as f:
            f.seek(checkpoint.storages[0].start)
            assert torch.frombuffer(bytearray(f.read(12)), dtype=torch.float32).tolist() == [2, 2, 2]


@pytest.mark.parametrize("part", [None, "nothing", "state_dict.w", "epoch", "", "."])
def test_without_a_part_the_error_lists_the_parts(saved, part):
    path = saved(NESTED)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, part=part)
    message = str(caught.value)
    assert str(path) in message
    for words in ("'state_dict' (2 tensors)", "'ema.model' (1 tensor)", "'a.b'", "--part state_dict"):
        assert words in message
    assert "optimizer" not in message, "what cannot be loaded is not offered"


def test_a_part_that_is_nested_itself_offers_what_is_in_it(saved):
    with pytest.raises(CheckpointError, match=r"part='ema\.model'") as caught:
        open_checkpoint(saved(NESTED), part="ema")
    assert "state_dict" not in str(caught.value)


def test_entries_beside_the_tensors_are_named(saved):
    with pytest.raises(CheckpointError, match=r"'epoch' \(a int\), 'loss' \(a float\) are not tensors"):
        open_checkpoint(saved({"w": ONE, "epoch": 3, "loss": 0.5}))


def test_many_parts_make_one_short_message(saved):
    state = {f"{'layer' * 100}{i}": {f"{j}": ONE for j in range(i + 1)} for i in range(30)}
    with pytest.raises(CheckpointError, match=r"\(30 tensors\).* and 22 more") as caught:
        open_checkpoint(saved(state))
    assert len(str(caught.value)) < 2500


def test_parts_that_contain_each_other_are_listed_once(saved):
    inner = {"w": ONE}
    state = {"a": inner, "b": inner, "c": {"d": inner}}
    state["self"] = state
    with pytest.raises(CheckpointError, match=r"it holds 'a' \(1 tensor\)$"):
        open_checkpoint(saved(state))


def test_safetensors_have_no_parts(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": ONE}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no parts"):
        open_checkpoint(tmp_path / "model.safetensors", part="state_dict")
