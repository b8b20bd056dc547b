"""Every `CheckpointFormat` knows its own files, tells their facts, and refuses what is damaged."""

import math
import os
import random
from pathlib import Path

import pytest
import torch
from gguf_files import gguf_bytes, plain
from safetensors.torch import save_file

from wan_loader import CheckpointError, load_file, open_checkpoint
from wan_loader.formats.checkpoint_facts import stat_file
from wan_loader.formats.checkpoint_format import Likeness
from wan_loader.formats.foreign_files import read_head
from wan_loader.formats.gguf import GgufFormat
from wan_loader.formats.known_formats import FORMATS, format_of, holds_weights, is_planned, recognise_format
from wan_loader.formats.safetensors import SafetensorsFormat
from wan_loader.formats.torch_formats import TorchPickleFormat, TorchZipFormat
from wan_loader.verify import same_bits, verify

TENSORS = {
    "blocks.0.weight": torch.arange(6000, dtype=torch.float32).reshape(60, 100),
    "blocks.0.bias": torch.arange(7, dtype=torch.bfloat16),
    "counts": torch.tensor([[1], [2]], dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
}


class CheckpointFormatContract:
    """What opening, loading and verifying rely on."""

    format: object
    has_parts = True

    def save(self, tensors, path):
        raise NotImplementedError

    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "whatever"
        self.save(TENSORS, path)
        return str(path)

    def test_it_is_one_of_the_known_formats(self):
        (known,) = [known for known in FORMATS if known.name == self.format.name]
        assert type(known) is type(self.format)

    def test_its_files_are_recognised_by_their_content(self, path):
        head = read_head(path)
        assert self.format.likeness(head) is Likeness.CERTAIN
        assert recognise_format(head).name == self.format.name
        assert holds_weights(head)

    @pytest.mark.parametrize("head", [b"", b"\0" * 512, b"lmgg" + bytes(508), b"{}", b"<html>", b"PK", b"\x80"])
    def test_other_content_is_not(self, head):
        assert self.format.likeness(head) is Likeness.NONE

    def test_facts(self, path):
        checkpoint = self.format.read(path, None)
        assert (checkpoint.path, checkpoint.format) == (path, self.format.name)
        assert format_of(checkpoint).name == self.format.name
        assert checkpoint.files == (stat_file(path),)
        facts = {t.name: (t.dtype, t.shape, t.stride) for t in checkpoint.tensors}
        for name, tensor in TENSORS.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            assert facts.pop(name)[:2] == (dtype, tuple(tensor.shape))
        assert facts == {}

    def test_what_is_planned_lies_where_the_facts_say(self, path):
        checkpoint = self.format.read(path, None)
        data = Path(path).read_bytes()
        assert is_planned(checkpoint) == (self.format.load_whole is None)
        for tensor in checkpoint.tensors if is_planned(checkpoint) else ():
            storage = checkpoint.storages[tensor.storage]
            assert storage.start + storage.nbytes <= len(data)
            start = storage.start + tensor.offset * TENSORS[tensor.name].itemsize
            raw = data[start : start + tensor.nbytes]
            assert raw == TENSORS[tensor.name].reshape(-1).view(torch.uint8).numpy().tobytes()

    def test_what_is_not_planned_is_loaded_whole(self, path):
        if (load := self.format.load_whole) is not None:
            self.check_equal(load(path, "cpu", None))

    def test_a_file_among_others(self, path):
        """Its storages are counted after those of the files before it."""
        alone, later = self.format.read(path, None), self.format.read(path, None, 3, 40)
        assert {storage.file for storage in later.storages} == {3}
        assert [s._replace(file=0) for s in later.storages] == list(alone.storages)
        assert [t._replace(storage=t.storage - 40) for t in later.tensors] == list(alone.tensors)

    def test_reference_tensors_are_the_format_s_own(self, path):
        names = list(reversed(TENSORS))
        found = list(self.format.reference_tensors(path, names, None))
        assert [name for name, _ in found] == names
        self.check_equal(dict(found))

    def test_a_load_equals_it(self, path):
        loaded = load_file(path)
        self.check_equal(loaded)
        assert verify(path, loaded) == len(TENSORS)

    def test_a_part(self, path, tmp_path):
        """Of a file that nests dicts, if the format can; what is not there is an error in any."""
        with pytest.raises(CheckpointError, match="part"):
            self.format.read(path, "model")
        if self.has_parts:
            nested = str(tmp_path / "nested")
            self.save({"model": TENSORS, "epoch": 3}, nested)
            checkpoint = self.format.read(nested, "model")
            assert (checkpoint.part, set(checkpoint.names)) == ("model", set(TENSORS))
            self.check_equal(dict(self.format.reference_tensors(nested, list(TENSORS), "model")))

    def test_a_truncated_file_is_an_error_of_ours(self, path):
        size = os.path.getsize(path)
        for left in [*range(0, size, math.ceil(size / 40)), size - 1]:
            os.truncate(path, left)
            with pytest.raises(CheckpointError):
                self.format.read(path, None)
            self.save(TENSORS, path)

    def test_a_damaged_file_is_an_error_of_ours_or_still_opens(self, path):
        data, rng, said = Path(path).read_bytes(), random.Random(5), []
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(3):
                damaged[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
            Path(path).write_bytes(damaged)
            try:
                self.format.read(path, None)
            except CheckpointError as error:
                said.append(str(error))
        assert said
        assert all(path in message for message in said)

    def test_a_file_that_is_not_there(self, path):
        os.unlink(path)
        with pytest.raises(FileNotFoundError):
            self.format.read(path, None)

    @staticmethod
    def check_equal(tensors):
        assert set(tensors) == set(TENSORS)
        for name, tensor in tensors.items():
            assert same_bits(tensor, TENSORS[name])


class TestSafetensors(CheckpointFormatContract):
    format = SafetensorsFormat()
    has_parts = False

    def save(self, tensors, path):
        save_file(tensors, path)


class TestTorchZip(CheckpointFormatContract):
    format = TorchZipFormat()

    def save(self, tensors, path):
        torch.save(tensors, path)


class TestTorchPickle(CheckpointFormatContract):
    format = TorchPickleFormat()

    def save(self, tensors, path):
        torch.save(tensors, path, _use_new_zipfile_serialization=False)


class TestGguf(CheckpointFormatContract):
    format = GgufFormat()
    has_parts = False

    def save(self, tensors, path):
        Path(path).write_bytes(gguf_bytes({name: plain(tensor) for name, tensor in tensors.items()}))


def test_the_formats_tell_each_other_s_files_apart(tmp_path):
    for contract in (TestSafetensors(), TestTorchZip(), TestTorchPickle(), TestGguf()):
        contract.save(TENSORS, tmp_path / contract.format.name)
    for known in FORMATS:
        judged = {path.name: known.likeness(read_head(str(path))) for path in tmp_path.iterdir()}
        assert {name for name, likeness in judged.items() if likeness} == {known.name}


def test_an_archive_that_cannot_be_planned_is_for_torch_to_load(tmp_path):
    torch.save({"w": torch.arange(4.0).to_sparse(), "v": torch.ones(2)}, tmp_path / "sparse")
    with pytest.raises(CheckpointError, match="sparse"):
        open_checkpoint(tmp_path / "sparse")
    torch.save({"w": torch.nn.Parameter(torch.arange(4.0))}, tmp_path / "first")
    torch.save({"v": torch.ones(2)}, tmp_path / "second", _use_new_zipfile_serialization=False)
    both = open_checkpoint([tmp_path / "first", tmp_path / "second"])
    assert both.format == "torch-pickle", "what torch.load has to read of some, it reads of all"
    assert not is_planned(both)
