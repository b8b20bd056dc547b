"""Decisions: ways, threads, sizes, from the plan and the machine."""

import pytest

from wan_loader.errors import HostMemoryError
from wan_loader.plan.blocks import Way
from wan_loader.plan.limits import (
    MAX_LANES,
    MAX_STAGING_BYTES,
    MIN_BLOCK_BYTES,
    block_bytes,
    engine_settings,
    prefers_mapping,
)
from wan_loader.plan.transport import choose_way

MiB = 1 << 20
GiB = 1 << 30


class Residency:
    def __init__(self, share):
        self.share = lambda file, start, end: share


class Reader:
    def __init__(self, direct):
        self.open_direct = lambda file: direct


def settings(*ways, io="auto", threads=None, memory=64 * GiB, processors=16, cuda=True, **options):
    return engine_settings(
        set(ways), io=io, threads=threads, memory_limit=memory, processors=processors, cuda=cuda, **options
    )


@pytest.mark.parametrize(
    ("share", "processors", "direct", "way"),
    [
        (1.0, 4, True, Way.MAPPED),
        (1.0, 16, True, Way.BUFFERED),
        (0.6, 4, True, Way.BUFFERED),
        (0.0, 16, True, Way.DIRECT),
        (0.0, 16, False, Way.BUFFERED),
    ],
)
def test_auto_goes_by_residency_and_processors(share, processors, direct, way):
    may_map = prefers_mapping(processors)
    rule = choose_way("auto", may_map=may_map, reader=Reader(direct), residency=Residency(share))
    assert rule(0, 0, MiB) is way


def test_what_is_asked_for_is_done():
    for io, way in (("mapped", Way.MAPPED), ("direct", Way.DIRECT), ("buffered", Way.BUFFERED)):
        rule = choose_way(io, may_map=False, reader=Reader(True), residency=Residency(0.0))
        assert rule(0, 0, MiB) is way


def test_slots_fit_what_they_are_for():
    cached = settings(Way.BUFFERED)
    assert cached.slot_bytes * cached.n_slots <= 100 * MiB, "stays in the processor's cache"
    assert settings(Way.BUFFERED, converts=True).slot_bytes == 8 * MiB
    disk = settings(Way.DIRECT)
    assert disk.slot_bytes * disk.threads >= 192 * MiB, "much is asked for at once"
    assert settings(Way.BUFFERED, Way.DIRECT) == disk
    assert settings(Way.BUFFERED, cold=True) == disk, "where O_DIRECT is refused"
    assert settings(Way.MAPPED).slot_bytes == settings(Way.MAPPED, cold=True).slot_bytes == 8 * MiB
    assert settings(Way.BUFFERED, cuda=False).slot_bytes == 16 * MiB
    assert settings(Way.DIRECT, block_bytes=8 * MiB).slot_bytes == 8 * MiB
    assert settings(Way.BUFFERED, slot_bytes=3 * MiB).slot_bytes == 3 * MiB


@pytest.mark.parametrize(
    ("processors", "sharers", "each"),
    [(16, 1, 12), (2, 1, 12), (16, 2, 6), (32, 2, 8), (64, 4, 8), (8, 8, 1), (4, 16, 1)],
)
def test_processes_share_what_there_is(processors, sharers, each):
    assert settings(Way.BUFFERED, processors=processors, sharers=sharers).threads == each
    assert abs(settings(Way.DIRECT, processors=processors, sharers=sharers).threads - each) <= 2


def test_no_load_reads_more_at_once_than_is_got_ready():
    for ways in ([Way.BUFFERED], [Way.DIRECT], [Way.MAPPED], [Way.MAPPED, Way.DIRECT], []):
        for cuda in (True, False):
            assert settings(*ways, cuda=cuda).threads <= MAX_LANES


def test_only_mapped_windows_are_stolen_and_only_for_the_gpu():
    assert settings(Way.MAPPED).may_steal
    assert not settings(Way.MAPPED, cuda=False).may_steal
    assert not settings(Way.MAPPED, Way.DIRECT).may_steal


def test_mapping_that_was_asked_for_is_alone():
    assert settings(Way.MAPPED, io="mapped", resident=True).maps_here
    assert not settings(Way.MAPPED, io="mapped").may_steal
    assert not settings(Way.MAPPED, io="mapped").maps_here, "Ctrl-C must not wait for a disk"
    assert not settings(Way.MAPPED, resident=True).maps_here
    assert not settings(Way.MAPPED, Way.DIRECT, io="mapped", resident=True).maps_here, "staging must not wait for it"
    assert settings(Way.MAPPED, io="mapped").threads == 8, "for what cannot be mapped"


def test_the_driver_faults_in_what_is_there():
    assert not settings(Way.MAPPED, resident=True).faults_in
    assert settings(Way.MAPPED).faults_in, "a disk must bring some"
    assert settings(Way.MAPPED, resident=True, cuda=False).faults_in, "a page that cannot be read must be no signal"


@pytest.mark.parametrize("memory", [128 * MiB, 300 * MiB, 64 * GiB])
@pytest.mark.parametrize("threads", [None, 1, 64])
@pytest.mark.parametrize("way", list(Way))
def test_staging_is_bounded(way, threads, memory):
    chosen = settings(way, threads=threads, memory=memory)
    assert chosen.slot_bytes * chosen.n_slots <= min(MAX_STAGING_BYTES, memory // 4)
    assert 1 <= chosen.threads <= chosen.n_slots


def test_too_little_memory_is_said():
    with pytest.raises(HostMemoryError, match="allow more memory"):
        settings(Way.DIRECT, memory=40 * MiB)


def test_blocks_grow_with_the_load():
    sizes = [block_bytes(nbytes) for nbytes in (1, 100 * MiB, 2 * GiB, 100 * GiB)]
    assert sizes == sorted(sizes)
    assert sizes[0] == MIN_BLOCK_BYTES
    assert all(size % MIN_BLOCK_BYTES == 0 for size in sizes)
    assert block_bytes(1, 16 * MiB) == 16 * MiB
