"""Tables and lines are fitted to any width, and no word is broken off in its middle."""

import io
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from wan_loader.console import PlainConsole
from wan_loader.tables import Column, Columns, cut, fit, folded

TABLE = (Column("name", least=10), Column("seconds", drop=1), Column("bytes", drop=2), Column("bar", least=5, most=40))


def printed(thing, width):
    console = PlainConsole()
    console.file, console.width = io.StringIO(), width
    console.print(thing)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("width", "kept"),
    [(200, [0, 1, 2, 3]), (80, [0, 1, 2, 3]), (40, [0, 1, 2, 3]), (33, [0, 2, 3]), (20, [0, 3]), (5, [0, 3])],
)
def test_cells_shrink_then_columns_go(width, kept):
    found = fit(TABLE, [30, 7, 6, 40], width)
    assert list(found) == kept
    assert sum(found.values()) + 2 * (len(found) - 1) == min(max(width, 17), 89)
    assert all(found[i] >= (10, 7, 6, 5)[i] for i in found)


def test_columns_of_one_kind_go_together():
    pair = (Column("name"), Column("from", drop=1), Column("to", drop=1), Column("bytes", drop=2))
    assert list(fit(pair, [10, 5, 5, 5], 31)) == [0, 1, 2, 3]
    assert list(fit(pair, [10, 5, 5, 5], 30)) == [0, 3]


def test_nothing_is_taken_of_what_has_room():
    assert fit(TABLE, [30, 7, 6, 40], 89) == {0: 30, 1: 7, 2: 6, 3: 40}


def test_columns_that_go_are_named():
    table = Columns(*TABLE)
    table.add_row("a/path/of/some/length/model.safetensors", "12.5 s", "28 GB", lambda width: "#" * width)
    wide, narrow = printed(table, 120), printed(table, 32)
    assert wide[1].split() == ["a/path/of/some/length/model.safetensors", "12.5", "s", "28", "GB", "#" * 40]
    assert narrow[-1] == "no room for: seconds"
    assert narrow[0].split() == ["name", "bytes", "bar"]
    assert narrow[1].startswith("a/p")
    assert "…" in narrow[1]
    assert "ensors" in narrow[1]
    assert max(map(len, wide + narrow)) <= 120
    assert max(map(len, narrow)) <= 32


def test_sentences_fold_inside_of_their_column():
    table = Columns("", Column("", least=10, folds=True), show_header=False)
    table.add_row("memory", "25 GB of it allowed here, 18 GB available")
    assert printed(table, 30) == ["memory  25 GB of it allowed", "          here, 18 GB", "          available"]


def test_what_follows_is_indented():
    assert printed("verdict: reading set the pace", 20) == ["verdict: reading set", "  the pace"]
    assert printed("1. keep a copy that is converted", 20) == ["1. keep a copy that", "   is converted"]
    assert printed("   importing numpy took long", 20) == ["   importing numpy", "     took long"]


@pytest.mark.parametrize("width", [14, 20, 40])
def test_a_command_is_the_same_when_it_is_copied(width):
    command = "wan-loader run one.py 'a path/with spaces in it' --a-very-long-option-indeed=1 \"x y\" a\\ b"
    lines = printed(f"   $ {command}", width)
    assert len(lines) > 1
    assert lines[0].startswith("   $ wan")
    copied = "\n".join(line.removeprefix("   $ ") for line in lines)
    assert shlex.split(copied.replace("\\\n", "")) == shlex.split(command)
    assert all(cell_len(line) <= max(width, 40) for line in lines)


def test_the_style_of_a_word_that_is_cut_stays():
    text = folded(Text.assemble("in ", ("a/very/long/path/indeed", "bold"), " there"), 14)
    assert text.plain == "in\n  a/v…h/indeed\n  there"
    assert [text.plain[span.start : span.end] for span in text.spans] == ["a/v", "h/indeed"]


def test_files_and_pipes_have_whole_lines(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = PlainConsole()
    console.file = io.StringIO()
    console.print("word " * 100)
    assert console.file.getvalue().count("\n") == 1
    monkeypatch.setenv("COLUMNS", "80")
    console = PlainConsole()
    console.file = io.StringIO()
    console.print("word " * 100)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


WORDS = st.text(st.sampled_from("ab/é… 日本-"), max_size=60)


@given(WORDS, st.integers(8, 40))
def test_no_line_is_wider_and_no_word_is_lost(text, width):
    lines = folded(Text(text), width).plain.split("\n")
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    told, given_words = " ".join(lines).split(), text.split()
    assert len(told) == len(given_words)
    assert all(a == b or "…" in a for a, b in zip(told, given_words, strict=True))


@given(WORDS, st.integers(1, 40))
def test_cut_keeps_both_ends(text, width):
    shown = cut(Text(text), width).plain
    assert cell_len(shown) <= width
    if shown != text:
        head, tail = shown.split("…")[0], shown.split("…")[-1]
        assert text.startswith(head)
        assert text.endswith(tail)
