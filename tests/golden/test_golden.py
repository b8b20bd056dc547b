"""What commands of `wan-loader` print, their exit codes, their flags, and the public names are what they were.

The golden files hold what the commit answered that wrote them; `regenerate.py` writes them anew.
"""

import json

import pytest
from golden_cases import CAPTURES, HERE, LOADER, STARTED
from once import made_once

pytest.importorskip("diffusers")  # `synth` is a command only where it is


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(golden, now) of a whole capture, which is made once."""
    made = {}

    def answers(name):
        if name not in made:
            golden = json.loads((HERE / f"{name}.json").read_text())
            made[name] = golden, made_once(tmp_path_factory, f"golden-{name}", CAPTURES[name])[1]
        return made[name]

    return answers


@pytest.mark.parametrize("case", [*(name for name in LOADER if name != "evict"), "files"])
def test_commands(answers, case):
    golden, now = answers("loader")
    assert now[case] == golden[case]


def test_evict(answers, evict, tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    evict(tmp_path / "x")  # skips where the file system keeps its pages
    golden, now = answers("loader")
    assert now["evict"] == golden["evict"]


@pytest.mark.parametrize("case", [*STARTED, "files"])
def test_commands_that_start_processes(answers, case):
    golden, now = answers("started")
    assert now[case] == golden[case]


@pytest.mark.parametrize("name", ["loader", "started"])
def test_nothing_is_golden_that_is_not_asked_for(answers, name):
    golden, now = answers(name)
    assert golden.keys() == now.keys()


# Names: some may be added, none may go


def gone(golden, now, path=""):
    """What the golden part has and the present one has not, or has in another form."""
    if isinstance(golden, dict):
        if not isinstance(now, dict):
            return [path]
        missing = [f"{path}/{k}" for k in golden if k not in now]
        return missing + [x for k in golden if k in now for x in gone(golden[k], now[k], f"{path}/{k}")]
    if path.endswith("/parameters") or "/methods/" in path:
        return changed_parameters(golden, now, path)
    if isinstance(golden, list):
        return [f"{path}: {x}" for x in golden if x not in (now or ())]
    return [] if golden == now else [path]


def changed_parameters(golden, now, path):
    """Parameters that went, moved, or have another default; and new ones that a caller would have to name."""
    if golden is None or now is None:
        return [] if golden == now else [path]
    positional = [p for p in golden if p[1].startswith("positional")]
    kept = [p for p in now if p[0] in {g[0] for g in golden}]
    new = [p for p in now if p not in kept]
    wrong = [f"{path}: {p}" for p in golden if p not in now]
    wrong += [f"{path}: {p} is needed" for p in new if p[1] != "keyword_only" or p[2] is None]
    return wrong if positional == now[: len(positional)] else [*wrong, f"{path}: another order"]


@pytest.mark.parametrize("part", ["flags", "wan_loader", "wan_pipeline", "errors"])
def test_no_name_is_gone(answers, part):
    golden, now = answers("interface")
    assert gone(golden[part], now[part]) == []
