"""Errors have fields beside their message, whatever else they inherit from, and keep them when they travel."""

import copy
import pickle
from pathlib import Path

import pytest

from wan_loader import errors

KINDS = [getattr(errors, name) for name in errors.__all__]
FIELDS = {"path": "/w/a.safetensors", "tensor": "a.weight", "reason": "is gone", "remedy": "check the disk"}


def fields(error):
    return {name: getattr(error, name) for name in FIELDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_alone_leaves_the_fields_unknown(kind):
    error = kind("what happened")
    assert str(error) == "what happened"
    assert fields(error) == dict.fromkeys(FIELDS)


@pytest.mark.parametrize("kind", KINDS)
def test_fields_leave_the_message_as_it_is(kind):
    error = kind("what happened", **FIELDS)
    assert str(error) == "what happened"
    assert fields(error) == FIELDS


@pytest.mark.parametrize("kind", KINDS)
def test_fields_survive_copies_and_other_processes(kind):
    error = kind("what happened", **FIELDS)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == "what happened"
        assert fields(again) == FIELDS


def test_fields_of_one_kind_survive_too():
    shapes = {"a": ((1,), (2,))}
    error = errors.KeyMismatchError("m", missing=["b"], unexpected=["c"], misshaped=shapes, on_meta=["d"], tensor="a")
    again = pickle.loads(pickle.dumps(error))
    assert (again.missing, again.unexpected, again.misshaped, again.on_meta) == (("b",), ("c",), shapes, ("d",))
    assert again.tensor == "a"
    assert pickle.loads(pickle.dumps(errors.HubError("m", status=404))).status == 404


def test_a_path_is_kept_as_a_string():
    assert errors.OutputError("m", path=Path("/w/a")).path == "/w/a"


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_field_is_a_mistake(kind):
    with pytest.raises(TypeError):
        kind("m", paht="/w/a")


def test_a_message_made_of_fields():
    whole = errors.CheckpointError.because("is gone", "check the disk", path=Path("/w/a"))
    assert str(whole) == "/w/a is gone: check the disk"
    assert fields(whole) == {"path": "/w/a", "tensor": None, "reason": "is gone", "remedy": "check the disk"}
    assert str(errors.OptionError.because("threads=0", "use 1 to 64")) == "threads=0: use 1 to 64"
    assert str(errors.HubError.because("is gone")) == "is gone"
