"""Imports go one way: bytes -> tensors -> modules -> pipelines, the command line on top."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Low to high. A module may import from its own room and from those below.
ROOMS = [
    {"errors", "phases", "printable", "types", "_version"},
    {"cancel", "events", "dtypes", "sizes"},
    {"spans"},
    {"verdict"},
    {"system"},
    {"arguments", "console", "entry_points", "tables"},
    {"formats"},
    {"documents"},
    {"plan"},
    {"devices"},
    {"engine"},
    {"warming"},
    {"stage_copy"},
    {"loading"},
    {"distributed"},
    {"cache"},
    {"streaming"},
    {"keeper"},
    {"provenance"},
    {"api"},
    {"profiler"},
    {"verify", "fastpath", "standby"},
    {"bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}


def imported_modules(path):
    """Modules that a file imports, for types alone or to run."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sorted((ROOT / "wan_loader").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    parts = path.relative_to(ROOT / "wan_loader").with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return
    for module in imported_modules(path):
        names = module.split(".")
        assert names[0] not in ("wan_pipeline", "diffusers", "transformers"), f"{path} imports {module}"
        if names[0] == "wan_loader" and len(names) > 1:
            assert LEVEL[names[1]] <= LEVEL[parts[0]], f"{path} imports {module}"


def modules_of(package):
    """Each module of a package by its name, and the modules of the package that it imports."""
    files = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        name: {
            found
            for module, imported in imported_names(path)
            if (found := f"{module}.{imported}" if f"{module}.{imported}" in files else module) in files
            and found != name
        }
        for name, path in files.items()
    }


@pytest.mark.parametrize("package", ["wan_loader", "wan_pipeline"])
def test_no_circle_in_or_between_rooms(package):
    """Type-only imports included: whoever reads a module can begin with what it imports."""
    left = modules_of(package)
    while leaves := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, {name: sorted(imports & left.keys()) for name, imports in left.items()}


WAN = re.compile(r"wan2|umt5|high_noise|low_noise|wan_pipeline|\bt2v\b", re.IGNORECASE)


@pytest.mark.parametrize("path", sorted((ROOT / "wan_loader").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_low_package_knows_no_model(path):
    """Nor do its comments: what is particular to a model joins from above."""
    assert not [line for line in path.read_text().splitlines() if WAN.search(line)]


#: What wan_pipeline may import from, beside `wan_loader` itself: the list in the docstring of that.
PUBLIC = ("arguments", "cache", "cli", "distributed", "documents", "dtypes", "formats", "sizes", "system")


def imported_names(path):
    """(module, name) of everything that a file imports, also under `if TYPE_CHECKING`; a whole module has no name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "wan_pipeline").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_wan_pipeline_imports_the_public_face_alone(path):
    public = {name: set(import_module(name).__all__) for name in ("wan_loader", *(f"wan_loader.{n}" for n in PUBLIC))}
    inside = [
        f"{module}.{name}"
        for module, name in imported_names(path)
        if module.partition(".")[0] == "wan_loader" and name not in public.get(module, ())
    ]
    assert not inside


@pytest.mark.parametrize("path", sorted((ROOT / "wan_pipeline").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_depends_on_the_name_of_a_model(path):
    """What is particular to one, its family says."""
    from wan_pipeline.families import FAMILIES

    tasks = {family.task for family in FAMILIES}
    found = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare | ast.Subscript | ast.Dict)
        and any(isinstance(part, ast.Constant) and part.value in tasks for part in ast.walk(node))
    ]
    assert not found or path.name == "families.py", found


def test_import_does_not_import_torch():
    code = "import sys, wan_loader; wan_loader.open_checkpoint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_exists_and_is_sorted():
    import wan_loader

    assert wan_loader.__all__ == sorted(wan_loader.__all__)
    for name in wan_loader.__all__:
        assert getattr(wan_loader, name) is not None


PRINTERS = {"wan_loader/cli/output.py", "wan_loader/console.py"}


@pytest.mark.parametrize("package", ["wan_loader", "wan_pipeline"])
def test_everything_is_printed_through_one_place(package):
    """What is printed elsewhere would not be escaped."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name in PRINTERS or "/agent/" in name:  # agent: in programs of others, which prints nothing
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "Console", "Table"), f"{name}:{node.lineno}"
            assert not (isinstance(node, ast.Attribute) and node.attr in ("print_exc", "print_exception")), name
            assert not (isinstance(node, ast.ImportFrom) and node.module == "rich.table"), name
