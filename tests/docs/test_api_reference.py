"""The API reference is built from docstrings, and every public name has one."""

import inspect
import re
from importlib import import_module

import programs
import pytest
from markdown import ROOT
from test_public import MODULES as PUBLIC
from test_public import PLAIN

MODULES = (*PUBLIC, "wan_pipeline")


def members(value):
    """What a class offers by itself: its methods and properties, not those that it inherits."""
    for name, member in vars(value).items():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, (property, classmethod))):
            yield name, member


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_and_what_it_offers_has_a_docstring(module):
    package = import_module(module)
    lacking = [name for name in package.__all__ if name not in PLAIN and not (getattr(package, name).__doc__ or "")]
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) and value.__module__.startswith("wan_"):
            lacking += [f"{name}.{member}" for member, found in members(value) if not inspect.getdoc(found)]
    assert not lacking


def test_it_is_built_without_a_network_and_has_every_name(tmp_path):
    pytest.importorskip("pdoc", reason="the extra `docs` brings it")
    done = programs.run(ROOT / "scripts" / "api-reference", tmp_path, env={"http_proxy": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    for module in MODULES:
        page = (tmp_path / (module.replace(".", "/") + ".html")).read_text()
        found = set(re.findall(r'id="([\w.]+)"', page))
        assert set(import_module(module).__all__) <= found
    text = (tmp_path / "wan_loader.html").read_text()
    assert "cancel" in text[text.index('id="load_file"') :]
