"""The plan, as properties: every wanted byte exactly once, in order, in whole blocks; and planning costs nothing."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_loader.errors import OptionError
from wan_loader.plan.blocks import MAX_GAP, Block, ByteRange, Segment, Transport, apart, plan_blocks, split
from wan_loader.system.posix import PAGE

WAYS = list(Transport)
quick = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def some_way(file, start, end):
    """Different from block to block, and a pure function of what was asked."""
    return WAYS[(file + start // 7 + end) % len(WAYS)]


@st.composite
def byte_ranges(draw, itemsizes=(1, 2, 4, 8, 16), max_items=12):
    """Byte ranges of a few files: neighbours, small and large gaps, jumps backwards, empty ones, any alignment."""
    out = []
    position = {}
    for storage in range(draw(st.integers(0, max_items))):
        file = draw(st.integers(0, 2)) if draw(st.booleans()) else (out[-1].file if out else 0)
        gaps = st.one_of(
            st.just(0),
            st.integers(1, 200),
            st.integers(MAX_GAP - 1, MAX_GAP + 1),
            st.integers(PAGE, 40 * PAGE),
        )
        start = position.get(file, draw(st.integers(0, 3 * PAGE))) + draw(gaps)
        itemsize = draw(st.sampled_from(itemsizes))
        count = draw(st.one_of(st.integers(0, 20), st.integers(0, 40 * PAGE // itemsize)))
        out.append(ByteRange(storage, file, start, start + count * itemsize, itemsize))
        position[file] = start + count * itemsize
    if draw(st.booleans()):
        out = draw(st.permutations(out))
    return out


block_sizes = st.sampled_from([PAGE, 2 * PAGE, 3 * PAGE, 16 * PAGE, 256 * PAGE])


def pieces_of(blocks):
    return [segment for block in blocks for segment in block.segments]


def check_every_byte_once_and_in_order(wanted, blocks):
    """Put together again, the segments are exactly the wanted byte ranges in their order."""
    joined = []
    for block in blocks:
        for segment in block.segments:
            last = joined[-1] if joined else None
            if last and last[0] == segment.storage and last[3] == segment.file_start and segment.storage_start:
                assert last[1] == block.file
                assert segment.storage_start == last[3] - last[2]
                last[3] = segment.file_end
            else:
                assert segment.storage_start == 0
                joined.append([segment.storage, block.file, segment.file_start, segment.file_end])
    assert joined == [[e.storage, e.file, e.start, e.end] for e in wanted if e.start < e.end]


def check_blocks_hold_their_pieces(blocks):
    for block in blocks:
        assert block.segments
        assert block.start == block.segments[0].file_start
        assert block.end == block.segments[-1].file_end
        assert block.nbytes == block.end - block.start > 0
        for before, after in zip(block.segments, block.segments[1:], strict=False):
            assert 0 <= after.file_start - before.file_end <= MAX_GAP
        assert all(segment.nbytes > 0 for segment in block.segments)


def check_sizes_and_borders(wanted, blocks, block_bytes):
    """Blocks end at multiples of the block size, moved by less than an element where a converted one straddles."""
    by_storage = {e.storage: e for e in wanted}
    for block in blocks:
        largest = max(segment.itemsize for segment in block.segments)
        assert block.nbytes <= block_bytes + largest - 1
        if largest == 1:
            assert block.start // block_bytes == (block.end - 1) // block_bytes
    for segment in pieces_of(blocks):
        byte_range = by_storage[segment.storage]
        assert segment.itemsize == byte_range.itemsize
        assert segment.nbytes % segment.itemsize == 0
        assert (segment.file_start - byte_range.start) % segment.itemsize == 0
        if segment.storage_start:  # the border lies inside a byte range
            to_border = -segment.file_start % block_bytes
            assert to_border < segment.itemsize


def planned(wanted, **options):
    return tuple(plan_blocks(wanted, **options))


def nbytes_of(blocks):
    return sum(segment.nbytes for segment in pieces_of(blocks))


@quick
@given(wanted=byte_ranges(), block_bytes=block_sizes)
def test_every_wanted_byte_is_in_exactly_one_piece_in_order(wanted, block_bytes):
    blocks = planned(wanted, block_bytes=block_bytes, transport=some_way)
    check_every_byte_once_and_in_order(wanted, blocks)
    check_blocks_hold_their_pieces(blocks)
    assert nbytes_of(blocks) == sum(e.end - e.start for e in wanted)


@quick
@given(wanted=byte_ranges(), block_bytes=block_sizes)
def test_blocks_are_cut_at_multiples_of_the_block_size_and_between_elements(wanted, block_bytes):
    blocks = planned(wanted, block_bytes=block_bytes, transport=some_way)
    check_sizes_and_borders(wanted, blocks, block_bytes)


@quick
@given(wanted=byte_ranges(itemsizes=(1,)), block_bytes=block_sizes)
def test_unconverted_blocks_are_whole_and_share_no_page(wanted, block_bytes):
    """Inside a run, one block for each multiple of the block size, never longer, and no page is touched twice."""
    blocks = planned(wanted, block_bytes=block_bytes, transport=some_way)
    assert all(block.nbytes <= block_bytes for block in blocks)
    for before, after in itertools.pairwise(blocks):
        if before.file == after.file and 0 <= after.start - before.end <= MAX_GAP:
            assert before.start // block_bytes != after.start // block_bytes
            assert before.page_end <= after.page_start
    for block in blocks:
        assert block.page_start % PAGE == block.page_end % PAGE == 0
        assert block.start - block.page_start < PAGE > block.page_end - block.end
        assert block.page_start <= block.start < block.end <= block.page_end


@quick
@given(wanted=byte_ranges(), block_bytes=block_sizes)
def test_each_block_takes_the_way_that_was_said(wanted, block_bytes):
    asked = []

    def transport(file, start, end):
        asked.append((file, start, end))
        return some_way(file, start, end)

    blocks = planned(wanted, block_bytes=block_bytes, transport=transport)
    assert asked == [(b.file, b.start, b.end) for b in blocks]
    assert [b.transport for b in blocks] == [some_way(*question) for question in asked]


@quick
@given(wanted=byte_ranges(), block_bytes=block_sizes, smaller=block_sizes)
def test_split_keeps_every_byte_the_order_and_the_way(wanted, block_bytes, smaller):
    blocks = planned(wanted, block_bytes=block_bytes, transport=some_way)
    parts = []
    for block in blocks:
        inside = list(split(block, smaller))
        assert all((part.transport, part.file) == (block.transport, block.file) for part in inside)
        assert (inside[0].start, inside[-1].end) == (block.start, block.end)
        parts += inside
    check_every_byte_once_and_in_order(wanted, parts)
    check_blocks_hold_their_pieces(parts)
    if block_bytes % smaller == 0:
        check_sizes_and_borders(wanted, parts, smaller)


@quick
@given(wanted=byte_ranges(), block_bytes=block_sizes, large=block_sizes)
def test_large_pieces_stand_alone(wanted, block_bytes, large):
    parts = []
    for block in planned(wanted, block_bytes=block_bytes, transport=some_way):
        inside = list(apart(block, large))
        assert all((part.transport, part.file) == (block.transport, block.file) for part in inside)
        assert all(len(part.segments) == 1 for part in inside for segment in part.segments if segment.nbytes >= large)
        assert all(
            a.segments[-1].nbytes >= large or b.segments[0].nbytes >= large for a, b in itertools.pairwise(inside)
        )
        parts += inside
    check_every_byte_once_and_in_order(wanted, parts)
    check_blocks_hold_their_pieces(parts)


@quick
@given(wanted=byte_ranges(), block_bytes=block_sizes)
def test_splitting_again_changes_nothing(wanted, block_bytes):
    for block in planned(wanted, block_bytes=block_bytes, transport=some_way):
        assert list(split(block, 1 << 40)) == [block]
        once = list(split(block, PAGE))
        assert [part for again in once for part in split(again, PAGE)] == once


def ranges_of(blocks):
    return [(b.file, b.start, b.end) for b in blocks]


@pytest.mark.parametrize(
    ("gap", "joined"), [(0, True), (1, True), (MAX_GAP, True), (MAX_GAP + 1, False), (-200, False)]
)
def test_small_gaps_are_read_through(gap, joined):
    wanted = [ByteRange(0, 0, 1000, 1100), ByteRange(1, 0, 1100 + gap, 1150 + gap)]
    blocks = planned(wanted, block_bytes=1 << 20, transport=some_way)
    assert ranges_of(blocks) == ([(0, 1000, 1150 + gap)] if joined else [(0, 1000, 1100), (0, 1100 + gap, 1150 + gap)])
    assert nbytes_of(blocks) == 150


def test_files_are_never_joined():
    wanted = [ByteRange(0, 0, 0, 100), ByteRange(1, 1, 100, 200), ByteRange(2, 0, 100, 200)]
    blocks = planned(wanted, block_bytes=PAGE, transport=some_way)
    assert ranges_of(blocks) == [(0, 0, 100), (1, 100, 200), (0, 100, 200)]


def test_nothing_wanted():
    for wanted in ([], [ByteRange(0, 0, 5, 5)]):
        blocks = planned(wanted, block_bytes=PAGE, transport=some_way)
        assert (blocks, nbytes_of(blocks)) == ((), 0)


def test_empty_extents_do_not_break_a_run():
    wanted = [ByteRange(0, 0, 0, 50), ByteRange(1, 0, 50, 50), ByteRange(2, 0, 50, 100)]
    (block,) = planned(wanted, block_bytes=PAGE, transport=some_way)
    assert [segment.storage for segment in block.segments] == [0, 2]


def test_a_converted_element_that_straddles_a_border_moves_it():
    (first, second) = planned([ByteRange(0, 0, 2, 2 + 2 * PAGE, 4)], block_bytes=PAGE, transport=some_way)[:2]
    assert (first.start, first.end) == (2, PAGE - 2)
    assert second.segments == (Segment(0, PAGE - 4, PAGE - 2, PAGE, 4),)


def test_an_unconverted_element_does_not_move_it():
    first = planned([ByteRange(0, 0, 2, 2 + 2 * PAGE)], block_bytes=PAGE, transport=some_way)[0]
    assert first == Block(some_way(0, 2, PAGE), 0, 2, PAGE, (Segment(0, 0, 2, PAGE - 2),))


@pytest.mark.parametrize("block_bytes", [0, -PAGE, 1, PAGE - 1, PAGE + 1])
def test_a_block_size_that_is_no_multiple_of_a_page(block_bytes):
    with pytest.raises(OptionError, match=str(block_bytes)):
        planned([], block_bytes=block_bytes, transport=some_way)


def test_the_order_asked_for_is_kept_even_against_the_file():
    wanted = [ByteRange(i, 0, start, start + 100) for i, start in enumerate((900, 500, 100, 300, 0))]
    blocks = planned(wanted, block_bytes=PAGE, transport=some_way)
    assert [segment.storage for segment in pieces_of(blocks)] == [0, 1, 2, 3, 4]


def test_planning_the_whole_model_costs_less_than_50_ms():
    """126 GB in 2,626 tensors and 14 files; as many again for a load that converts."""
    n_tensors, n_files, nbytes = 2626, 14, 126_000_000_000
    size = nbytes // n_tensors // 4 * 4
    for itemsize in (1, 4):
        wanted = []
        for i in range(n_tensors):
            file, place = i * n_files // n_tensors, i % (n_tensors // n_files + 1)
            start = 40_002 + place * size
            wanted.append(ByteRange(i, file, start, start + size, itemsize))
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            blocks = planned(wanted, block_bytes=64 << 20, transport=lambda file, start, end: Transport.DIRECT)
            seconds.append(time.perf_counter() - begin)
        assert nbytes_of(blocks) == size * n_tensors
        assert len(blocks) > nbytes // (64 << 20)
        assert min(seconds) < 0.05
