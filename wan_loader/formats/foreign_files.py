"""Files that are none of our formats, but that people hand over: named by their first bytes, with the way out.

Files come without a suffix (the blobs of the hub's cache) and with a wrong one, so the content decides. Reads half a
kilobyte of a file; of an archive that was refused, also the list of its records.
"""

from __future__ import annotations

import os
import re
import stat
from typing import NamedTuple

from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.formats.file_names import is_unfinished, slices_in

__all__ = [
    "Foreign",
    "is_json",
    "other_archive",
    "other_directory",
    "other_file",
    "other_format",
    "read_head",
    "stand_in",
    "text_of",
]

_HEAD_BYTES = 512
#: Of a safetensors header: the beginning of one, cut off there, may read like text.
_LENGTH_BYTES = 8
_TAIL_BYTES = 8 << 20
_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")

_UNPACK = "unpack it, and name what was in it"
_SAVE_AGAIN = "convert it to safetensors with what wrote it"
_GGML = "quantised weights of old, which are not read here: take the model's GGUF, safetensors or .pth"
#: First bytes -> what the file is, and what to do.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"lmgg", "a GGML file", _GGML),
    (b"fmgg", "a GGML file", _GGML),
    (b"tjgg", "a GGML file", _GGML),
    (b"PK\x05\x06", "an empty zip archive", "get the file again"),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\x93NUMPY", "a numpy array", "numpy.load reads it; save it as safetensors"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow)", _SAVE_AGAIN),
    (b"PAR1", "a Parquet file, which holds a table", "name the weights"),
)
#: Formats without first bytes of their own: how their names end.
_SUFFIXES: tuple[tuple[str, str, str], ...] = (
    (r"\.distcp", "a part of a DCP checkpoint (torch.distributed.checkpoint)", "name its directory"),
    (r"\.onnx(_data)?", "an ONNX model", _SAVE_AGAIN),
    (r"\.msgpack", "a Flax checkpoint", _SAVE_AGAIN),
    (r"\.pb|\.ckpt\.index|\.ckpt\.meta|\.data-\d+-of-\d+", "a TensorFlow file", _SAVE_AGAIN),
    (r"\.tflite", "a TensorFlow Lite model", _SAVE_AGAIN),
    (r"\.engine|\.plan|\.trt", "a TensorRT engine", "name the weights that it was built from"),
)


class Foreign(NamedTuple):
    """A thing that is none of our formats."""

    reason: str
    """A predicate, such as "is a GGUF file"."""
    remedy: str | None
    """The way out, where one is known."""

    def __str__(self) -> str:
        return self.reason if self.remedy is None else f"{self.reason}: {self.remedy}"


_DCP = Foreign(
    "is a DCP checkpoint (torch.distributed.checkpoint), which is not read here",
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY model.pth makes one file of it",
)
_SLICES = Foreign(
    "is a checkpoint of which every file holds slices only (DeepSpeed ZeRO-3, or model parallelism)",
    "make one of it with what wrote it, such as DeepSpeed's zero_to_fp32.py in the directory above",
)


def read_head(path: str) -> bytes:
    """Return the first bytes of a regular file. Does not wait for a pipe's other end.

    Raises:
        CheckpointError: It is anything else than a regular file.
        OSError: It cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            stat_file(path)
        return os.pread(fd, _HEAD_BYTES, 0)
    finally:
        os.close(fd)


def is_json(head: bytes) -> bool:
    """Say whether a file that is none of our formats is JSON, such as an index, by its first bytes."""
    return _text(head)[:1] == b"{"


def other_file(path: str, head: bytes) -> Foreign | None:
    """Say what a file is that is none of ours by its first bytes, and what to do; None where nothing is known of it."""
    return stand_in(head) or other_format(path, head)


def stand_in(head: bytes) -> Foreign | None:
    """Say what stands in the place of weights, and what to do: nothing, a pointer, a page, zeros to be overwritten."""
    if not head:
        return Foreign("is empty, truncated to nothing", "download it again")
    if not head.strip(b"\x00"):
        return Foreign("begins with zeros, as a file whose download has not ended", "download it again")
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d{1,18})$", head, re.MULTILINE)
        of = f" to a file of {int(size[1])} bytes" if size else ""
        return Foreign(
            f"is a Git-LFS pointer{of}, not the weights", "git lfs install && git lfs pull in its repository gets them"
        )
    if _text(head).lower().startswith(_MARKUP):
        remedy = "download it again, and check address and token"
        return Foreign("is an HTML or XML page saved in place of the weights", remedy)
    return None


def other_format(path: str, head: bytes) -> Foreign | None:
    """Say what a file is that another program reads, and what to do; None where nothing is known of it."""
    name = os.path.basename(path).lower()
    if is_unfinished(name):
        return Foreign("is a download that has not ended", "let it end, or give it its own name if it is complete")
    for magic, what, remedy in _MAGIC:
        if head.startswith(magic):
            return Foreign(f"is {what}", remedy)
    for suffix, what, remedy in _SUFFIXES:
        if re.search(rf"({suffix})$", name):
            return Foreign(f"is {what}", remedy)
    if head[257:262] == b"ustar":
        return Foreign("is a tar archive", _UNPACK)
    if head[4:8] == b"TFL3":
        return Foreign("is a TensorFlow Lite model", _SAVE_AGAIN)
    return None


def text_of(head: bytes) -> str | None:
    """Return the beginning of a file that is plain text, such as a server's message; None for anything else."""
    is_text = len(head) > _LENGTH_BYTES and all(32 <= c < 127 or c in b"\t\r\n" for c in head)
    return _text(head)[:60].decode() if is_text else None


def _text(head: bytes) -> bytes:
    """Return the bytes without a mark of the byte order and white space before them."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def other_archive(path: str) -> Foreign | None:
    """Say what a zip archive is that torch did not write, from the names of its records; None where that is not known.

    Reads the last 8 MiB at most, where an archive lists its records.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            tail = file.read()
    except OSError:
        return None
    listed = tail[max(0, tail.find(b"PK\x01\x02")) :]
    if b"/data.pkl" in listed:
        return None
    if b".weights.h5" in listed:
        return Foreign("is a Keras model", _SAVE_AGAIN)
    if b".npy" in listed:
        return Foreign("is an archive of numpy arrays (.npz)", "numpy.load reads it; save them as safetensors")
    return None


def other_directory(names: set[str]) -> Foreign | None:
    """Say what a directory is, by the names in it, that holds one model in another kind of layout; None: not known."""
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return _DCP
    if slices_in(names):
        return _SLICES
    if "saved_model.pb" in names:
        return Foreign("is a TensorFlow model", _SAVE_AGAIN)
    return None
