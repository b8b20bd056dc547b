"""Decisions: ways, threads, sizes, from the plan and the machine."""

import pytest

from wan_loader.errors import HostMemoryError
from wan_loader.plan.blocks import Transport
from wan_loader.plan.engine_settings import (
    MAX_READS,
    MAX_RING_BYTES,
    MIN_BLOCK_BYTES,
    TransferMode,
    block_bytes,
    engine_settings,
    prefers_mapping,
)
from wan_loader.plan.transport import TransportRule
from wan_loader.system.page_cache import Residency

MiB = 1 << 20
GiB = 1 << 30


def settings(*transports, io="auto", threads=None, memory=64 * GiB, processors=16, cuda=True, **options):
    return engine_settings(
        set(transports), io=io, threads=threads, memory_limit=memory, processors=processors, cuda=cuda, **options
    )


@pytest.mark.parametrize(
    ("share", "processors", "direct", "transport"),
    [
        (1.0, 4, True, Transport.MAPPED),
        (1.0, 16, True, Transport.BUFFERED),
        (0.6, 4, True, Transport.BUFFERED),
        (0.0, 16, True, Transport.DIRECT),
        (0.0, 16, False, Transport.BUFFERED),
    ],
)
def test_auto_goes_by_residency_and_processors(share, processors, direct, transport):
    may_map = prefers_mapping(processors)
    residency = Residency(((0, 0, MiB, int(share * MiB)),))
    rule = TransportRule(io="auto", may_map=may_map, residency=residency, direct_refused=() if direct else (0,))
    assert rule(0, 0, MiB) is transport


def test_what_is_asked_for_is_done():
    for io, transport in (("mapped", Transport.MAPPED), ("direct", Transport.DIRECT), ("buffered", Transport.BUFFERED)):
        rule = TransportRule(io=io, may_map=False, residency=Residency())
        assert rule(0, 0, MiB) is transport


def test_slots_fit_what_they_are_for():
    cached = settings(Transport.BUFFERED)
    assert cached.slot_bytes * cached.n_slots <= 120 * MiB, "stays in the processor's cache"
    assert cached.slot_bytes * cached.n_together >= 16 * MiB, "as fast as large copies"
    assert cached.n_together * 2 <= cached.n_slots - cached.threads, "some are copied while others are waited for"
    disk = settings(Transport.DIRECT)
    assert disk.n_together == 1, "nothing waits for a disk"
    assert disk.slot_bytes * disk.threads >= 192 * MiB, "much is asked for at once"
    assert settings(Transport.BUFFERED, Transport.DIRECT) == disk
    assert settings(Transport.BUFFERED, cold=True) == disk, "where O_DIRECT is refused"
    assert settings(Transport.MAPPED).slot_bytes == settings(Transport.MAPPED, cold=True).slot_bytes == 8 * MiB
    assert settings(Transport.BUFFERED, cuda=False).slot_bytes == 16 * MiB
    assert settings(Transport.DIRECT, block_bytes=8 * MiB).slot_bytes == 8 * MiB
    assert settings(Transport.BUFFERED, slot_bytes=3 * MiB).slot_bytes == 3 * MiB


@pytest.mark.parametrize(
    ("processors", "sharers", "each"),
    [(16, 1, 10), (2, 1, 10), (16, 2, 5), (32, 2, 8), (64, 4, 8), (8, 8, 1), (4, 16, 1)],
)
def test_processes_share_what_there_is(processors, sharers, each):
    assert settings(Transport.BUFFERED, processors=processors, sharers=sharers).threads == each
    assert abs(settings(Transport.DIRECT, processors=processors, sharers=sharers).threads - each) <= 2


def test_no_load_reads_more_at_once_than_is_got_ready():
    for transports in (
        [Transport.BUFFERED],
        [Transport.DIRECT],
        [Transport.MAPPED],
        [Transport.MAPPED, Transport.DIRECT],
        [],
    ):
        for cuda in (True, False):
            assert settings(*transports, cuda=cuda).threads <= MAX_READS


def test_only_mapped_windows_are_stolen_and_only_for_the_gpu():
    assert settings(Transport.MAPPED).mode is TransferMode.SHARED
    assert settings(Transport.MAPPED, cuda=False).mode is not TransferMode.SHARED
    assert settings(Transport.MAPPED, Transport.DIRECT).mode is TransferMode.STAGED


def test_mapping_that_was_asked_for_is_alone():
    assert settings(Transport.MAPPED, io="mapped", resident=True).mode is TransferMode.MAPPED_HERE
    assert settings(Transport.MAPPED, io="mapped").mode is TransferMode.STAGED, "Ctrl-C must not wait for a disk"
    assert settings(Transport.MAPPED, resident=True).mode is TransferMode.SHARED
    assert settings(Transport.MAPPED, Transport.DIRECT, io="mapped", resident=True).mode is TransferMode.STAGED, (
        "the ring must not wait for it"
    )
    assert settings(Transport.MAPPED, io="mapped").threads == 8, "for what cannot be mapped"


def test_bytes_are_read_to_their_place_where_that_is_allowed():
    assert settings(Transport.BUFFERED, cuda=False, reads_in_place=True).mode is TransferMode.IN_PLACE
    assert settings(Transport.BUFFERED, cuda=False).mode is TransferMode.STAGED


def test_the_driver_faults_in_what_is_there():
    assert not settings(Transport.MAPPED, resident=True).faults_in
    assert settings(Transport.MAPPED).faults_in, "a disk must bring some"
    assert settings(Transport.MAPPED, resident=True, cuda=False).faults_in, (
        "a page that cannot be read must be no signal"
    )


@pytest.mark.parametrize("memory", [128 * MiB, 300 * MiB, 64 * GiB])
@pytest.mark.parametrize("threads", [None, 1, 64])
@pytest.mark.parametrize("transport", list(Transport))
def test_the_ring_is_bounded(transport, threads, memory):
    chosen = settings(transport, threads=threads, memory=memory)
    assert chosen.slot_bytes * chosen.n_slots <= min(MAX_RING_BYTES, memory // 4)
    assert 1 <= chosen.threads <= chosen.n_slots


def test_too_little_memory_is_said():
    with pytest.raises(HostMemoryError) as caught:
        settings(Transport.DIRECT, memory=40 * MiB)
    assert caught.value.remedy == "allow more memory"


def test_blocks_grow_with_the_load():
    sizes = [block_bytes(nbytes) for nbytes in (1, 100 * MiB, 2 * GiB, 100 * GiB)]
    assert sizes == sorted(sizes)
    assert sizes[0] == MIN_BLOCK_BYTES
    assert all(size % MIN_BLOCK_BYTES == 0 for size in sizes)
    assert block_bytes(1, 16 * MiB) == 16 * MiB
