"""Copies to a device that follow each other go as one, but never beyond what was allocated at once."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from wan_loader.devices.cuda import join_copies

EVERYWHERE = (0, 1 << 40)


def test_neighbours_on_both_sides_become_one():
    copies = [(100, 7, 10), (110, 17, 5), (115, 22, 1)]
    assert list(join_copies(copies, lambda address: EVERYWHERE)) == [(100, 7, 16)]


def test_neighbours_on_one_side_do_not():
    for copies in ([(100, 7, 10), (110, 18, 5)], [(100, 7, 10), (112, 17, 5)], [(100, 7, 10), (90, 17, 10)]):
        assert list(join_copies(copies, lambda address: EVERYWHERE)) == copies


def test_nothing_goes_beyond_its_allocation():
    copies = [(90, 0, 10), (100, 10, 10), (110, 20, 10)]
    ends = {90: (0, 100), 100: (100, 200)}
    assert list(join_copies(copies, ends.__getitem__)) == [(90, 0, 10), (100, 10, 20)]


def test_where_the_driver_cannot_say_every_copy_stays_alone():
    copies = [(90, 0, 10), (100, 10, 10)]
    assert list(join_copies(copies, lambda address: (address, address))) == copies


def test_nothing():
    assert list(join_copies([], lambda address: EVERYWHERE)) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 2)), max_size=30), st.integers(1, 40))
def test_every_byte_comes_from_where_it_came(sizes, room):
    """Allocations of `room` bytes side by side."""
    copies, to, source = [], 0, 1000
    for nbytes, gap, skip in sizes:
        to, source = to + gap, source + skip
        nbytes = min(nbytes, room - to % room)  # a tensor lies in one allocation
        copies.append((to, source, nbytes))
        to, source = to + nbytes, source + nbytes
    made = list(join_copies(copies, lambda address: (address // room * room, address // room * room + room)))
    bytewise = [(t + i, s + i) for t, s, n in copies for i in range(n)]
    assert [(t + i, s + i) for t, s, n in made for i in range(n)] == bytewise
    assert all(t // room == (t + n - 1) // room for t, _, n in made)
    for (t, s, n), (u, v, _) in pairwise(made):
        assert (u, v) != (t + n, s + n) or u % room == 0, "could have been one"
