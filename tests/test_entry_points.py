"""What joins from above: only what our own distribution names, only when it is asked for, and nothing without it."""

import importlib
import subprocess
import sys

import pytest
from installed import declared, install_entry_points, installed
from typer.testing import CliRunner

from wan_loader import entry_points as module
from wan_loader.cli import app as program
from wan_loader.entry_points import entry_points, first_answer
from wan_loader.errors import OptionError


@pytest.fixture
def distribution(monkeypatch):
    """Give our distribution another name."""

    def distribution(name):
        entry_points.cache_clear()
        monkeypatch.setattr(module, "DISTRIBUTION", name)

    yield distribution
    entry_points.cache_clear()


def commands():
    """Names that `wan-loader --help` lists."""
    import typer

    group = typer.main.get_command(program.app)
    return group.list_commands(None)


def test_what_is_declared_is_there():
    install_entry_points()
    assert installed() == declared()
    for names in declared().values():
        for value in names.values():
            name, _, function = value.partition(":")
            assert callable(getattr(importlib.import_module(name), function))


def test_commands_join_behind_ours():
    assert commands()[-2:] == ["download", "synth"]
    done = CliRunner().invoke(program.app, ["download", "--help"])
    assert done.exit_code == 0
    assert "--to" in done.output


def test_without_an_installation_nothing_joins_and_the_rest_works(distribution, tmp_path):
    distribution("not-there")
    assert entry_points("wan_loader.models") == ()
    assert "inspect" in commands()
    assert "download" not in commands()
    assert CliRunner().invoke(program.app, ["inspect", "--help"]).exit_code == 0
    assert CliRunner().invoke(program.app, ["download"]).exit_code == 2
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = CliRunner().invoke(program.app, ["estimate", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(program.app, ["warm", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output


def test_others_do_not_join(tmp_path, monkeypatch, distribution):
    about = tmp_path / "other-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[wan_loader.commands]\nintruder = os:getpid\n")
    monkeypatch.syspath_prepend(tmp_path)
    distribution(module.DISTRIBUTION)
    assert "intruder" not in commands()
    distribution("other")
    assert [entry.name for entry in entry_points("wan_loader.commands")] == ["intruder"]


def test_our_own_commands_need_not_know_what_joins():
    code = (
        "import sys; from wan_loader.cli import main; sys.argv[1:] = ['inspect', '--help']\n"
        "try: main()\n"
        "finally: assert not {'wan_pipeline', 'torch'} & {*sys.modules}, 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["synth", "cache build"])
def test_without_the_pipeline_extra_it_is_said_what_to_install(command, tmp_path, monkeypatch):
    for name in ("synth", "outline"):
        joined = importlib.import_module(f"wan_pipeline.commands.{name}")
        monkeypatch.setattr(joined, "find_spec", lambda name: None)
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    done = CliRunner().invoke(program.app, [*command.split(), str(tmp_path)])
    assert isinstance(done.exception, OptionError)
    assert "pip install 'wan-loader[pipeline]'" in str(done.exception)


def test_the_first_answer_counts(monkeypatch):
    class Entry:
        def __init__(self, function):
            self.load = lambda: function

    monkeypatch.setattr(module, "entry_points", lambda group: [Entry(str.isalpha), Entry(lambda text: 7)])
    assert first_answer("group", "x") is True
    monkeypatch.setattr(module, "entry_points", lambda group: [Entry(lambda text: None), Entry(lambda text: 7)])
    assert first_answer("group", "x") == 7
    monkeypatch.setattr(module, "entry_points", lambda group: [])
    assert first_answer("group", "x") is None
