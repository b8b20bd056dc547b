"""Functions of libraries are replaced whether they are imported before or after, and put back as they were."""

import importlib
import sys

import pytest

from wan_loader.fastpath.ours import is_ours, ours
from wan_loader.fastpath.patches import Patches
from wan_loader.fastpath.tally import Tally

SOURCE = """
def double(x):
    return 2 * x

class Thing:
    def name(self):
        return "thing"

    @classmethod
    def made(cls, x):
        return cls.__name__, x

    @staticmethod
    def halved(x):
        return x / 2

class Other(Thing):
    pass
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A module that can be imported, and one that takes a function out of it."""
    (tmp_path / "some_library.py").write_text(SOURCE)
    (tmp_path / "its_user.py").write_text("from some_library import double as twice\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name="some_library": importlib.import_module(name)
    for name in ("some_library", "its_user"):
        sys.modules.pop(name, None)


@pytest.fixture
def patches():
    before = list(sys.meta_path)
    patches = Patches(Tally())
    yield patches
    patches.undo()
    assert sys.meta_path == before


def negated(original):
    return lambda *args, **kwargs: -original(*args, **kwargs)


@pytest.mark.parametrize("imported_before", [False, True])
def test_a_function_is_replaced_and_put_back(library, patches, imported_before):
    if imported_before:
        user = library("its_user")
    patches.replace("some_library", "double", negated)
    module, user = library(), library("its_user")
    assert module.double(3) == user.twice(3) == -6
    assert module.double.__name__ == "double"
    patches.undo()
    assert module.double(3) == 6
    assert user.twice(3) == 6, "what was imported while it was replaced passes calls on"


def test_one_search_for_all_that_is_replaced(library, patches):
    user, module = library("its_user"), library()
    with patches.in_one_search():
        patches.replace("some_library", "double", negated)
        patches.replace("some_library", "Thing.name", lambda original: lambda self: "other")
        assert module.double(3) == -6
        assert user.twice(3) == 6, "not yet"
    assert user.twice(3) == -6
    assert module.Thing().name() == "other"
    patches.undo()
    assert (module.double(3), user.twice(3), module.Thing().name()) == (6, 6, "thing")


def test_several_functions_at_once(library, patches):
    user = library("its_user")
    patches.replace("some_library", ("double", "Thing.name", "no such name"), lambda original: lambda *args: "ours")
    module = library()
    assert module.double(3) == user.twice(3) == module.Thing().name() == "ours"
    patches.undo()
    assert user.twice(3) == 6
    assert module.Thing().name() == "thing"


def test_what_is_replaced_twice_is_so_everywhere(library, patches):
    user = library("its_user")
    original = user.twice
    with patches.in_one_search():
        patches.replace("some_library", "double", negated)
        patches.replace("some_library", "double", lambda original: lambda x: original(x) - 1)
    assert user.twice(3) == library().double(3) == -7
    patches.undo()
    assert user.twice is library().double is original


def test_nothing_is_imported(library, patches):
    patches.replace("some_library", "double", negated)
    assert "some_library" not in sys.modules


def test_methods_are_replaced_in_their_class(library, patches):
    patches.replace("some_library", "Thing.name", lambda original: lambda thing: original(thing).upper())
    assert library().Thing().name() == "THING"
    patches.undo()
    assert library().Thing().name() == "thing"


def test_methods_of_the_class_are_replaced_in_it(library, patches):
    patches.replace("some_library", "Thing.made", lambda original: lambda cls, x: original(cls, -x), parameters=["x"])
    patches.replace("some_library", "Thing.halved", negated)
    module = library()
    before = dict(vars(module.Other))
    assert module.Other.made(3) == ("Other", -3)
    assert module.Thing().halved(3) == -1.5
    with ours():
        assert module.Thing.made(3) == ("Thing", 3)
    patches.undo()
    assert module.Other.made(3) == ("Other", 3)
    assert module.Thing.halved(3) == 1.5
    assert type(vars(module.Thing)["made"]) is classmethod
    assert vars(module.Other) == before


def test_what_is_not_known_is_left(library, patches):
    patches.replace("some_library", "double", negated, parameters=("x", "y"))
    patches.replace("some_library", "triple", negated)
    patches.replace("some_library", "Another.name", negated)
    assert library().double(3) == 6
    assert patches.tally.left == {"some_library.double is not the function that is known here": 0}


def test_calls_from_our_own_code_are_passed_on(library, patches):
    patches.replace("some_library", "double", negated)
    with ours():
        with ours():
            assert library().double(3) == 6
        assert is_ours()
    assert not is_ours()
    assert library().double(3) == -6


def test_what_others_put_over_ours_stays(library, patches):
    patches.replace("some_library", "double", negated)
    module = library()
    replaced = module.double
    module.double = lambda x: replaced(x) + 1
    assert module.double(3) == -5
    patches.undo()
    assert module.double(3) == 7


def test_an_imported_module_looks_as_ever(library, patches):
    patches.replace("some_library", "double", negated)
    module = library()
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader
    assert module.__spec__.loader is module.__loader__
    assert importlib.reload(module) is module
    assert module.double(3) == -6, "a module that is imported again is replaced again"


def test_a_module_that_fails_to_import_fails_as_ever(library, patches, tmp_path):
    (tmp_path / "some_library.py").write_text("1 / 0\n")
    patches.replace("some_library", "double", negated)
    with pytest.raises(ZeroDivisionError):
        library()
    assert "some_library" not in sys.modules
