"""The content says what a file is, whatever it is called; what is none of ours is named, with the way out."""

import io
import os
import zipfile

import pytest
import torch
from gguf_files import gguf_bytes, plain
from safetensors.torch import save

from wan_loader import CheckpointError, MissingFileError, load_file, open_checkpoint
from wan_loader.formats.known_formats import recognise_format
from wan_loader.verify import verify

NAMES = [
    "0f" * 32,
    "model.safetensors",
    "model.PTH",
    "model.bin",
    "model_best.pth.tar",
    "state.pkl",
    "x.json",
    "a.gguf",
]


def saved(**options):
    file = io.BytesIO()
    torch.save({"w": torch.arange(3.0)}, file, **options)
    return file.getvalue()


def archive(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, b"x")
    return file.getvalue()


OURS = {
    "safetensors": save({"w": torch.arange(3.0)}),
    "torch-zip": saved(),
    "gguf": gguf_bytes({"w": plain(torch.arange(3.0))}),
    "torch-pickle": saved(_use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format_", OURS)
def test_content_decides_and_not_the_suffix(tmp_path, format_, name):
    path = tmp_path / name
    path.write_bytes(OURS[format_])
    assert open_checkpoint(path).format == format_
    loaded = load_file(path)
    assert loaded["w"].tolist() == [0, 1, 2]
    assert verify(path, loaded) == 1
    assert open_checkpoint([path]).format == format_


@pytest.mark.parametrize("length", [0x280, 0x380, 0x04034B50])
def test_a_length_that_looks_like_another_format_is_a_length(length):
    """0x280 is how a pickle begins, 0x04034b50 how a zip archive does."""
    assert recognise_format(length.to_bytes(8, "little") + b'{"w":').name == "safetensors"


def test_an_index_by_its_content(tmp_path):
    (tmp_path / "model").write_bytes(OURS["safetensors"])
    for name in ("0f" * 32, "index.txt"):
        (tmp_path / name).write_text('\n {"weight_map": {"w": "model"}}')
        assert open_checkpoint(tmp_path / name).names == ("w",)


OTHERS = {
    "Git-LFS pointer to a file of 9992481544 bytes": b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\n"
    b"size 9992481544\n",
    "GGUF of version 9": b"GGUF\x09\0\0\0" + bytes(64),
    "GGML": b"lmgg\x01\0\0\0" + bytes(64),
    "gzip": b"\x1f\x8b\x08\0" + bytes(64),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(64),
    "7z": b"7z\xbc\xaf\x27\x1c" + bytes(64),
    "tar archive": b"model/".ljust(257, b"\0") + b"ustar\x0000" + bytes(248),
    "numpy array": b"\x93NUMPY\x01\0" + bytes(64),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "HTML": b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>",
    "page": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "JSON": b'{"error": "Repository not found"}',
    "'Entry not found'": b"Entry not found",
    "empty": b"",
    "zeros": bytes(1000),
    "not a torch checkpoint": archive("model/weights.bin"),
    "numpy arrays": archive("w.npy"),
    "Keras": archive("config.json", "model.weights.h5"),
    "empty zip": archive(),
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.bin"])
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_none_of_ours_is_named(tmp_path, what, name):
    path = tmp_path / name
    path.write_bytes(OTHERS[what])
    for given in (path, tmp_path, [path]):
        with pytest.raises(CheckpointError, match=f"^{path} .*{what}.*: ") as caught:
            open_checkpoint(given)
        assert caught.value.path == str(path)
        assert str(caught.value).endswith(caught.value.remedy)
        assert not isinstance(caught.value, MissingFileError)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("flax_model.msgpack", "Flax"),
        ("tf_model.ckpt.data-00000-of-00001", "TensorFlow"),
        ("saved_model.pb", "TensorFlow"),
        ("model.onnx", "ONNX"),
        ("__0_0.distcp", "DCP"),
        ("model.engine", "TensorRT"),
    ],
)
def test_formats_that_only_their_names_tell(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"\x08\x07\x12\x34" * 20)
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=what):
            open_checkpoint(given)


def test_a_torchscript_archive_is_called_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as made:
        made.writestr("m/data.pkl", b"\x80\x02c__torch__\nDoubled\n)\x81}b.")
        for name in ("m/code/__torch__.py", "m/constants.pkl", "m/version"):
            made.writestr(name, b"3", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"m\.pt is a TorchScript archive.*torch\.jit\.load"):
        open_checkpoint(tmp_path / "m.pt")


DIRECTORIES = {
    "DCP": [".metadata", "__0_0.distcp"],
    "ZeRO-3": ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    "model parallelism": ["consolidated.00.pth", "consolidated.01.pth", "params.json"],
    "TensorFlow": ["saved_model.pb"],
    "GGUF of version 0": ["README.md", "model-Q4.gguf"],
    "has not ended": ["model.safetensors.incomplete"],
}


@pytest.mark.parametrize("what", DIRECTORIES)
def test_a_directory_of_something_else_is_named(tmp_path, what):
    (tmp_path / "sub").mkdir()
    for name in DIRECTORIES[what]:
        (tmp_path / "sub" / name).write_bytes((b"GGUF" if "GGUF" in what else b"lmgg") + bytes(20))
    with pytest.raises(CheckpointError, match=what):
        open_checkpoint(tmp_path / "sub")
    if what in ("DCP", "ZeRO-3"):
        with pytest.raises(CheckpointError, match=rf"sub is a .*{what}"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("count", [1, 3])
def test_a_dcp_checkpoint_is_named_though_its_files_are_archives_of_torch(tmp_path, count):
    (tmp_path / ".metadata").write_bytes(b"\x80\x02}.")
    with open(tmp_path / "__0_0.distcp", "wb") as file:
        for _ in range(count):
            torch.save(torch.ones(3), file)
    for given in (tmp_path, tmp_path / "__0_0.distcp"):
        with pytest.raises(CheckpointError, match=r"is a .*DCP checkpoint"):
            open_checkpoint(given)


@pytest.mark.parametrize("suffix", [".part", ".incomplete", ".crdownload"])
def test_a_download_that_has_not_ended_is_refused(tmp_path, suffix):
    path = tmp_path / f"model.safetensors{suffix}"
    path.write_bytes(OURS["safetensors"])
    with pytest.raises(CheckpointError, match="has not ended"):
        open_checkpoint(path)


def test_a_file_that_aria2_is_filling_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(OURS["safetensors"])
    control = tmp_path / "model.safetensors.aria2"
    control.write_bytes(b"\0\1")
    for given in (path, tmp_path, [path]):
        with pytest.raises(CheckpointError, match=f"still being downloaded, as {control} says"):
            open_checkpoint(given)
    control.unlink()
    assert open_checkpoint(tmp_path).names == ("w",)


def test_a_pipe_is_no_file_and_nobody_waits_for_its_other_end(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / "model.safetensors")
