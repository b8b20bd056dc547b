"""`wan-pipeline` and the stand-by server: what is imported for it, and when it asks."""

import sys

import pytest

import wan_loader.cli
from wan_pipeline import __main__ as program
from wan_pipeline.commands.imports import modules_of_a_start

pytest.importorskip("diffusers")


def test_what_a_start_imports_is_there_and_can_live_in_a_fork():
    """Unlike what a test process has imported, so it is another that looks."""
    from programs import PIPELINE, run

    code = "from wan_loader.standby.imports import import_all\nprint(import_all({!r}))"
    done = run("-c", code.format(list(modules_of_a_start())), modules=PIPELINE)
    assert done.stdout == "{}\n", done.stderr


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["generate", "--prompt", "x"], [None]),
        (["load", "--standby"], [True]),
        (["generate", "--no-standby"], [False]),
        (["generate", "--help"], []),
        (["synth", "x"], []),
        ([], []),
    ],
)
def test_when_it_asks_for_a_fork(monkeypatch, capsys, words, wanted):
    asked = []

    def from_standby(entry, *, first, program, wanted):
        asked.append(wanted)
        assert (entry, first, program) == ("wan_pipeline.__main__:main", sys.path[0], "-m wan_pipeline")
        return "as it is tested"

    monkeypatch.setattr(wan_loader.cli, "from_standby", from_standby)
    monkeypatch.setattr(program, "begin_program", lambda: None)
    monkeypatch.setattr("wan_pipeline.commands.app.main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["wan-pipeline", *words])
    program.main()
    assert asked == wanted
    assert capsys.readouterr().err == "started directly: as it is tested\n" * len(wanted)
