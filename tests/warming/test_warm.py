"""Warming: what was asked for is resident afterwards, within what the machine can hold."""

import os

import pytest

from wan_loader.errors import CheckpointError, HostMemoryError
from wan_loader.warming import warm as module
from wan_loader.warming.prewarm import BLOCK_BYTES
from wan_loader.warming.tree import list_tree
from wan_loader.warming.warm import warm

SIZES = (BLOCK_BYTES + 12345, 3 * BLOCK_BYTES, 100)


@pytest.fixture
def tree(tmp_path, evict):
    for i, nbytes in enumerate(SIZES):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(os.urandom(nbytes))
        evict(path)
    return list_tree(tmp_path)


def test_everything_is_resident_afterwards(tree, resident):
    told = []
    result = warm(tree.files, progress=lambda done, total: told.append((done, total)))
    assert result.complete
    assert (result.nbytes, result.resident_before, result.resident_after) == (sum(SIZES), 0, sum(SIZES))
    assert result.nbytes_read == sum(SIZES)
    assert [resident(file.path) for file in tree.files] == list(SIZES)
    assert all(0 <= done <= total == sum(SIZES) for done, total in told)


def test_what_is_resident_is_not_read_again(tree):
    warm(tree.files)
    result = warm(tree.files)
    assert (result.nbytes_read, result.resident_before) == (0, sum(SIZES))


def test_a_limit_counts_from_the_first_file(tree, resident):
    limit = SIZES[0] + BLOCK_BYTES
    result = warm(tree.files, limit_nbytes=limit)
    assert result.complete
    assert result.nbytes == limit
    assert resident(tree.files[0].path) == SIZES[0]
    assert resident(tree.files[2].path) == 0
    assert warm(tree.files, limit_nbytes=limit).nbytes_read == 0


@pytest.mark.parametrize("limits", [{"memory_limit": 10**7}, {"available_memory": 10**7}])
def test_more_than_the_machine_holds_is_refused_before_reading(tree, monkeypatch, resident, limits):
    for name, nbytes in limits.items():
        monkeypatch.setattr(module, name, lambda nbytes=nbytes: nbytes)
    with pytest.raises(HostMemoryError) as error:
        warm(tree.files)
    assert "--limit" in error.value.remedy
    assert sum(resident(file.path) for file in tree.files) == 0
    assert warm(tree.files, limit_nbytes=10**6).complete


def test_what_is_resident_already_needs_no_memory(tree, monkeypatch):
    warm(tree.files)
    monkeypatch.setattr(module, "available_memory", lambda: 0)
    monkeypatch.setattr(module, "memory_limit", lambda: 1 << 40)
    assert warm(tree.files).complete


def test_it_stops_when_others_take_the_memory(tree, monkeypatch):
    left = iter([1 << 40])
    monkeypatch.setattr(module, "available_memory", lambda: next(left, 0))
    monkeypatch.setattr(module.Prewarm, "wait", lambda self, timeout_s=None: False)
    result = warm(tree.files)
    assert "stopped early" in result.warnings[0]


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tree, monkeypatch):
    os.unlink(tree.files[2].path)
    os.mkdir(tree.files[2].path)
    with pytest.raises(CheckpointError) as error:
        warm(tree.files)
    assert tree.files[2].path in error.value.reason
    assert error.value.remedy == "check the file and the disk"
