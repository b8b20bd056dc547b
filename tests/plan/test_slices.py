"""Slices as facts: the view that torch's own indexing gives, in a storage that holds its bytes and no others."""

import math

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from wan_loader.errors import KeyMismatchError, OptionError  # noqa: E402
from wan_loader.formats.checkpoint_facts import (  # noqa: E402
    Checkpoint,
    FileFacts,
    StorageFacts,
    TensorFacts,
    contiguous_strides,
)
from wan_loader.plan.blocks import Transport, plan_blocks  # noqa: E402
from wan_loader.plan.facts import Facts  # noqa: E402
from wan_loader.plan.plan import make_plan  # noqa: E402
from wan_loader.plan.request import LoadRequest  # noqa: E402
from wan_loader.plan.slices import alone, narrow, view  # noqa: E402
from wan_loader.system.page_cache import Knowledge, Residency  # noqa: E402

BOUND = st.none() | st.integers(-9, 9)
DIM = st.builds(slice, BOUND, BOUND, st.none() | st.integers(1, 4))


def facts_of(tensor, name="x", storage=0):
    return TensorFacts(
        name,
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        storage,
        tuple(tensor.stride()),
        tensor.storage_offset(),
    )


@st.composite
def tensors(draw):
    """A tensor somewhere in a storage, with strides of its own."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    before = draw(st.integers(0, 7))
    memory = torch.arange(before + math.prod(shape) + 3, dtype=torch.int32)
    tensor = memory[before : before + math.prod(shape)].view(shape)
    return tensor.permute(*draw(st.permutations(range(len(shape)))))


@settings(deadline=None, max_examples=300)
@given(tensors(), st.data())
def test_a_view_is_what_torch_gives_in_the_bytes_of_its_own(tensor, data):
    dims = data.draw(st.lists(DIM | st.integers(-6, 6), max_size=4))
    try:
        expected = tensor[tuple(dims)]
    except IndexError:
        with pytest.raises(IndexError):
            view(facts_of(tensor), dims)
        return
    storage, facts = alone(view(facts_of(tensor), dims), StorageFacts(2, 1000, tensor.untyped_storage().nbytes()), 5)
    assert (storage.file, facts.storage, facts.offset) == (2, 5, 0)
    start, count = (storage.start - 1000) // 4, storage.nbytes // 4
    memory = torch.arange(tensor.untyped_storage().nbytes() // 4, dtype=torch.int32)[start : start + count].clone()
    assert torch.equal(memory.as_strided(facts.shape, facts.stride), expected)
    if expected.numel():  # from the first element to the last
        assert (memory[0], memory[-1]) == (expected.min(), expected.max())
    else:
        assert storage.nbytes == 0


STORAGES = (StorageFacts(0, 100, 4 * 60),)


def checkpoint(*tensors, storages=STORAGES):
    return Checkpoint("m", "safetensors", (FileFacts("m", 400, 0, 0, 0, 0),), storages, tensors)


ROWS = TensorFacts("rows", "float32", (10, 6), 0, (6, 1))


@pytest.mark.parametrize(
    ("rows", "start", "end"),
    [
        (slice(2, 5), 2, 5),
        (slice(None), 0, 10),
        (slice(-3, None), 7, 10),
        (slice(8, 99), 8, 10),
        (slice(-99, 1), 0, 1),
        (slice(5, 2), 0, 0),
        (slice(20, 30), 0, 0),
    ],
)
def test_rows_are_planned_as_their_bytes_and_no_others(rows, start, end):
    request = LoadRequest(source="m", names=("rows",), slices={"rows": rows}, io="buffered")
    plan = make_plan(request, narrow(checkpoint(ROWS), request.slices), Facts(memory_limit=1 << 30))
    assert [(b.start, b.end) for b in plan.blocks] == ([(100 + 24 * start, 100 + 24 * end)] if end > start else [])
    (facts,) = plan.tensors
    assert (facts.shape, facts.stride) == ((end - start, 6), (6, 1))
    assert plan.nbytes_loaded == 24 * (end - start)
    assert "load 1 tensor (1 in part), " in str(plan)


def test_what_shares_a_storage_with_a_slice_keeps_all_of_it():
    other = ROWS._replace(name="other", shape=(60,), stride=(1,))
    narrowed = narrow(checkpoint(ROWS, other), {"rows": (slice(2, 5),)})
    assert narrowed.storages == (StorageFacts(0, 100, 240), StorageFacts(0, 148, 72))
    assert narrowed.tensors == (ROWS._replace(shape=(3, 6), storage=1), other)
    layout = make_plan(LoadRequest(source="m", io="buffered"), narrowed, Facts(memory_limit=1 << 30)).layout
    planned = plan_blocks(layout.byte_ranges, block_bytes=1 << 20, transport=lambda *_: None)
    assert [(s.storage, s.file_start, s.nbytes) for block in planned for s in block.segments] == [
        (0, 148, 72),
        (1, 100, 240),
    ]


def test_nothing_is_sliced_where_nothing_is_known_of_positions():
    held = Checkpoint("m", "torch-pickle", (), (StorageFacts(0, 0, 240),), (ROWS,))
    assert narrow(held, {"rows": (slice(2, 5),)}) is held
    with pytest.raises(OptionError, match="rows"):
        narrow(held, {"rows": (slice(2), slice(2), slice(2))})


def test_mistakes_name_the_tensor():
    held = checkpoint(ROWS, ROWS._replace(name="number", shape=(), stride=()))
    with pytest.raises(OptionError, match=r"slices\['number'\]: too many indices for a tensor of 0 dim") as caught:
        narrow(held, {"number": (slice(None),)})
    assert caught.value.tensor == "number"
    with pytest.raises(KeyMismatchError, match="lacks 2 of the names in slices") as caught:
        narrow(held, {"rows": (slice(2),), "b": (slice(2),), "a": (slice(2),)})
    assert set(caught.value.missing) == {"a", "b"}
    with pytest.raises(OptionError, match="flip"):
        view(ROWS, (slice(None, None, -1),))


def test_a_plan_of_what_may_be_let_go_needs_room_for_the_largest_alone():
    storages = tuple(StorageFacts(0, start, 1 << 30) for start in (0, 1 << 30, 2 << 30))
    held = checkpoint(
        *(TensorFacts(f"t{i}", "uint8", (1 << 30,), i, contiguous_strides((1 << 30,))) for i in range(3)),
        storages=storages,
    )
    facts = Facts(memory_limit=8 << 30, host_free=2 << 30)
    with pytest.raises(MemoryError):
        make_plan(LoadRequest(source="m", io="buffered"), held, facts)
    assert make_plan(LoadRequest(source="m", io="buffered", piecemeal=True), held, facts).batch
    gpu = Facts(memory_limit=8 << 30, device="cuda:0", device_free=2 << 30)
    make_plan(LoadRequest(source="m", io="buffered", piecemeal=True), held, gpu)
    with pytest.raises(MemoryError):
        make_plan(LoadRequest(source="m", io="buffered"), held, gpu)


def test_a_plan_of_what_is_awaited_one_by_one_has_small_blocks_and_maps_nothing_for_a_gpu():
    storages = tuple(StorageFacts(0, start << 25, 1 << 25) for start in range(64))
    shape = (1 << 25,)
    held = checkpoint(
        *(TensorFacts(f"t{i}", "uint8", shape, i, (1,)) for i in range(64)),
        storages=storages,
    )
    on_cpu = Facts(memory_limit=32 << 30)
    assert make_plan(LoadRequest(source="m", io="buffered"), held, on_cpu).blocks.nbytes == 32 << 20
    assert make_plan(LoadRequest(source="m", io="buffered", piecemeal=True), held, on_cpu).blocks.nbytes == 4 << 20
    some = LoadRequest(source="m", io="buffered", piecemeal=True, names=("t1",))
    assert make_plan(some, held, on_cpu).blocks.nbytes == 1 << 20
    window = (0, 0, 64 << 25, 64 << 25)
    gpu = Facts(memory_limit=32 << 30, device="cuda:0", processors=2, residency=Residency((window,), Knowledge.EXACT))
    transports = {
        piecemeal: {b.transport for b in make_plan(LoadRequest(source="m", piecemeal=piecemeal), held, gpu).blocks}
        for piecemeal in (False, True)
    }
    assert transports == {False: {Transport.MAPPED}, True: {Transport.BUFFERED}}
