"""The steps that make a machine's figures: commands that `bench` understands, with samples enough for README."""

import importlib
import shlex
import types

import pytest
import typer
from programs import ROOT

from wan_loader.bench.loaders import find_loaders


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("figures")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report")


@pytest.fixture
def started(figures, monkeypatch, tmp_path):
    """Run `main` with arguments; returns the commands that it would have started. Nothing is made."""

    def run(*words):
        commands = []
        monkeypatch.setattr(figures, "make", lambda directory, name: directory / name)
        monkeypatch.setattr(
            figures, "subprocess", types.SimpleNamespace(run=lambda command, **_: commands.append(command) or ok)
        )
        monkeypatch.setattr("sys.argv", ["figures.py", str(tmp_path), str(tmp_path / "results"), *words])
        with pytest.raises(SystemExit) as end:
            figures.main()
        assert not end.value.code
        return commands

    ok = types.SimpleNamespace(returncode=0)
    return run


def parsed(words):
    """The arguments that the bench would get."""
    from wan_loader.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    return typer.main.get_command(app).make_context("bench", list(map(str, words))).params


def test_every_step_is_a_command_of_the_bench(figures):
    for name, step in figures.STEPS.items():
        params = parsed(["/x", *shlex.split(step.options)])
        assert find_loaders(params["loader"]), name
        assert step.seconds > 0


def test_what_readme_shows_has_enough_samples(figures, report):
    for name in figures.README:
        params = parsed(["/x", *shlex.split(figures.STEPS[name].options)])
        assert params["repeat"] >= report.OURS_AT_LEAST, name
        rivals = {loader.name for loader in find_loaders(params["loader"])} - {"ours"}
        assert not rivals or (params["repeat_rivals"] or params["repeat"]) >= report.RIVALS_AT_LEAST, name


def test_readme_means_its_steps_in_their_order(figures, started, tmp_path):
    commands = started("readme")
    assert [c[c.index("--export-json") + 1] for c in commands] == [
        str(tmp_path / "results" / f"{name}.json") for name in figures.README
    ]
    assert commands[0][3:5] == ["bench", str(tmp_path / "bf16-28g")]


def test_a_number_of_samples_is_for_all_loaders(started):
    (command,) = started("peers-warm", "--repeat", "1")
    params = parsed(command[4:])
    assert params["repeat"] == params["repeat_rivals"] == 1


def test_the_list_says_how_long_steps_take(figures, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["figures.py", str(tmp_path), str(tmp_path)])
    figures.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(figures.STEPS) + 1
    assert f"{sum(figures.STEPS[name].seconds for name in figures.README)} s" in lines[-1]
