"""Who reads what: rows, byte ranges and exchanges, for any sizes and any number of processes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_loader.distributed.sharding import SMALL_BYTES, TensorSharding, borders, divide, exchanges, rows
from wan_loader.formats.checkpoint_facts import Checkpoint, FileFacts, StorageFacts, TensorFacts, contiguous_strides

torch = pytest.importorskip("torch")

ALL = (0, 1, 2)
SIZES = st.lists(st.one_of(st.integers(0, 9000), st.integers(SMALL_BYTES - 8, 3 * SMALL_BYTES)), max_size=8)


def checkpoint(*tensors):
    """float32 tensors one after the other: (name, shape) each."""
    facts, storages, position = [], [], 100
    for name, shape in tensors:
        tensor = TensorFacts(name, "float32", shape, len(storages), contiguous_strides(shape))
        facts.append(tensor)
        storages.append(StorageFacts(0, position, tensor.nbytes))
        position += tensor.nbytes
    files = (FileFacts("a.safetensors", position, 0, 0, 0, 0),)
    return Checkpoint("a.safetensors", "safetensors", files, tuple(storages), tuple(facts))


@given(st.integers(0, 50), st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(n_rows, n_blocks):
    got = [rows(n_rows, n_blocks, block) for block in range(n_blocks)]
    chunks = [len(chunk) for chunk in torch.arange(n_rows).chunk(n_blocks)] if n_rows else []
    assert [last - first for first, last in got] == chunks + [0] * (n_blocks - len(chunks))
    assert [row for first, last in got for row in range(first, last)] == [*range(n_rows)]


@given(SIZES, st.integers(2, 9), st.sampled_from([1, 2, 4, 16]))
def test_every_byte_is_read_by_one_holder(sizes, n, itemsize):
    sizes = [size // itemsize * itemsize for size in sizes]
    ends = borders(sizes, [itemsize] * len(sizes), n)
    for size, borders_of_one in zip(sizes, ends, strict=True):
        assert borders_of_one[0] == 0
        assert borders_of_one[-1] == size
        assert [*borders_of_one] == sorted(borders_of_one)
        assert all(end % itemsize == 0 for end in borders_of_one)
    read = [sum(b[i + 1] - b[i] for b in ends) for i in range(n)]
    assert max(read, default=0) - min(read, default=0) <= 2 * SMALL_BYTES + len(sizes) * itemsize * 256 * n


@settings(deadline=None, max_examples=20)
@given(SIZES, st.integers(2, 9), st.sampled_from([(2, 2), (4, 2), (2, 4), (1, 1)]))
def test_what_is_exchanged_is_what_a_holder_has_not_read(sizes, n, scale):
    """Simulated on marks instead of bytes: afterwards each holder has everybody's."""
    source, target = scale
    sizes = [size // source * source for size in sizes]
    parts = dict(enumerate(borders(sizes, [source] * len(sizes), n)))
    marks = [[torch.zeros(size // source * target, dtype=torch.uint8) for size in sizes] for _ in range(n)]
    for rank in range(n):
        for storage, ends in parts.items():
            marks[rank][storage][ends[rank] // source * target : ends[rank + 1] // source * target] = rank + 1
    unread = sum(int((flat == 0).sum()) for flat in marks[0])
    received = 0
    for what in exchanges([tuple(range(n))] * len(sizes), parts, dict.fromkeys(parts, scale)):
        received += what.nbytes_received(0)
        segments = [(g.storage, i * g.nbytes, (i + 1) * g.nbytes, i) for g in what.gathers for i in range(n)]
        chunks = [(c.storage, c.start, c.end, c.owner) for message in what.messages for c in message]
        for storage, start, end, owner in segments + chunks:
            for mine in marks:
                mine[storage][start:end] = marks[owner][storage][start:end]
    assert received == unread
    for flats in zip(*marks, strict=True):
        assert all(flat.all() and torch.equal(flat, flats[0]) for flat in flats)


def test_messages_are_bounded():
    sizes = [SMALL_BYTES - 4] * 2000  # half a gigabyte of small tensors
    parts = dict(enumerate(borders(sizes, [4] * len(sizes), 3)))
    (what,) = exchanges([ALL] * len(sizes), parts, dict.fromkeys(parts, (4, 4)))
    for message in what.messages:
        for owner in range(3):
            assert sum(c.end - c.start for c in message if c.owner == owner) <= (64 << 20) // 3
    assert len(what.messages) < 40


def test_divide_gives_each_process_its_rows():
    whole = checkpoint(("plain", (3, 5)), ("odd", (7, 2)), ("short", (1, 4)))
    ranges = {"odd": [], "short": []}
    for rank in ALL:
        shardings = {
            "plain": TensorSharding(ALL),
            "odd": TensorSharding((rank,), 3, rank),
            "short": TensorSharding((rank,), 3, rank),
        }
        mine = divide(whole, whole.tensors, shardings, rank)
        assert [t.name for t in mine.tensors] == ["plain", "odd", "short"]
        assert mine.holders == (ALL, (rank,), (rank,))
        assert mine.checkpoint.storages[mine.tensors[0].storage] == whole.storages[0]
        for tensor in mine.tensors[1:]:
            storage = mine.checkpoint.storages[tensor.storage]
            assert storage.nbytes == tensor.nbytes
            ranges[tensor.name].append((tensor.shape, storage.start, storage.start + storage.nbytes))
    start = whole.storages[1].start
    assert ranges["odd"] == [
        ((3, 2), start, start + 24),
        ((3, 2), start + 24, start + 48),
        ((1, 2), start + 48, start + 56),
    ]
    start = whole.storages[2].start
    assert ranges["short"] == [
        ((1, 4), start, start + 16),
        ((0, 4), start + 16, start + 16),
        ((0, 4), start + 16, start + 16),
    ]


def test_columns_are_read_whole_and_cut():
    facts = TensorFacts("turned", "float32", (6, 4), 0, (1, 6))
    whole = Checkpoint("a.pth", "torch-zip", (), (StorageFacts(0, 64, 96),), (facts,))
    mine = divide(whole, whole.tensors, {"turned": TensorSharding((1,), 3, 1)}, 1)
    assert mine.tensors == (facts,)
    assert mine.cuts == {"turned": (2, 4)}
    assert mine.holders == ((1,),)
    assert "not stored row by row" in mine.checkpoint.warnings[0]


def test_processes_of_a_machine_share_its_budgets():
    from wan_loader.plan.blocks import Transport
    from wan_loader.plan.engine_settings import MAX_RING_BYTES, engine_settings

    def shared(sharers, memory=1 << 40, processors=16):
        return engine_settings(
            {Transport.DIRECT},
            io="auto",
            threads=None,
            memory_limit=memory,
            processors=processors,
            cuda=True,
            sharers=sharers,
        )

    alone = shared(1)
    for sharers in (2, 4, 8):
        each = shared(sharers)
        assert each.threads * sharers <= alone.threads
        assert each.n_slots * each.slot_bytes * sharers <= MAX_RING_BYTES
        many = shared(sharers, processors=64)  # then half of them
        assert alone.threads < many.threads * sharers <= 32
        assert many.n_slots * many.slot_bytes * sharers <= MAX_RING_BYTES
    assert shared(64).threads == shared(64).n_slots == 1
    assert shared(8, memory=1 << 28).n_slots == 1
