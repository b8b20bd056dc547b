"""Only markup of our own counts on a terminal, and nothing of others' acts."""

import io

import pytest

from wan_loader.console import PlainConsole, marked
from wan_loader.tables import Columns

NAMES = ["[red]name[/]", ":smile:", "\x1b[31mname", "\u202ename", "[/]", "\\", "name{}", "\udcff", "a\tb"]
SHOWN = ["[red]name[/]", ":smile:", "\\x1b[31mname", "\\u202ename", "[/]", "\\", "name{}", "\\udcff", "a\\tb"]


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def printed(request, monkeypatch):
    """Prints something, and returns what came out without the colours of our own."""
    monkeypatch.delenv("NO_COLOR", raising=False)

    def print_it(*things):
        console = PlainConsole()
        console.file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        console._force_terminal = request.param
        console.width = 200
        for thing in things:
            console.print(thing)
        console.file.flush()
        out = console.file.buffer.getvalue().decode()
        return out.replace("\x1b[1m", "").replace("\x1b[0m", "")

    return print_it


@pytest.mark.parametrize(("name", "shown"), list(zip(NAMES, SHOWN, strict=True)), ids=ascii)
def test_a_name_is_shown_as_it_is_everywhere(printed, name, shown):
    table = Columns("what")
    table.add_row(name)
    lines = printed(name, marked("[bold]{}[/] of {}", name, name), table).splitlines()
    assert [line.rstrip() for line in lines] == [shown, f"{shown} of {shown}", "what", shown]


def test_a_line_break_in_a_value_forges_no_line(printed):
    table = Columns("what")
    table.add_row("a\nerror: b")
    assert printed(marked("{}", "a\nerror: b"), table).splitlines()[::2] == ["a\\nerror: b"] * 2


def test_our_own_lines_stay(printed):
    assert printed("one\ntwo", marked("one\n{}", 2)) == "one\ntwo\none\n2\n"
