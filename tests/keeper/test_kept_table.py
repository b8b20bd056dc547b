"""The table of kept weights: as it was written, or refused."""

import json
import os

import pytest

from wan_loader.errors import KeepError
from wan_loader.keeper.table import KeptStorage, KeptTable, KeptTensor, Origin, padded, read_table, write_table

STORAGES = (KeptStorage(0, 24, "abc"), KeptStorage(512, 0, ""))
TENSORS = (
    KeptTensor("ä", "float32", (2, 2), 0, (2, 1), 1),
    KeptTensor("tied", "float32", (6,), 0, (1,), 0, Origin(0, 8, 24, "float32")),
    KeptTensor("none", "int64", (0, 3), 1, (3, 1), 0),
)


def test_it_comes_back_as_it_was():
    fd = write_table(table := KeptTable(STORAGES, TENSORS, ("mark",)))
    try:
        assert read_table(fd) == table
        table.check(512)
        assert table.nbytes == 24
        with pytest.raises(OSError, match="not permitted"):
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (7,)},
        {"offset": 1},
        {"offset": -1},
        {"storage": 1},
        {"storage": 2},
        {"storage": -1},
        {"stride": (2,)},
        {"stride": (-1,)},
        {"stride": ()},
        {"dtype": "float33"},
        {"shape": ("6",)},
        {"origin": Origin(1, 0, 24, "float32")},
        {"origin": Origin(-1, 0, 24, "float32")},
    ],
    ids=str,
)
def test_what_lies_outside_is_refused(wrong):
    tied = KeptTensor("tied", "float32", (6,), 0, (1,), 0)
    KeptTable(STORAGES, (tied._replace(origin=Origin(0, 0, 24, "float32")),), ("mark",)).check(512)
    with pytest.raises(KeepError, match="damaged"):
        KeptTable(STORAGES, (tied._replace(**wrong),), ("mark",)).check(512)


@pytest.mark.parametrize(("storage", "nbytes"), [(KeptStorage(0, 24, ""), 23), (KeptStorage(-1, 24, ""), 512)])
def test_memory_that_is_too_short(storage, nbytes):
    with pytest.raises(KeepError, match="damaged"):
        KeptTable((storage,), ()).check(nbytes)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1]", b"\xff", json.dumps({"storages": [[1]], "tensors": []}).encode()], ids=repr
)
def test_what_is_no_table(text):
    fd = os.memfd_create("test")
    try:
        os.write(fd, text)
        with pytest.raises(KeepError, match="damaged"):
            read_table(fd)
    finally:
        os.close(fd)


def test_padding():
    assert [padded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
