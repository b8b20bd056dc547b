"""Fewer cases than the full product of several lists, of which each two values still meet."""

import itertools


def pairwise(*axes):
    """Rows with one value of each axis, such that every pair of values of two axes is in one of them."""
    rows, places = [], [range(len(axis)) for axis in axes]
    open_pairs = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a, b in itertools.product(places[i], places[j])
    }
    candidates = list(itertools.product(*places))
    while open_pairs:
        row = max(candidates, key=lambda row: len(open_pairs.intersection(itertools.combinations(enumerate(row), 2))))
        open_pairs.difference_update(itertools.combinations(enumerate(row), 2))
        rows.append(tuple(axis[place] for axis, place in zip(axes, row, strict=True)))
    return rows
