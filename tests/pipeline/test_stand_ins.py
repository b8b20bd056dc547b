"""Packages that wait until they are used: small ones that leave a trace when they run."""

import compileall
import itertools
import sys
import threading
from importlib import import_module
from types import ModuleType

import pytest

from wan_pipeline.lean.stand_ins import PutOff, StandInModule

RAN = "traces_of_runs"
NUMBERS = itertools.count()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """files -> the name of a package of them, each noting that it ran; and the names of those that did."""
    monkeypatch.syspath_prepend(tmp_path)
    before, finders = set(sys.modules), list(sys.meta_path)
    ran = sys.modules[RAN] = ModuleType(RAN)
    ran.names = []

    def make(files):
        name = f"toy{next(NUMBERS)}"
        for path, text in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"import {RAN}; {RAN}.names.append(__name__)\n{text.replace('TOY', name)}")
        return name, ran.names

    yield make
    sys.meta_path[:] = finders
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def head(tmp_path):
    """Run the text of a module, as an import statement does; the namespace that it leaves."""

    def run(text):
        name = f"head{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(text)
        return import_module(name)

    return run


FILES = {
    "__init__.py": "from TOY.tool import tool\nversion = 3\n__version__ = '3'",
    "tool.py": "def tool(x): return x + 1\nclass Base: pass\nKEYS = {'a': 1}",
    "other.py": "from TOY import version\ndef twice(x): return 2 * x",
}


def test_it_runs_at_its_first_use_in_its_own_order(package, head):
    name, ran = package(FILES)
    put_off = PutOff([name])
    with put_off.active():
        user = head(f"import {name}.tool\nimport {name}.other as t")
    assert ran == []
    assert put_off.waiting == (name,)
    assert getattr(user, name).other.twice(4) == 8
    assert ran == [name, f"{name}.tool", f"{name}.other"]
    assert getattr(user, name) is sys.modules[name]
    assert user.t is sys.modules[f"{name}.other"]
    assert type(user.t) is ModuleType
    assert put_off not in sys.meta_path


def test_a_name_at_the_head_of_a_module_waits_too(package, head):
    name, ran = package(FILES)
    with PutOff([name]).active():
        user = head(f"from {name}.tool import tool as f, Base, KEYS\ntable = {{'f': f}}\ndef use(): return f(1)")
        same = head(f"from {name} import tool")
    assert ran == []
    assert user.use() == 2
    assert user.f is sys.modules[f"{name}.tool"].tool
    assert user.Base is sys.modules[f"{name}.tool"].Base
    # a function that has the name of the module which it is in
    assert same.tool is user.f
    assert user.table["f"](2) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from TOY.tool import Base\nclass Mine(Base): pass\nfound = Mine.__mro__[1].__name__", "Base"),
        ("from TOY.tool import Base\nfound = isinstance(Base, type), isinstance(Base(), Base)", (True, True)),
        ("from TOY.tool import KEYS\nfound = KEYS['a'] + len(list(KEYS))", 2),
        ("from TOY import __version__\nfound = __version__ + '.0'", "3.0"),
        ("from TOY.tool import *\nfound = tool(1)", 2),
        ("def f():\n    from TOY import version\n    return type(version)\nfound = f()", int),
        ("from TOY import version\nfound = 4 if version == 3 else 5", 4),
        ("import TOY.other\nTOY.other.twice = len\nfound = TOY.other.twice('ab')", 2),
        ("from TOY import other\nfound = other.twice(2)", 4),
    ],
)
def test_what_is_used_at_once_is_what_it_would_have_been(package, head, text, expected):
    name, ran = package(FILES)
    with PutOff([name]).active():
        user = head(text.replace("TOY", name))
    assert user.found == expected
    assert name in ran


def test_nothing_is_of_a_class_that_is_not_there_yet(package, head):
    name, ran = package(FILES)
    with PutOff([name]).active():
        user = head(f"from {name}.tool import Base\ndef asks(x): return isinstance(x, Base)")
    assert not user.asks(3)
    assert ran == []
    base = user.Base
    assert user.asks(base())
    assert isinstance(base(), base)
    assert not isinstance(3, base)


def test_a_part_that_is_imported_later_finds_the_whole_package(package, head):
    name, ran = package(FILES)
    with PutOff([name]).active():
        user = head(f"import {name}")
    later = head(f"import {name}.other\nfound = {name}.other.twice(5)")
    assert later.found == 10
    assert ran[0] == name
    assert getattr(user, name) is sys.modules[name]


def test_what_is_broken_says_so_when_it_is_used(package, head):
    name, _ = package({"__init__.py": "", "bad.py": "raise ImportError('no such library')", "good.py": "x = 1"})
    with PutOff([name]).active():
        user = head(f"import {name}.good\nfrom {name} import nothing\nfrom {name}.bad import y")
    assert getattr(user, name).good.x == 1
    with pytest.raises(ImportError, match="no such library"):
        user.y()
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        user.nothing()


def test_others_do_not_wait(package, head):
    """Neither packages that are not named, nor what another thread imports, nor what one that is used imports."""
    other, ran = package(FILES)
    name, _ = package({"__init__.py": f"from {other} import tool\nx = tool(1)"})
    third, _ = package(FILES)
    with PutOff([name, other]).active():
        user = head(f"import {name}")
        head(f"import {third}")
        assert third in ran
        assert user.__dict__[name].x == 2
        assert type(sys.modules[other]) is ModuleType
        name, _ = package(FILES)
    with (put_off := PutOff([name])).active():
        thread = threading.Thread(target=import_module, args=[name])
        thread.start()
        thread.join()
        assert name in ran
    assert put_off.waiting == ()


def test_parts_of_a_package_that_is_in_use_do_not_wait(package, head):
    name, ran = package(FILES)
    used = import_module(name)
    with PutOff([name]).active():
        head(f"import {name}.other")
    assert f"{name}.other" in ran
    assert used.other.twice(2) == 4


def test_a_part_that_is_compiled_comes_with_its_package(package, head, tmp_path):
    name, ran = package(FILES)
    with PutOff([name]).active():
        head(f"import {name}")
        assert ran == []
        (tmp_path / name / "byte.py").write_text("x = 5")
        compileall.compile_file(tmp_path / name / "byte.py", quiet=1, legacy=True)
        (tmp_path / name / "byte.py").unlink()
        user = head(f"from {name}.byte import x")
    assert user.x == 5
    assert name in ran


def test_a_part_of_a_package_can_wait_with_what_is_known_of_it(package, head):
    name, ran = package({**FILES, "big/__init__.py": "from .core import mark", "big/core.py": "def mark(x): return 0"})
    root, marks = f"{name}.big", []

    def prepare(owner, module):
        if module.__name__ == root:
            owner.after(root, lambda: marks.append(sys.modules[root].mark(1)))
            vars(module)["mark"] = lambda x: x

    another, _ = package({"__init__.py": f"from {name}.big.core import mark"})
    put_off = PutOff([root, another], prepare=prepare)
    with put_off.active():
        user = head(f"import {name}.big\nfrom {name}.big import mark\nfound = mark(7)")
        # it waits within another package that is used, too
        head(f"import {another}\nfound = {another}.mark")
    assert user.found == 7
    assert ran == [name, f"{name}.tool", another]
    assert isinstance(sys.modules[name].big, StandInModule)
    assert sys.modules[name].big.core.mark(1) == 0
    assert put_off.is_used(root)
    assert marks == [0]
