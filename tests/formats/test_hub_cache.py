"""Repositories of the hub are found in its local cache, or the error tells how to get them."""

import pytest
from test_directory import weights

from wan_loader import CheckpointError, MissingFileError, load_file, open_checkpoint
from wan_loader.formats.hub_cache import locate
from wan_loader.warming.tree import list_tree


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def add(cache, *commits, main=None, name="models--Wan-AI--X"):
    """A repository in the cache, with links to blobs as the hub makes them."""
    folder = cache / name
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    for commit in commits:
        (folder / "blobs" / commit).write_bytes(weights(f"of {commit}"))
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{commit}")
    if main:
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.mark.parametrize("given", ["folder", "slash", "name"])
def test_main_is_what_is_meant(cache, given):
    folder = add(cache, "aaa", "bbb", main="bbb")
    path = {"folder": folder, "slash": f"{folder}/", "name": "Wan-AI/X"}[given]
    checkpoint = open_checkpoint(path)
    assert checkpoint.names == ("of bbb",)
    assert checkpoint.path == f"{folder}/snapshots/bbb/model.safetensors"
    assert load_file(path)["of bbb"].tolist() == [0]
    (file,) = list_tree(path).files
    assert (file.relative, file.path) == ("model.safetensors", str(folder / "blobs" / "bbb"))


def test_inside_the_folder(cache, monkeypatch):
    monkeypatch.chdir(add(cache, "aaa"))
    assert open_checkpoint(".").names == ("of aaa",)


def test_a_whole_model_is_told_as_its_directory_is(cache):
    folder = add(cache, "aaa", main="aaa")
    snapshot = folder / "snapshots/aaa"
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model_index.json").write_text("{}")
    for part in ("transformer", "vae"):
        (snapshot / part).mkdir()
        (snapshot / part / "m.safetensors").symlink_to("../../../blobs/aaa")
    with pytest.raises(CheckpointError, match=r"is a diffusers model's directory: name one of its parts: .*/vae$"):
        open_checkpoint("Wan-AI/X")
    assert open_checkpoint(snapshot / "vae").names == ("of aaa",)


def test_one_snapshot_needs_no_main_and_of_several_one_is_to_be_named(cache):
    folder = add(cache, "aaa")
    assert open_checkpoint("Wan-AI/X").names == ("of aaa",)
    add(cache, "bbb")
    with pytest.raises(CheckpointError, match="does not say which of them is main") as caught:
        open_checkpoint("Wan-AI/X")
    for path in str(caught.value).partition("name one of its snapshots: ")[2].split(", "):
        assert open_checkpoint(path).names == (f"of {path[-3:]}",)
    (folder / "refs/main").write_text("ccc")
    with pytest.raises(CheckpointError, match="main is ccc, which is not there"):
        open_checkpoint("Wan-AI/X")
    (folder / "refs/main").write_text("../../blobs")
    with pytest.raises(CheckpointError, match="does not say"):
        open_checkpoint("Wan-AI/X")


def test_what_the_cache_does_not_hold_is_told_how_to_get(cache):
    with pytest.raises(MissingFileError, match=r"Wan-AI/X does not exist.*repository.*hf download Wan-AI/X"):
        open_checkpoint("Wan-AI/X")
    with pytest.raises(MissingFileError, match="Wan-AI/X does not exist"):
        list_tree("Wan-AI/X")
    folder = add(cache)
    for path in (folder, "Wan-AI/X"):
        with pytest.raises(MissingFileError, match="holds no snapshot: hf download Wan-AI/X"):
            open_checkpoint(path)


def test_what_exists_is_itself_and_a_missing_file_is_no_repository(cache, tmp_path):
    add(cache, "aaa", main="aaa")
    with pytest.raises(MissingFileError) as caught:
        open_checkpoint("Wan-AI/X.safetensors")
    assert "hf download" not in str(caught.value)
    (tmp_path / "Wan-AI" / "X").mkdir(parents=True)
    (tmp_path / "Wan-AI" / "X" / "model.pth").write_bytes(weights("here"))
    assert open_checkpoint("Wan-AI/X").names == ("here",)
    (tmp_path / "models--mine").mkdir()
    (tmp_path / "models--mine" / "model.pth").write_bytes(weights("mine"))
    assert open_checkpoint(tmp_path / "models--mine").names == ("mine",)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HUGGINGFACE_HUB_CACHE": "{0}/old"}, "old"),
        ({"HF_HOME": "{0}/home"}, "home/hub"),
        ({"XDG_CACHE_HOME": "{0}/xdg"}, "xdg/huggingface/hub"),
        ({"HOME": "{0}"}, ".cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(cache, tmp_path, monkeypatch, variables, place):
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    add(tmp_path / place, "aaa", main="aaa")
    assert open_checkpoint("Wan-AI/X").names == ("of aaa",)


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert locate("model.safetensors") == "model.safetensors"
