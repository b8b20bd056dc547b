"""Directories of several checkpoints: by structure alone, and with what a model's family says of one."""

import os

import pytest

from wan_loader.errors import CheckpointError, OutputError
from wan_loader.formats import model_directory, open_checkpoint
from wan_loader.formats.inventory import checkpoints_in, take_inventory
from wan_loader.formats.model_directory import MissingFile, ModelDirectory, ModelPart, known_model, parts_in
from wan_loader.warming.tree import list_tree

HEADER = b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
PARTS = (
    ModelPart("words", "z-words", "the words"),
    ModelPart("net", "net.safetensors.index.json", "the network"),
    ModelPart("shards", "shards-*-of-2.safetensors", "the shards"),
    ModelPart("pictures", "pictures.safetensors", "the pictures"),
)


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(len(HEADER).to_bytes(8, "little") + HEADER)


@pytest.fixture
def family(monkeypatch):
    """Let a family know every directory, as an answer or an error."""

    def family(answer):
        def recognise(group, directory):
            assert group == "wan_loader.models"
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(model_directory, "first_answer", recognise)

    return family


def model(**changes):
    return ModelDirectory(**{"family": "Toy", "layout": "flat", "parts": PARTS, **changes})


# By structure


def test_all_checkpoints_of_a_directory_in_the_order_of_their_names(tmp_path, family):
    family(None)
    names = ["a", "b", "0.safetensors", "c.safetensors"]
    fill(tmp_path, "b/model.safetensors", "a/model.safetensors", *names[2:])
    (tmp_path / "notes").mkdir()
    assert [os.path.relpath(path, tmp_path) for path in parts_in(str(tmp_path))] == names
    assert [os.path.relpath(checkpoint.path, tmp_path) for checkpoint in checkpoints_in(tmp_path)] == [
        "a/model.safetensors",
        "b/model.safetensors",
        *names[2:],
    ]
    assert next(file.relative for file in list_tree(tmp_path).files) == "0.safetensors"
    assert take_inventory(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        checkpoints_in(tmp_path / "notes")


# With a family


def test_files_come_in_the_order_of_first_use(tmp_path, family):
    family(model())
    names = ["config.json", "z-words/a.safetensors", "z-words/b/c.json", "net-1-of-1.safetensors"]
    names += ["net.safetensors.index.json", "shards-1-of-2.safetensors", "pictures.safetensors"]
    fill(tmp_path, *sorted(names))
    assert [file.relative for file in list_tree(tmp_path).files] == names
    assert [model().rank(name) for name in ("z-words2/a", "sub/net-1-of-1.safetensors", "shard")] == [0, 0, 0]


def test_an_error_says_whose_directory_it_is(tmp_path, family):
    family(model())
    fill(tmp_path, "a.safetensors", "b.safetensors")
    with pytest.raises(CheckpointError, match="is a Toy model's directory: name one of its parts: "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("trouble", [OutputError("damaged"), PermissionError("closed")])
def test_trouble_of_a_family_is_none_of_ours_where_an_answer_would_only_help(tmp_path, family, trouble):
    family(trouble)
    fill(tmp_path, "b.safetensors", "a.safetensors")
    assert known_model(str(tmp_path)) is None
    assert [file.relative for file in list_tree(tmp_path).files] == ["a.safetensors", "b.safetensors"]
    with pytest.raises(CheckpointError, match="holds 2 checkpoints"):
        open_checkpoint(tmp_path)
    with pytest.raises(type(trouble)):
        take_inventory(tmp_path)


def test_an_inventory_opens_what_is_whole(tmp_path, family):
    parts = (*PARTS[:1], *PARTS[3:], ModelPart("third", "third", "the third"), ModelPart("idx", "i/x.json", "an index"))
    missing = (MissingFile("third/"), MissingFile("i/y.safetensors", 7, 3))
    family(model(parts=parts, missing=missing, problems=(("configuration", "is odd"),)))
    fill(tmp_path, "z-words/a.safetensors", "pictures.safetensors")
    (tmp_path / "z-words/a.safetensors").write_bytes(b"cut")
    inventory = take_inventory(tmp_path)
    assert list(inventory.parts) == ["pictures"]
    assert [name for name, _ in inventory.damaged] == ["configuration", "words"]
    assert not inventory.complete
    family(model(parts=PARTS[3:]))
    assert take_inventory(tmp_path).complete
    assert take_inventory(tmp_path / "pictures.safetensors") is None
