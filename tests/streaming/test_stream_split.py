"""Which blocks stay, and which are registered: within the budget, as many as can be, evenly spread."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_loader.errors import DeviceMemoryError
from wan_loader.streaming.split import choose_kept, split_blocks, spread


def split(blocks, rest=0, *, buffers=3, scratch=0, budget=None):
    return split_blocks(blocks, rest, buffers=buffers, scratch=scratch, budget=budget, path="model.safetensors")


@given(st.integers(1, 60), st.data())
def test_chosen_numbers_are_spread_evenly(count, data):
    chosen = spread(count, data.draw(st.integers(0, count)))
    assert len(set(chosen)) == len(chosen)
    assert chosen == sorted(chosen)
    gaps = [b - a for a, b in itertools.pairwise([*chosen, count])]
    assert not chosen or (chosen[0] == 0 and max(gaps) - min(gaps) <= 1)


def test_without_a_budget_as_little_as_may_be_is_on_the_device():
    found = split([10] * 40, 5)
    assert found.streamed == tuple(range(40))
    assert (found.n_buffers, found.buffer_nbytes, found.nbytes) == (3, 10, 35)


def test_everything_stays_where_everything_fits():
    found = split([10] * 4, 5, budget=45, scratch=7)
    assert (found.streamed, found.n_buffers, found.nbytes) == ((), 0, 45)


def test_a_byte_less_and_some_blocks_are_streamed():
    found = split([10] * 8, 5, budget=84)
    assert len(found.streamed) == 4  # 5 + 4 resident + 3 buffers = 75; with one more it would be 85
    assert found.nbytes == 75
    assert found.streamed == (1, 3, 5, 7)


def test_blocks_of_other_sizes_share_buffers_that_fit_the_largest():
    found = split([10, 0, 30, 20], 1, buffers=2)
    assert found.streamed == (0, 2, 3)  # of the other there is nothing to stream
    assert (found.buffer_nbytes, found.nbytes) == (30, 61)


def test_there_are_no_more_buffers_than_blocks():
    assert split([10] * 2, buffers=3).n_buffers == 2


def test_a_budget_that_nothing_fits_is_an_error_with_the_smallest_that_does():
    with pytest.raises(DeviceMemoryError, match=r"takes 42 bytes .* 41 are allowed: allow 42 or more, or use fewer"):
        split([10] * 40, 5, scratch=7, budget=41)
    assert split([10] * 40, 5, scratch=7, budget=42).nbytes == 42


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 20), st.integers(1, 5), st.integers(0, 700))
def test_the_budget_is_kept_and_everything_is_somewhere(blocks, rest, buffers, budget):
    try:
        found = split(blocks, rest, buffers=buffers, budget=budget)
    except DeviceMemoryError:
        assert split(blocks, rest, buffers=buffers).nbytes > budget
        return
    assert found.nbytes <= budget
    resident = sum(nbytes for number, nbytes in enumerate(blocks) if number not in found.streamed)
    assert found.nbytes == rest + resident + found.n_buffers * found.buffer_nbytes


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 400))
def test_what_is_kept_fits_the_limit(nbytes, limit):
    kept = choose_kept(nbytes, limit)
    assert sum(nbytes[number] for number in kept) <= limit
    assert kept == set(range(len(nbytes))) if sum(nbytes) <= limit else 0 not in kept


def test_what_is_kept_is_as_much_as_fits_spread_evenly():
    assert choose_kept([10] * 6, 40) == {1, 2, 4, 5}
    assert choose_kept([10] * 6, 39) == {1, 3, 5}
    assert choose_kept([10] * 6, 9) == set()
