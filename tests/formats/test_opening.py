"""From a path to one checkpoint: files, indexes, directories, shard sets and lists; each mistake is one clear error."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from versions import DTYPES

from wan_loader import CheckpointError, MissingFileError, WanLoaderError, load_file, open_checkpoint
from wan_loader.verify import verify

INDEX = "model.safetensors.index.json"
LEGACY = {"_use_new_zipfile_serialization": False}


def shard_name(number, count, suffix=".safetensors"):
    return f"model-{number:05d}-of-{count:05d}{suffix}"


def write_shards(directory, count=3, suffix=".safetensors"):
    """Shards of two tensors each; returns tensor name -> file name."""
    weight_map = {}
    for i in range(count):
        name = shard_name(i + 1, count, suffix)
        tensors = {f"block.{i}.weight": torch.full((2, 3), float(i)), f"block.{i}.bias": torch.full((3,), -float(i))}
        (save_file if suffix == ".safetensors" else torch.save)(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    return weight_map


def write_index(directory, weight_map, name=INDEX):
    path = directory / name
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def check_three_shards(checkpoint):
    assert set(checkpoint.names) == {f"block.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    assert len(checkpoint.files) == 3
    assert checkpoint.nbytes == 3 * (24 + 12)
    for tensor in checkpoint.tensors:
        number = int(tensor.name.split(".")[1])
        path = checkpoint.files[checkpoint.storages[tensor.storage].file].path
        assert os.path.basename(path).startswith(f"model-{number + 1:05d}")


# What a path may be


@pytest.mark.parametrize(
    ("suffix", "indexed"),
    [(".safetensors", True), (".bin", True), (".safetensors", False), (".bin", False), (".pth", False)],
)
@pytest.mark.parametrize("given", ["directory", "index", "list"])
def test_shards(tmp_path, suffix, indexed, given):
    weight_map = write_shards(tmp_path, suffix=suffix)
    if indexed:
        index = write_index(tmp_path, weight_map, f"model{suffix}.index.json")
    files = sorted(set(weight_map.values()))
    if given == "index" and not indexed:
        pytest.skip("has none")
    path = {"directory": tmp_path, "index": indexed and index, "list": [tmp_path / name for name in files]}[given]
    check_three_shards(open_checkpoint(path))
    loaded = load_file(path)
    assert loaded["block.2.bias"].tolist() == [-2, -2, -2]


def test_text_and_path_objects(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", str(tmp_path / "model.safetensors"), tmp_path, str(tmp_path)):
        assert open_checkpoint(path).names == ("w",)


def test_a_relative_path(tmp_path, monkeypatch):
    weight_map = write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    monkeypatch.chdir(tmp_path)
    check_three_shards(open_checkpoint(INDEX))
    check_three_shards(open_checkpoint("."))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.pt", "pytorch_model.bin"])
def test_a_directory_with_one_file_and_things_beside_it(tmp_path, name):
    (save_file if name.endswith(".safetensors") else torch.save)({"w": torch.ones(2)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# weights")
    (tmp_path / "google").mkdir()
    assert open_checkpoint(tmp_path).names == ("w",)


def test_tensors_that_the_index_leaves_out_are_left_out_and_said_so(tmp_path):
    weight_map = write_shards(tmp_path)
    del weight_map["block.1.bias"]
    checkpoint = open_checkpoint(write_index(tmp_path, weight_map))
    assert set(checkpoint.names) == set(weight_map)
    assert "block.1.bias" in checkpoint.warnings[0]
    assert load_file(tmp_path).keys() == weight_map.keys()


@pytest.mark.parametrize("options", [None, {}, LEGACY], ids=["safetensors", "zip", "legacy"])
def test_a_name_in_two_files_has_the_value_that_the_index_says(tmp_path, options):
    for i, names in enumerate([["a", "both"], ["both", "b"]]):
        tensors = {name: torch.full((2,), float(i)) for name in names}
        path = tmp_path / f"m-{i}.bin"
        save_file(tensors, path) if options is None else torch.save(tensors, path, **options)
    for owner in (0, 1):
        index = write_index(tmp_path, {"a": "m-0.bin", "b": "m-1.bin", "both": f"m-{owner}.bin"})
        loaded = load_file(index)
        assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
            "a": [0, 0],
            "b": [1, 1],
            "both": [owner, owner],
        }
        assert verify(index, loaded) == 3


def test_a_link_to_a_file_elsewhere_is_fine(tmp_path):
    """The Hugging Face cache keeps links into a directory of blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "blobs" / "0123abcd")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123abcd")
    assert open_checkpoint(tmp_path / "snapshot").names == ("w",)
    assert open_checkpoint(tmp_path / "blobs" / "0123abcd").names == ("w",)


# Legacy pickles


def test_a_legacy_pickle_works_with_a_warning(tmp_path):
    path = tmp_path / "old.pth"
    expected = {"w": torch.arange(6.0).view(2, 3), "scalar": torch.tensor(7), "none": torch.empty(0, 3)}
    torch.save(expected, path, **LEGACY)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "torch-pickle"
    assert len(checkpoint.warnings) == 1
    assert str(path) in checkpoint.warnings[0]
    assert "torch.load" in checkpoint.warnings[0]
    assert {t.name: (t.dtype, t.shape) for t in checkpoint.tensors} == {
        "w": ("float32", (2, 3)),
        "scalar": ("int64", ()),
        "none": ("float32", (0, 3)),
    }
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert load_file(path, dtype="bf16")["w"].dtype is torch.bfloat16


def test_legacy_shards(tmp_path):
    for i in range(2):
        torch.save({f"w{i}": torch.full((3,), float(i))}, tmp_path / shard_name(i + 1, 2, ".bin"), **LEGACY)
    loaded = load_file(tmp_path)
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {"w0": [0, 0, 0], "w1": [1, 1, 1]}


def test_shards_of_which_torch_has_to_read_some(tmp_path):
    shared = torch.arange(4.0)
    odd = torch.nn.Parameter(torch.ones(2))
    odd.note = "an attribute, which is saved with the parameter"
    torch.save({"a": shared, "view": shared[1:3]}, tmp_path / shard_name(1, 3, ".bin"))
    torch.save({"b": torch.full((3,), 2.0)}, tmp_path / shard_name(2, 3, ".bin"), **LEGACY)
    torch.save({"c": odd}, tmp_path / shard_name(3, 3, ".bin"))
    loaded = load_file(tmp_path)
    assert {n: t.tolist() for n, t in loaded.items()} == {"a": [0, 1, 2, 3], "view": [1, 2], "b": [2] * 3, "c": [1, 1]}
    assert loaded["view"].untyped_storage().data_ptr() == loaded["a"].untyped_storage().data_ptr()
    assert load_file(tmp_path, dtype="bf16")["view"].dtype is torch.bfloat16
    assert verify(tmp_path, loaded) == 4


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_a_truncated_legacy_pickle(tmp_path, kept):
    path = tmp_path / "old.pth"
    torch.save({"w": torch.ones(1000)}, path, **LEGACY)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    assert str(path) in str(caught.value)


def test_a_legacy_pickle_with_an_entry_that_is_no_tensor(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"w": torch.ones(2), "step": 3}, path, **LEGACY)
    with pytest.raises(CheckpointError, match="'step'") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["old.pth", "old.pt", "old.bin", "old.safetensors", "old"])
@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x00" * 64, b"(lp0\n."], ids=["none", "text", "0", "p0"])
def test_a_file_of_no_known_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    if content == b"\x00" * 64 and not name.endswith((".pth", ".pt", ".bin")):
        content = b""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


# torch stays out


def test_planned_formats_need_no_torch(tmp_path):
    for name in ("single", "sharded", "zip", "zip shards"):
        (tmp_path / name).mkdir()
    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "single" / "model.safetensors")
    write_index(tmp_path / "sharded", write_shards(tmp_path / "sharded"))
    write_shards(tmp_path / "zip shards", suffix=".bin")
    every_kind = {
        "v2": torch.nn.Parameter(torch.ones(2)),
        **({"v3": torch.ones(2, dtype=DTYPES["uint16"])} if "uint16" in DTYPES else {}),
        "fp8": torch.ones(2).to(torch.float8_e4m3fn),
    }
    torch.save(every_kind, tmp_path / "zip" / "model.pth")
    code = (
        "import sys; from wan_loader import open_checkpoint\n"
        "for path in sys.argv[1:]: open_checkpoint(path)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    paths = [str(tmp_path / name) for name in ("single", "sharded", "zip", "zip shards")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)


# Bad indexes

BAD_INDEXES = {
    "empty file": b"",
    "not JSON": b"weights",
    "not UTF-8": b'{"weight_map": "\xff"}',
    "a list": b"[]",
    "no weight_map": b"{}",
    "empty weight_map": b'{"weight_map": {}}',
    "weight_map is a list": b'{"weight_map": ["model.safetensors"]}',
    "file is a number": b'{"weight_map": {"w": 1}}',
    "file is null": b'{"weight_map": {"w": null}}',
    "deeply nested": b"[" * 200_000,
    "number of 5000 digits": b'{"metadata": ' + b"9" * 5000 + b', "weight_map": {"w": "model.safetensors"}}',
    "weight_map twice": b'{"weight_map": {"w": "other.safetensors"}, "weight_map": {"w": "model.safetensors"}}',
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index(tmp_path, case):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    path = tmp_path / INDEX
    path.write_bytes(BAD_INDEXES[case])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert INDEX in str(caught.value)


@pytest.mark.parametrize("second", ["model.safetensors", "other.safetensors"], ids=["same", "different"])
def test_an_index_that_names_a_tensor_twice(tmp_path, second):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{"w": "{second}", "w": "model.safetensors"}}}}')
    with pytest.raises(CheckpointError, match="'w'") as caught:
        open_checkpoint(tmp_path / INDEX)
    assert INDEX in str(caught.value)


OUTSIDE = [
    "../secret.safetensors",
    "sub/../../secret.safetensors",
    "sub/secret.safetensors",
    "./secret.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "/",
]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_that_names_a_file_outside_its_directory(tmp_path, shard):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    for directory in (tmp_path, tmp_path / "model", tmp_path / "model" / "sub"):
        save_file({"w": torch.ones(2)}, directory / "secret.safetensors")
    index = write_index(tmp_path / "model", {"w": shard})
    with pytest.raises(CheckpointError, match="outside") as caught:
        open_checkpoint(index)
    assert str(index) in str(caught.value)
    assert "'w'" in str(caught.value)
    assert repr(shard) in str(caught.value)


def test_an_index_that_names_an_absolute_path_in_its_directory(tmp_path):
    weight_map = write_shards(tmp_path)
    index = write_index(tmp_path, {name: str(tmp_path / shard) for name, shard in weight_map.items()})
    with pytest.raises(CheckpointError, match="outside"):
        open_checkpoint(index)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_index_that_names_a_missing_file(tmp_path, missing):
    weight_map = write_shards(tmp_path)
    index = write_index(tmp_path, weight_map)
    (tmp_path / shard_name(missing, 3)).unlink()
    for path in (index, tmp_path):
        with pytest.raises(MissingFileError) as caught:
            open_checkpoint(path)
        assert shard_name(missing, 3) in str(caught.value)


@pytest.mark.parametrize(
    "shard", ["a\0b.safetensors", "\ud800.safetensors", "x" * 5000], ids=["NUL", "surrogate", "long"]
)
def test_an_index_that_names_a_file_that_cannot_be(tmp_path, shard):
    index = write_index(tmp_path, {"w": shard})
    with pytest.raises(CheckpointError):
        open_checkpoint(index)


def test_an_index_that_names_a_directory(tmp_path):
    (tmp_path / "sub").mkdir()
    index = write_index(tmp_path, {"w": "sub"})
    with pytest.raises(CheckpointError, match="sub"):
        open_checkpoint(index)


def test_an_index_that_names_itself(tmp_path):
    index = write_index(tmp_path, {"w": INDEX})
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(index)


@pytest.mark.parametrize("name", ["block.9.weight", "", "block.0.bias"], ids=["nowhere", "empty", "another shard"])
def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path, name):
    weight_map = write_shards(tmp_path)
    weight_map[name] = shard_name(2, 3)
    index = write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(index)
    assert str(index) in str(caught.value)
    assert repr(name) in str(caught.value)
    assert shard_name(2, 3) in str(caught.value)


def test_a_damaged_shard_is_named(tmp_path):
    write_index(tmp_path, write_shards(tmp_path))
    shard = tmp_path / shard_name(2, 3)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        open_checkpoint(tmp_path)
    assert str(shard) in str(caught.value)


def test_a_missing_index(tmp_path):
    with pytest.raises(MissingFileError, match=r"index\.json"):
        open_checkpoint(tmp_path / INDEX)


# Bad directories, shard sets and lists


def test_an_empty_directory(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_directory_of_components_says_to_name_one(tmp_path):
    (tmp_path / "transformer").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "transformer" / "model.safetensors")
    with pytest.raises(CheckpointError, match="subdirectories"):
        open_checkpoint(tmp_path)


def make_parts(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.touch()


def test_a_model_directory_names_its_parts(tmp_path):
    make_parts(tmp_path, "Wan2.1_VAE.pth", "models_t5.pth", "assets/logo.png", "high_noise_model/a.safetensors")
    make_parts(tmp_path, "low_noise_model/a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    names = ("high_noise_model", "low_noise_model", "Wan2.1_VAE.pth", "models_t5.pth")
    parts = ", ".join(str(tmp_path / name) for name in names)
    assert str(caught.value) == f"{tmp_path} is a Wan2.2-T2V-A14B model's directory: name one of its parts: {parts}"


def test_a_diffusers_directory_names_its_parts(tmp_path):
    make_parts(tmp_path, "model_index.json", "scheduler/config.json", "vae/a.safetensors", "transformer/a.safetensors")
    with pytest.raises(MissingFileError) as caught:
        open_checkpoint(tmp_path)
    parts = f"{tmp_path}/transformer, {tmp_path}/vae"
    assert str(caught.value) == f"{tmp_path} is a diffusers model's directory: name one of its parts: {parts}"


def test_a_directory_of_many_names_some(tmp_path):
    make_parts(tmp_path, *(f"part{i:02d}/a.safetensors" for i in range(12)))
    with pytest.raises(MissingFileError, match=r"subdirectories only: .*/part07, and 4 more$"):
        open_checkpoint(tmp_path)


def test_a_directory_that_does_not_exist(tmp_path):
    with pytest.raises(MissingFileError, match="nothing-here"):
        open_checkpoint(tmp_path / "nothing-here")


def test_what_may_not_be_read_does_not_pass_for_missing(open_dir, unprivileged):
    write_index(open_dir, write_shards(open_dir))
    shut = open_dir / "shut"
    shut.mkdir()
    write_shards(shut)
    shut.chmod(0)
    (open_dir / INDEX).chmod(0)
    for path in (shut, shut / shard_name(1, 3), [shut / shard_name(1, 3)], open_dir):
        with unprivileged(), pytest.raises(CheckpointError, match=r"cannot be read: Permission denied$") as caught:
            open_checkpoint(path)
        assert not isinstance(caught.value, MissingFileError)
        assert str(open_dir) in str(caught.value)
    shut.chmod(0o755)


def two_files(directory):
    save_file({"w": torch.ones(2)}, directory / "one.safetensors")
    save_file({"w": torch.ones(2)}, directory / "two.safetensors")


def two_formats(directory):
    save_file({"w": torch.ones(2)}, directory / "model.safetensors")
    torch.save({"w": torch.ones(2)}, directory / "adapter.bin")


def two_indexes(directory):
    weight_map = write_shards(directory)
    write_index(directory, weight_map)
    del weight_map["block.1.bias"]
    write_index(directory, weight_map, "model.fp16.safetensors.index.json")


def an_index_and_a_file(directory):
    write_index(directory, write_shards(directory))
    save_file({"w": torch.ones(2)}, directory / "vae.safetensors")


def shards_and_the_whole(directory):
    write_shards(directory)
    save_file({"w": torch.ones(2)}, directory / "model.safetensors")


def shards_of_two_counts(directory):
    write_shards(directory, 2)
    write_shards(directory, 3)


def two_shard_sets(directory):
    write_shards(directory)
    save_file({"w": torch.ones(2)}, directory / "other-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    "make",
    [
        two_files,
        two_formats,
        two_indexes,
        an_index_and_a_file,
        shards_and_the_whole,
        shards_of_two_counts,
        two_shard_sets,
    ],
)
def test_a_directory_with_two_checkpoints(tmp_path, make):
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not isinstance(caught.value, MissingFileError)


def test_a_shard_is_a_file_and_its_directory_the_set(tmp_path):
    write_shards(tmp_path)
    for number in range(3):
        checkpoint = open_checkpoint(tmp_path / shard_name(number + 1, 3))
        assert {*checkpoint.names} == {f"block.{number}.weight", f"block.{number}.bias"}
    whole = open_checkpoint(tmp_path)
    check_three_shards(whole)
    assert whole.path == str(tmp_path)
    check_three_shards(open_checkpoint(whole.path))
    (tmp_path / shard_name(2, 3)).unlink()
    assert len(open_checkpoint(tmp_path / shard_name(1, 3)).names) == 2


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_incomplete_shard_set_without_an_index(tmp_path, missing):
    write_shards(tmp_path)
    (tmp_path / shard_name(missing, 3)).unlink()
    with pytest.raises(MissingFileError) as caught:
        open_checkpoint(tmp_path)
    assert shard_name(missing, 3) in str(caught.value)


def test_a_shard_of_a_set_of_none(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model-00001-of-00000.safetensors")
    try:
        assert open_checkpoint(tmp_path).names == ("w",)
    except WanLoaderError as error:
        assert "model-00001" in str(error)  # noqa: PT017 - loading the file alone and refusing it are both fine


def test_an_empty_list():
    with pytest.raises(CheckpointError, match="empty"):
        open_checkpoint([])


def test_a_list_with_a_missing_file(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "one.safetensors")
    with pytest.raises(MissingFileError, match=r"two\.safetensors"):
        open_checkpoint([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_a_tensor_that_stands_in_two_files(tmp_path):
    two_files(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    assert caught.value.tensor == "w"
    assert "one.safetensors" in str(caught.value)
    assert "two.safetensors" in str(caught.value)


def test_files_of_different_formats(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"b": torch.ones(2)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="formats"):
        open_checkpoint([tmp_path / "a.safetensors", tmp_path / "b.pth"])


# Files that change after their header was read


@pytest.mark.parametrize("change", ["replaced", "modified", "removed"])
def test_a_file_that_changes_is_noticed(tmp_path, change):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, path)
    (file,) = open_checkpoint(path).files
    file.check_unchanged()
    if change == "replaced":
        save_file({"w": torch.ones(2)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
    elif change == "modified":
        with path.open("r+b") as f:
            f.truncate(20)
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        file.check_unchanged()
    assert str(path) in str(caught.value)
