"""Which files a path stands for: order, links, and what is refused."""

import json
import os

import pytest

from wan_loader.errors import CheckpointError, MissingFileError
from wan_loader.warming.tree import list_tree


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def names(tree):
    return [file.relative for file in tree.files]


def test_order_is_that_of_first_use(tmp_path):
    native = ["Wan2.1_VAE.pth", "low_noise_model/a.safetensors", "high_noise_model/a.safetensors", "models_t5_x.pth"]
    fill(tmp_path / "native", *native, "google/tokenizer.json")
    assert names(list_tree(tmp_path / "native")) == [
        "google/tokenizer.json",
        *native[::-1][:1],
        *native[1:3][::-1],
        native[0],
    ]
    parts = ["model_index.json", "text_encoder", "transformer", "transformer_2", "vae"]
    fill(tmp_path / "dif", "model_index.json", *(f"{part}/m.safetensors" for part in parts[1:]))
    assert [name.split("/")[0] for name in names(list_tree(tmp_path / "dif"))] == parts


def test_a_file_and_what_it_says_of_it(tmp_path):
    fill(tmp_path, "ä b.safetensors")
    (file,) = list_tree(tmp_path / "ä b.safetensors").files
    facts = (tmp_path / "ä b.safetensors").stat()
    assert (file.relative, file.nbytes, file.mtime_ns) == ("ä b.safetensors", facts.st_size, facts.st_mtime_ns)
    assert file.is_weights


def test_an_index_brings_its_shards_and_nothing_else(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    weight_map = {}
    for i in (1, 2):
        weight_map[f"w{i}"] = f"m-0000{i}-of-00002.safetensors"
        save_file({f"w{i}": torch.ones(2)}, tmp_path / weight_map[f"w{i}"])
    fill(tmp_path, "other.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    tree = list_tree(index)
    assert sorted(names(tree)) == sorted([index.name, *weight_map.values()])
    assert not tree.is_directory


def test_hidden_names_are_left_out(tmp_path):
    fill(tmp_path, "m.safetensors", ".git/m.safetensors", ".m.safetensors.part")
    assert names(list_tree(tmp_path)) == ["m.safetensors"]


def test_links_inside_are_files_and_links_that_lead_out_are_not(tmp_path):
    fill(tmp_path, "in/real.safetensors", "out/secret.safetensors", "out/dir/m.safetensors")
    (tmp_path / "in/alias.safetensors").symlink_to("real.safetensors")
    (tmp_path / "in/leak.safetensors").symlink_to("../out/secret.safetensors")
    (tmp_path / "in/leakdir").symlink_to("../out/dir")
    (tmp_path / "in/dangling.safetensors").symlink_to("nothing")
    tree = list_tree(tmp_path / "in")
    assert names(tree) == ["alias.safetensors", "real.safetensors"]
    assert sorted(tree.outside) == ["leak.safetensors", "leakdir"]
    assert "dangling" in tree.warnings[0]
    followed = list_tree(tmp_path / "in", follow=True)
    assert not followed.outside
    assert len(followed.files) == 4


def test_a_hub_cache_snapshot_may_link_to_its_own_blobs_and_to_no_others(tmp_path):
    repo = tmp_path / "models--a--b"
    fill(repo, "blobs/1", "snapshots/rev/config.json")
    fill(tmp_path, "models--c--d/blobs/2")
    (repo / "snapshots/rev/m.safetensors").symlink_to("../../blobs/1")
    (repo / "snapshots/rev/x.safetensors").symlink_to("../../../models--c--d/blobs/2")
    tree = list_tree(repo / "snapshots/rev")
    assert names(tree) == ["config.json", "m.safetensors"]
    assert tree.files[1].path == str(repo / "blobs/1")
    assert tree.outside == ("x.safetensors",)


def test_a_circle_of_links_ends(tmp_path):
    fill(tmp_path, "a/m.safetensors")
    (tmp_path / "a/again").symlink_to("..")
    assert names(list_tree(tmp_path)) == ["a/m.safetensors"]


@pytest.mark.parametrize("name", ["missing", "empty", "text"])
def test_what_is_no_checkpoint_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    fill(tmp_path, "text/readme.txt")
    with pytest.raises(MissingFileError, match=name):
        list_tree(tmp_path / name)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError) as error:
        list_tree(tmp_path / "pipe.safetensors")
    assert error.value.path == str(tmp_path / "pipe.safetensors")
    assert error.value.reason == "is not a regular file"
    fill(tmp_path, "m.safetensors")
    assert "pipe" in list_tree(tmp_path).warnings[0]


def test_an_index_of_a_variant_and_a_pattern_bring_their_shards(tmp_path):
    shards = [f"m.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    header = b'{"w%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    for i, shard in enumerate(shards):
        text = header % i
        (tmp_path / shard).write_bytes(len(text).to_bytes(8, "little") + text)
    fill(tmp_path, "other.safetensors")
    index = tmp_path / "m.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}))
    assert names(list_tree(index)) == [index.name, *shards]
    index.unlink()
    assert names(list_tree(tmp_path / "m.fp16-*-of-00002.safetensors")) == shards


def test_a_directory_whose_names_do_not_speak_of_weights(tmp_path):
    fill(tmp_path, "notes")
    with pytest.raises(MissingFileError, match="holds no checkpoint"):
        list_tree(tmp_path)
    (tmp_path / "0f0f").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert names(list_tree(tmp_path)) == ["0f0f", "notes"]
    fill(tmp_path / "upper", "MODEL.PTH", "best.pth.tar")
    assert all(file.is_weights for file in list_tree(tmp_path / "upper").files)
