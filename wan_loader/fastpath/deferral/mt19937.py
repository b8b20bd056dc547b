"""The state of torch's random generator of the CPU after many draws, without drawing.

The generator is MT19937. Each of its outputs is a sum over GF(2) of earlier ones. With p the characteristic polynomial
of that recurrence (degree 19937) and g = x^n mod p, the output n places later is the sum of those at the places of g's
terms. g depends on n alone and is kept; a jump then sums some 10,000 windows of outputs. Polynomials are integers whose
bit i is the coefficient of x^i.

Sources: Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998), appendix A (p); Haramoto, Matsumoto,
Nishimura, Panneton and L'Ecuyer, "Efficient Jump Ahead for F2-Linear Random Number Generators" (2008); torch's
`ATen/core/MT19937RNGEngine.h` and `ATen/CPUGeneratorImpl.cpp` (the state).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["MIN_DRAWS", "advance"]

#: Words of a state; all of them are made anew at once, so this is a block of draws, too.
_WORDS = 624
#: Fewer draws than a block are not jumped over.
MIN_DRAWS = _WORDS
_MIDDLE, _TWIST, _DEGREE = 397, 0x9908B0DF, 19937
#: How many bits a multiple of p, placed over the highest terms of a polynomial, clears at once: p's second term lies so
#: much lower than its first.
_GAP = _WORDS - _MIDDLE
#: Terms of a polynomial that are looked up together.
_DIGIT = 4
_N_DIGITS = -(-_DEGREE // _DIGIT)
#: Windows that are summed together, so that they stay in a processor's cache.
_PORTION = 256
#: A byte's lower and upper half with a zero after each bit: what squaring does to a polynomial over GF(2).
_SPREAD_LOW, _SPREAD_HIGH = (
    bytes(sum((byte >> shift + bit & 1) << 2 * bit for bit in range(4)) for byte in range(256)) for shift in (0, 4)
)

#: `CPUGeneratorImplState` of torch.
_LAYOUT = [
    ("seed", "<u8"),
    ("left", "<i4"),
    ("seeded", "<i4"),
    ("next", "<u8"),
    ("state", "<u8", _WORDS),
    ("normal", "V40"),  # what `normal_` keeps for its next call, with what C puts between
]


def advance(state: bytes, n_draws: int) -> bytes:
    """Return the state of a generator after draws of 32 bits each.

    Args:
        state: What `torch.Generator.get_state` says, as bytes.
        n_draws: How many draws; at least `MIN_DRAWS`.

    Returns:
        The same for `set_state`; the values that `normal_` keeps for its next call are as they were.

    Raises:
        ValueError: The state has not the known layout.
    """
    import numpy as np

    layout = np.dtype(_LAYOUT)
    if len(state) != layout.itemsize:
        raise ValueError(f"a generator's state has {len(state)} bytes instead of {layout.itemsize}")
    advanced = bytearray(state)
    fields = np.frombuffer(advanced, layout)  # writes go to the bytes
    # of the present block, `left` says how many are left; it is 1 in a generator that was seeded and has no block yet
    used = _WORDS + 1 - int(fields["left"][0])
    blocks, last = divmod(used + n_draws - 1, _WORDS)
    extra = blocks - n_draws // _WORDS  # 0 or 1
    outputs = _outputs(fields["state"][0], _DEGREE + 2 * _WORDS + _DIGIT)
    jumped = _sum_windows(outputs[extra * _WORDS :], _digits_of_power((n_draws // _WORDS - 1) * _WORDS))
    fields["state"][0] = _untemper(jumped)
    fields["left"], fields["next"] = _WORDS - last, last + 1
    return bytes(advanced)


def _outputs(words: Array, count: int) -> Array:
    """Return the outputs from the block on that follows the one given."""
    import numpy as np

    source = np.random.MT19937(0)
    source.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": _WORDS}}
    return source.random_raw(count).astype(np.uint32)


@lru_cache(maxsize=64)  # models have few shapes
def _digits_of_power(exponent: int) -> Array:
    """Return x^exponent mod p, lowest digits first."""
    import numpy as np

    data = _power(exponent).to_bytes(-(-_N_DIGITS * _DIGIT // 8), "little")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: _N_DIGITS * _DIGIT]
    return np.packbits(bits.reshape(_N_DIGITS, _DIGIT), axis=1, bitorder="little")[:, 0]


def _sum_windows(outputs: Array, digits: Array) -> Array:
    """Return a block of outputs, each the sum of those at the places of a polynomial's terms from there on."""
    import numpy as np

    sums = np.zeros((1 << _DIGIT, len(outputs)), np.uint32)  # for each digit, the sum for it at each place
    for bit in range(_DIGIT):
        alone = sums[1 << bit]
        alone[: len(outputs) - bit] = outputs[bit:]
        np.bitwise_xor(sums[: 1 << bit], alone, out=sums[1 << bit : 2 << bit])
    row, item = sums.strides
    windows = np.lib.stride_tricks.as_strided(
        sums, (1 << _DIGIT, _N_DIGITS, _WORDS), (row, _DIGIT * item, item), writeable=False
    )
    places, total = np.arange(_N_DIGITS), np.zeros(_WORDS, np.uint32)
    for some in np.split(places, range(_PORTION, _N_DIGITS, _PORTION)):
        total ^= np.bitwise_xor.reduce(windows[digits[some], some], axis=0)
    return total


def _untemper(outputs: Array) -> Array:
    """Return the words of a state that gives these outputs."""
    outputs = outputs ^ outputs >> 18
    outputs ^= outputs << 15 & 0xEFC60000
    right = outputs
    for _ in range(4):  # each time, the seven lowest bits that are still wrong become right
        right = outputs ^ right << 7 & 0x9D2C5680
    words: Array = right
    for _ in range(2):  # the eleven highest
        words = right ^ words >> 11
    return words


def _power(exponent: int) -> int:
    """Return x^exponent mod p."""
    n_squarings = max(exponent.bit_length() - 14, 0)  # x^(2^14 - 1) is reduced as it is
    power = 1 << (exponent >> n_squarings)
    for bit in reversed(range(n_squarings)):
        power = _reduce(_square(power) << (exponent >> bit & 1))
    return power


def _square(polynomial: int) -> int:
    data = polynomial.to_bytes((polynomial.bit_length() + 7) // 8, "little")
    squared = bytearray(2 * len(data))
    squared[0::2], squared[1::2] = data.translate(_SPREAD_LOW), data.translate(_SPREAD_HIGH)
    return int.from_bytes(squared, "little")


def _reduce(polynomial: int) -> int:
    """Return the remainder of a division by p."""
    while (excess := polynomial.bit_length() - _DEGREE) > 0:
        place = max(excess - _GAP, 0)
        polynomial ^= _times_p(polynomial >> _DEGREE + place) << place
    return polynomial


def _times_p(factor: int) -> int:
    """Return p times a polynomial, in the order of Horner: the paper's sum has 32 terms for the bits of the twist."""
    product = factor
    for bit in range(31):
        product = product << _WORDS - 1 ^ product << _MIDDLE - 1 ^ (factor if _TWIST >> bit & 1 else 0)
    return product << _WORDS ^ product << _MIDDLE ^ (factor if _TWIST >> 31 & 1 else 0)
