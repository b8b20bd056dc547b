"""Many draws are jumped over, and the generator is in the state that drawing would have brought it to."""

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from wan_loader.fastpath.deferral.mt19937 import MIN_DRAWS, advance  # noqa: E402

BLOCK = 624


def generator(seed, n_used=0):
    made = torch.Generator().manual_seed(seed)
    torch.empty(n_used).uniform_(generator=made)
    return made


def state(generator):
    return generator.get_state().numpy().tobytes()


def check(seed, n_used, n_draws):
    drawn = generator(seed, n_used)
    before = state(drawn)
    torch.empty(n_draws).uniform_(generator=drawn)
    assert advance(before, n_draws) == state(drawn)


@given(st.integers(0, 2**64 - 1), st.integers(0, 3 * BLOCK), st.integers(MIN_DRAWS, 200_000))
@settings(max_examples=30, deadline=None)
def test_the_state_after_many_draws(seed, n_used, n_draws):
    check(seed, n_used, n_draws)


@pytest.mark.parametrize("n_used", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
@pytest.mark.parametrize("n_draws", [BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 19937 + BLOCK, 1 << 20])
def test_at_the_borders_of_blocks(n_used, n_draws):
    check(5, n_used, n_draws)


def test_jumps_add_up():
    """What nobody can draw in a test: two ways to one place."""
    at_once = advance(state(generator(11, 7)), 11_400_000_000)
    in_steps = state(generator(11, 7))
    for n_draws in (1 << 33, 1_400_000_000, 1_410_065_408):
        in_steps = advance(in_steps, n_draws)
    assert at_once == in_steps


def test_what_normal_keeps_for_its_next_call_stays():
    drawn = generator(3)
    torch.empty((), dtype=torch.float64).normal_(generator=drawn)
    before = state(drawn)
    torch.empty(5000).uniform_(generator=drawn)
    assert advance(before, 5000) == state(drawn)
    assert before[-40:] != bytes(40)


def test_another_layout_is_refused():
    with pytest.raises(ValueError, match="4096 bytes instead of 5056"):
        advance(bytes(4096), 5000)
