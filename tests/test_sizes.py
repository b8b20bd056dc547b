"""Sizes and ages as people write them; what does not parse is one `OptionError`."""

import pytest

from wan_loader.errors import OptionError
from wan_loader.sizes import format_age, format_count, parse_age, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("60GB", 60 * 10**9), ("60g", 60 * 10**9), ("512MiB", 512 << 20), ("1.5 kB", 1500), (" 7 ", 7), ("8bit", 1)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "banana", "0", "0GB", "-3GB", "3 bananas", "9" * 400, "nan", "inf", "1e9", "3GBB"]
)
def test_sizes_that_do_not_parse(text):
    with pytest.raises(OptionError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("12h", 43200), ("30d", 2592000), ("2W", 1209600), ("1.5 h", 5400)],
)
def test_ages(text, seconds):
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "banana", "0d", "-3d", "3", "3 fortnights", "inf", "nand", "3dd", "1e3s"])
def test_ages_that_do_not_parse(text):
    with pytest.raises(OptionError) as error:
        parse_age(text)
    assert error.value.reason == f"{text!r} is not understood"
    assert error.value.remedy == "write it like 30d or 12h"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (86400, "24 h"), (3 * 86400, "3 days")],
)
def test_ages_for_people(seconds, text):
    assert format_age(seconds) == text


def test_counts():
    assert [format_count(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert [format_count(n, "entry", "entries") for n in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]
