"""The public face: every name exists, is documented, and is imported when asked for; none of them needs torch."""

import subprocess
import sys
from importlib import import_module

import pytest

#: Public beside `wan_loader` itself; its docstring lists them.
SUBMODULES = ("arguments", "cache", "cli", "distributed", "documents", "dtypes", "formats", "sizes", "system")
MODULES = ("wan_loader", *(f"wan_loader.{name}" for name in SUBMODULES))
#: Values, and names for types, which have no docstring of their own.
PLAIN = {"MOST", "FLOATING", "ITEMSIZE", "IoMode", "JsonOut", "MAX_THREADS", "StrPath", "Verbose", "__version__"}
#: What it makes are torch's own things.
OF_TORCH = {"StreamedBlocks", "empty_weights"}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", MODULES)
def test_every_name_exists_and_is_documented(module):
    package = import_module(module)
    assert package.__doc__
    assert package.__all__ == sorted(package.__all__, key=lambda n: (not n.isupper(), n))  # as ruff sorts
    assert len(package.__all__) == len(set(package.__all__))
    for name in package.__all__:
        value = getattr(package, name)
        assert name in PLAIN or (value.__doc__ or "").strip(), name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="nothing_like_that"):
        _ = package.nothing_like_that


def test_the_docstring_lists_the_submodules():
    import wan_loader

    for name in SUBMODULES:
        assert f"\n    {name} " in wan_loader.__doc__


@pytest.mark.parametrize("module", MODULES)
def test_no_name_needs_torch(module):
    names = sorted({*import_module(module).__all__} - OF_TORCH)
    run(f"import sys, {module} as m; [getattr(m, n) for n in {names}]; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("module", ["wan_loader", "wan_loader.cli", "wan_loader.distributed", "wan_loader.system"])
def test_names_are_imported_when_asked_for(module):
    """Importing the package alone imports next to nothing of ours, and nothing of others."""
    loaded = run(f"import sys; before = set(sys.modules); import {module}; print(*(set(sys.modules) - before))")
    ours = {name for name in loaded if name.startswith("wan_loader")}
    packages = {"wan_loader", "wan_loader.cli", "wan_loader.distributed"}
    assert ours <= packages | {
        "wan_loader._version",
        "wan_loader.system",
        "wan_loader.system.forks",
        "wan_loader.system.lazy",
    }
    assert not {"rich", "typer", "numpy", "safetensors"} & set(loaded)
