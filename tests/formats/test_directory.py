"""Which files of a directory are one checkpoint: indexes, sets of shards, what does not count; advice that works."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_loader import CheckpointError, MissingFileError, WanLoaderError, open_checkpoint
from wan_loader.formats.model_directory import parts_in

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"


def weights(*names):
    """A safetensors file that holds one number under each name: its content decides, whatever it is called."""
    header = {n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(len(names)))


def fill(directory, *names):
    """Write files that hold a tensor of their own name."""
    for name in names:
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(weights(name))


def write_index(directory, name, *files, extra=()):
    """An index of files that hold a tensor of their own name; extra: further (tensor, file)."""
    Path(directory, name).write_text(json.dumps({"weight_map": {file: file for file in files} | dict(extra)}))


def names_in(path):
    return set(open_checkpoint(path).names)


# Indexes


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        ("model.safetensors.index.json", ["model-00001-of-000163.safetensors", "model-00002-of-000163.safetensors"]),
        ("model.safetensors.index.json", ["model.safetensors-00001-of-00002.safetensors", "layers-2.safetensors"]),
        ("m.safetensors.index.fp16.json", ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"]),
        ("m.fp16.safetensors.index.json", ["m-00001-of-00002.fp16.safetensors", "m-00002-of-00002.fp16.safetensors"]),
        ("m.safetensors.index.json", ["m-00001-of-00006-bf16.safetensors", "m-00002-of-00006-bf16.safetensors"]),
        ("model.safetensors.index.json", ["model_00001-of-00072.safetensors", "optimizer.bin"]),
        ("MODEL.SAFETENSORS.INDEX.JSON", ["first", ".hidden"]),
        ("weights.index.json", ["a.data", "b.data"]),
    ],
)
def test_an_index_owns_what_it_lists_whatever_that_is_called(tmp_path, index, shards):
    fill(tmp_path, *shards)
    write_index(tmp_path, index, *shards)
    for path in (tmp_path, tmp_path / index):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.names) == set(shards)
        assert checkpoint.path == str(tmp_path / index)


def test_a_name_in_two_shards_belongs_where_the_index_says(tmp_path):
    first, second = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    Path(tmp_path, first).write_bytes(weights("a", "both", "unlisted"))
    Path(tmp_path, second).write_bytes(weights("both", "b", "unlisted"))
    index = tmp_path / "m.safetensors.index.json"
    for owner in (first, second):
        index.write_text(json.dumps({"weight_map": {"a": first, "b": second, "both": owner}}))
        checkpoint = open_checkpoint(tmp_path)
        assert sorted(checkpoint.names) == ["a", "b", "both"]
        (both,) = (t for t in checkpoint.tensors if t.name == "both")
        assert checkpoint.files[checkpoint.storages[both.storage].file].path == str(tmp_path / owner)
        unlisted, repeated = checkpoint.warnings
        assert "1 tensor, first 'unlisted'" in unlisted
        assert "'both'" in repeated
    index.unlink()
    with pytest.raises(CheckpointError, match=f"'both' stands in both .*{first} and .*{second}"):
        open_checkpoint(tmp_path)


def test_an_index_of_one_file_leaves_out_what_it_does_not_list(tmp_path):
    Path(tmp_path, "one.safetensors").write_bytes(weights("a", "b"))
    write_index(tmp_path, "m.safetensors.index.json", extra=[("a", "one.safetensors")])
    assert names_in(tmp_path) == {"a"}


def test_indexes_that_say_the_same_are_one_checkpoint(tmp_path):
    fill(tmp_path, "a.safetensors", "b.safetensors")
    for name in ("m.safetensors.index.fp16.json", "m.fp16.safetensors.index.json"):
        write_index(tmp_path, name, "a.safetensors", "b.safetensors")
    assert names_in(tmp_path) == {"a.safetensors", "b.safetensors"}
    fill(tmp_path, "c.safetensors")
    write_index(tmp_path, "m.safetensors.index.fp16.json", "a.safetensors", "c.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 checkpoints"):
        open_checkpoint(tmp_path)


def test_an_index_of_something_else_is_no_checkpoint(tmp_path):
    fill(tmp_path, "model.safetensors")
    (tmp_path / "faiss.index.json").write_text('{"dimension": 3}')
    assert names_in(tmp_path) == {"model.safetensors"}


def test_a_damaged_index_is_told_and_its_shards_are_not_guessed(tmp_path):
    fill(tmp_path, "m-00001-of-00001.safetensors")
    (tmp_path / "m.safetensors.index.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"m\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_an_index_of_very_many_files_that_are_not_there(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(20_000)}}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(index)
    assert len(str(caught.value)) < 300


# Sets of shards


@pytest.mark.parametrize(
    "names",
    [
        ["m-00000-of-00002.safetensors", "m-00001-of-00002.safetensors"],
        ["m-1-of-2.safetensors", "m-2-of-2.safetensors"],
        ["m_001_of_002.bin", "m_002_of_002.bin"],
        ["m.safetensors-00001-of-00002.safetensors", "m.safetensors-00002-of-00002.safetensors"],
        ["m-00001-of-00002-bf16.safetensors", "m-00002-of-00002-bf16.safetensors"],
        ["m-00001-of-000002.safetensors", "m-00002-of-000002.safetensors"],
        [f"m-{i}-of-11.safetensors" for i in range(1, 12)],
    ],
)
def test_a_set_without_an_index(tmp_path, names):
    fill(tmp_path, *names)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.names) == names
    assert checkpoint.path == str(tmp_path)
    missing = tmp_path / names[-1]
    missing.unlink()
    with pytest.raises(MissingFileError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{missing} does not exist:")


def test_numbers_that_do_not_fit(tmp_path):
    fill(tmp_path, *(f"m-0000{i}-of-00002.safetensors" for i in range(3)))
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.safetensors has a number"):
        open_checkpoint(tmp_path)


def test_a_set_of_nearly_no_end_is_told_at_once(tmp_path):
    fill(tmp_path, "m-000000001-of-999999999.safetensors")
    with pytest.raises(MissingFileError, match="and 999999997 more of 999999999 files"):
        open_checkpoint(tmp_path)


def test_a_pattern_names_a_set_among_others(tmp_path):
    fill(tmp_path, "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "vae.safetensors")
    fill(tmp_path, "m-x-00001-of-00002.safetensors", "m-x-00002-of-00002.safetensors")
    for pattern, names in {
        "m-*-of-00002.safetensors": {"m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"},
        "v*.safetensors": {"vae.safetensors"},
    }.items():
        checkpoint = open_checkpoint(tmp_path / pattern)
        assert set(checkpoint.names) == names
        assert names_in(checkpoint.path) == names
    with pytest.raises(CheckpointError, match="holds 2 checkpoints"):
        open_checkpoint(tmp_path / "m-*")
    with pytest.raises(MissingFileError, match=r"none\*"):
        open_checkpoint(tmp_path / "none*")
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError, match="m-00002-of-00002"):
        open_checkpoint(tmp_path / "m-*-of-00002.safetensors")


def test_a_pattern_in_the_working_directory_and_a_file_called_like_one(tmp_path, monkeypatch):
    fill(tmp_path, "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "a*b.safetensors")
    monkeypatch.chdir(tmp_path)
    assert len(names_in("m-*.safetensors")) == 2
    assert names_in("a*b.safetensors") == {"a*b.safetensors"}


# What does not count

TRAINING = [
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "training_args.bin",
    "optimizer_1.bin",
    "sampler.bin",
    "random_states_0.pkl",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "distrib_optim.pt",
    "dl_state_dict.bin",
    "lr_scheduler.bin",
    "optimizer-00001-of-00002.bin",
    "model_optimizer.pt",
    "recipe_state.pt",
    "epoch_3_optimizer_step_100.pt",
]


@pytest.mark.parametrize("name", TRAINING)
def test_what_a_training_keeps_does_not_count(tmp_path, name):
    fill(tmp_path, name)
    with pytest.raises(MissingFileError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    assert names_in(tmp_path / name) == {name}
    fill(tmp_path, "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ("model.safetensors",)
    assert [name in warning for warning in checkpoint.warnings] == ([] if name.endswith(".pkl") else [True])


@pytest.mark.parametrize(
    "name",
    ["resampler.bin", "latent_upscaler.pth", "model_optim_rng.pt", "mp_rank_00_model_states.pt", "scheduler-free.pt"],
)
def test_names_that_only_look_like_training_count(tmp_path, name):
    fill(tmp_path, name)
    assert names_in(tmp_path) == {name}


def test_hidden_files_and_directories_called_like_files_do_not_count(tmp_path):
    fill(tmp_path, "model.safetensors", "._model.safetensors", ".cache/other.safetensors", "epoch.ckpt/x.txt")
    (tmp_path / "circle.pt").symlink_to("circle.pt")
    (tmp_path / "circle.pt").unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ("model.safetensors",)
    assert not checkpoint.warnings


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"),
        ("v1.safetensors", "v1.ckpt"),
        ("Wan2.1_VAE.SAFETENSORS", "Wan2.1_VAE.pth"),
    ],
)
def test_safetensors_come_before_torch_files_of_the_same_name(tmp_path, first, second):
    fill(tmp_path, first, second)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == (first,)
    assert checkpoint.warnings == (f"left out: {second}: {first}, which is called alike, comes first",)
    assert names_in(tmp_path / second) == {second}


def test_a_set_of_safetensors_comes_before_one_of_torch(tmp_path):
    sets = {
        s: [f"{stem}-0000{i}-of-00002{s}" for i in (1, 2)]
        for s, stem in ((".safetensors", "model"), (".bin", "pytorch_model"))
    }
    fill(tmp_path, *sets[".safetensors"], *sets[".bin"])
    write_index(tmp_path, "pytorch_model.bin.index.json", *sets[".bin"])
    assert names_in(tmp_path) == set(sets[".safetensors"])
    write_index(tmp_path, "model.safetensors.index.json", *sets[".safetensors"])
    assert names_in(tmp_path) == set(sets[".safetensors"])
    Path(tmp_path, sets[".safetensors"][1]).unlink()
    with pytest.raises(MissingFileError, match="model-00002-of-00002"):
        open_checkpoint(tmp_path)
    Path(tmp_path, sets[".safetensors"][0]).unlink()
    assert names_in(tmp_path) == set(sets[".bin"])


def test_an_index_of_which_nothing_is_there_gives_way_to_the_whole_file(tmp_path):
    fill(tmp_path, "model.safetensors")
    write_index(tmp_path, "model.safetensors.index.json", "model-00001-of-00002.safetensors")
    assert names_in(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize("through", ["the directory", "the index"])
def test_an_index_that_is_a_pointer_is_named(tmp_path, through):
    fill(tmp_path, "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"index\.json is a Git-LFS pointer to a file of 99 bytes"):
        open_checkpoint(tmp_path if through == "the directory" else index)


def test_files_of_another_kind_do_not_count_and_what_stands_in_for_weights_does(tmp_path):
    fill(tmp_path, "model.safetensors")
    (tmp_path / "openvino_model.bin").write_bytes(b"\x01\x02\x03\x04" * 50)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ("model.safetensors",)
    assert checkpoint.warnings == ("left out: openvino_model.bin: not a checkpoint by content",)
    (tmp_path / "vae.pth").write_bytes(POINTER)
    with pytest.raises(
        CheckpointError, match=r"vae\.pth is a Git-LFS pointer.*: name one of its parts: \S+$"
    ) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).endswith(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["0f" * 32, "state.pkl", "model_best.pth.tar", "MODEL.PTH", "weights.dat"])
def test_where_no_name_speaks_of_weights_the_content_does(tmp_path, name):
    fill(tmp_path, name)
    (tmp_path / "config").write_text("{}")
    (tmp_path / "notes.txt").write_text("notes")
    assert names_in(tmp_path) == {name}


# Advice


def advice_of(error):
    text = str(error).partition("name one of its parts: ")[2]
    return [path for path in text.split(", ") if path and not path.startswith("and ")]


def test_a_directory_of_variants_in_subdirectories(tmp_path):
    fill(tmp_path, "te/model.safetensors", "te/model.fp16.safetensors", "vae/d.safetensors", "scheduler/optimizer.pt")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(MissingFileError, match="is a diffusers model's directory") as caught:
        open_checkpoint(tmp_path)
    expected = [str(tmp_path / p) for p in ("te/model.fp16.safetensors", "te/model.safetensors", "vae")]
    assert advice_of(caught.value) == expected == parts_in(str(tmp_path))


def test_subdirectories_of_subdirectories(tmp_path):
    """As ComfyUI's repackaged models lie."""
    fill(
        tmp_path,
        *(f"split_files/{part}/m.safetensors" for part in ("vae", "text_encoders")),
        "a/b/c/d/deep.safetensors",
    )
    (tmp_path / "again").symlink_to(".")
    with pytest.raises(MissingFileError, match="holds checkpoints in subdirectories only") as caught:
        open_checkpoint(tmp_path)
    assert advice_of(caught.value) == [str(tmp_path / "split_files" / part) for part in ("text_encoders", "vae")]


def test_one_slice_alone_is_whole(tmp_path):
    fill(tmp_path, "consolidated.00.pth")
    assert names_in(tmp_path) == {"consolidated.00.pth"}
    fill(tmp_path, "consolidated.01.pth", "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ("model.safetensors",)
    assert "consolidated.00.pth, consolidated.01.pth: slices" in checkpoint.warnings[0]


def test_of_many_choices_some_are_named(tmp_path):
    fill(tmp_path, *(f"{i:02d}.safetensors" for i in range(12)))
    with pytest.raises(CheckpointError, match=r"holds 12 checkpoints: .*, and 4 more$") as caught:
        open_checkpoint(tmp_path)
    assert len(advice_of(caught.value)) == 8


@st.composite
def blocks(draw):
    """Whole or incomplete checkpoints as (files, files that are missing, index or None)."""
    stem = draw(st.sampled_from(["model", "model.fp16", "pytorch_model", "m", "m-x", "m-0", "vae"]))
    suffix = draw(st.sampled_from([".safetensors", ".bin", ".pth"]))
    count = draw(st.integers(0, 3))
    if not count:
        return [stem + suffix], [], None
    first, width = draw(st.integers(0, 1)), draw(st.sampled_from([1, 5]))
    names = [f"{stem}-{i + first:0{width}d}-of-{count:0{width}d}{suffix}" for i in range(count)]
    missing = draw(st.lists(st.sampled_from(names), max_size=1))
    index = draw(st.sampled_from([None, f"{stem}{suffix}.index.json", f"{stem}{suffix}.index.v2.json"]))
    return names, missing, index


NOISE = ["optimizer.pt", ".hidden.safetensors", "config.json", "notes.bin", "x.safetensors.part"]


@settings(max_examples=80, deadline=None)
@given(st.lists(blocks(), max_size=4), st.sets(st.sampled_from(NOISE)))
def test_what_loads_is_one_whole_checkpoint_and_so_is_what_advice_names(parts, noise):
    with tempfile.TemporaryDirectory() as directory:
        whole = []
        for files, missing, index in parts:
            taken = {name.translate({ord(c): None for c in "0123456789"}) for name in os.listdir(directory)}
            if any(name.translate({ord(c): None for c in "0123456789"}) in taken for name in [*files, str(index)]):
                continue
            fill(directory, *(name for name in files if name not in missing))
            if index is not None:
                write_index(directory, index, *files)
            whole += [] if missing else [set(files)]
        for name in noise:
            Path(directory, name).write_bytes(weights(name) if name[0] in ".ox" else b"{}")
        try:
            named = [directory]
            assert names_in(directory) in whole
        except WanLoaderError as error:
            named = advice_of(error)
        assert all(names_in(path) in whole for path in named)
        assert named or any(missing for _, missing, _ in parts) or not parts
