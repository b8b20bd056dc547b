"""The judgement of written pages. Pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_loader.provenance.proof import pages_to_compare

CASES = {
    "nothing written": (10, 95, [], []),
    "elsewhere": (10, 95, [(100, 200), (-20, 10)], []),
    "the whole pages": (10, 30, [(10, 20)], None),
    "the last whole page": (10, 30, [(20, 30)], None),
    "shared at the beginning": (12, 40, [(10, 20)], [10]),
    "shared at the end": (10, 42, [(40, 50)], [40]),
    "shared at both": (12, 42, [(10, 20), (40, 50)], [10, 40]),
    "a run from before": (12, 42, [(0, 20)], [10]),
    "a run that goes on into a whole page": (12, 42, [(0, 30)], None),
    "a run to beyond": (12, 42, [(40, 90)], [40]),
    "a run over everything": (12, 42, [(0, 90)], None),
    "right before and right behind": (10, 30, [(0, 10), (30, 40)], []),
    "within one page": (12, 15, [(10, 20)], [10]),
    "over a border": (19, 21, [(0, 90)], [10, 20]),
    "one page, all of it": (10, 20, [(0, 90)], None),
    "many runs": (32, 48, [(0, 10), (20, 30), (40, 50), (60, 70)], [40]),
}


@pytest.mark.parametrize(("start", "end", "written", "expected"), CASES.values(), ids=CASES.keys())
def test_pages_to_compare(start, end, written, expected):
    assert pages_to_compare(start, end, sorted(written), 10) == expected


@given(st.integers(0, 90), st.integers(1, 60), st.sets(st.integers(0, 16)))
def test_the_same_as_page_by_page(start, nbytes, written):
    end, runs = start + nbytes, [(10 * page, 10 * page + 10) for page in sorted(written)]
    touched = [10 * page for page in sorted(written) if 10 * page < end and 10 * page + 10 > start]
    whole = [page for page in touched if start <= page and page + 10 <= end]
    assert pages_to_compare(start, end, runs, 10) == (None if whole else touched)
