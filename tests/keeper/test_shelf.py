"""What goes when room is needed, and what is said of what is not there."""

import pytest

from wan_loader.errors import KeepError
from wan_loader.keeper.shelf import Identity, Shelf


def identity(name, *, device="gpu", label=None, dtype="bfloat16"):
    return Identity(f"key-{name}", device, label or f"/{name}", dtype)


@pytest.fixture
def shelf():
    """Three things of 10 bytes, of which "b" was used longest ago, and "c" is in use."""
    shelf = Shelf()
    for now, name in enumerate("bac"):
        item, _ = shelf.reserve(identity(name), 10, None, now)
        shelf.put(item, [now], (10,), 1, now)
    shelf.attach(identity("c"), 5)
    return shelf


def names(items):
    return [item.identity.label for item in items]


def test_what_was_used_longest_ago_goes_first(shelf):
    shelf.limits["gpu"] = 30
    _, going = shelf.reserve(identity("d"), 10, None, 9)
    assert names(going) == ["/b"]
    assert names(shelf.items) == ["/a", "/c", "/d"]


def test_a_use_makes_it_younger(shelf):
    shelf.leave(shelf.attach(identity("b"), 7), 8)
    shelf.limits["gpu"] = 30
    assert names(shelf.reserve(identity("d"), 10, None, 9)[1]) == ["/a"]


def test_what_is_in_use_stays(shelf):
    shelf.limits["gpu"] = 30
    assert names(shelf.reserve(identity("d"), 20, None, 9)[1]) == ["/b", "/a"]
    with pytest.raises(KeepError, match="30 B are in use"):
        shelf.reserve(identity("e"), 10, None, 9)  # "d" is being loaded
    assert names(shelf.items) == ["/c", "/d"]


def test_more_than_the_limit_never_fits(shelf):
    shelf.limits["gpu"] = 30
    with pytest.raises(KeepError, match=r"31 B do not fit into the 30 B .*: allow more"):
        shelf.reserve(identity("d"), 31, None, 9)
    assert len(shelf.items) == 3


def test_a_device_that_is_full_is_made_room_on(shelf):
    assert names(shelf.reserve(identity("d"), 15, 20, 9)[1]) == []
    assert names(shelf.reserve(identity("e"), 15, 4, 9)[1]) == ["/b", "/a"]


def test_what_does_not_suffice_is_for_the_device_to_say(shelf):
    """It may have more than was said when it comes to it."""
    assert names(shelf.reserve(identity("d"), 1000, 0, 9)[1]) == ["/b", "/a"]


def test_other_devices_are_others(shelf):
    shelf.limits["gpu"] = 10
    assert not shelf.reserve(identity("d", device="other"), 1000, None, 9)[1]
    assert shelf.attach(identity("a", device="other"), 9) is None


def test_an_older_state_of_the_files_goes(shelf):
    _, going = shelf.reserve(identity("c2", label="/c"), 10, None, 9)
    assert names(going) == ["/c"]
    assert going[0].n_users == 1


def test_why_something_is_not_there(shelf):
    assert shelf.why_not(identity("x", label="/a")) == "its files have changed since it was kept"
    assert shelf.why_not(identity("x", label="/a", dtype="float16")) == "it is kept as bfloat16, and not as float16"
    assert shelf.why_not(identity("x", label="/a", device="other")) == "it is kept on another device"
    assert shelf.why_not(identity("x")) == "it is not kept"
    item, _ = shelf.reserve(identity("d"), 10, None, 9)
    assert shelf.attach(identity("d"), 9) is None
    assert shelf.why_not(identity("d")) == "it is being loaded to be kept"
    shelf.leave(item, 9)
    assert shelf.why_not(identity("d")) == "it is not kept"


def test_dropping(shelf):
    shelf.reserve(identity("d"), 10, None, 9)
    assert shelf.drop(label="/d", key=None) == []
    assert names(shelf.drop(label="/a", key=None)) == ["/a"]
    assert names(shelf.drop(label=None, key="key-c")) == ["/c"]
    item, _ = shelf.reserve(identity("e", label="/e, part model"), 10, None, 9)
    shelf.put(item, [], (10,), 1, 9)
    assert names(shelf.drop(label="/e", key=None)) == ["/e, part model"]
    assert names(shelf.drop(label=None, key=None)) == ["/b"]
    assert len(shelf.items) == 1  # being loaded
