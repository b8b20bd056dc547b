"""Text of others as it may be shown."""

import pytest

from wan_loader.printable import markup_text, printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("blocks.0.attn.weight", "blocks.0.attn.weight"),
        ("größe 模型 é", "größe 模型 é"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x07\x00\x7f", "\\x07\\x00\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),  # C1: what some terminals take for ESC [
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\u202egpj\u202c", "\\u202egpj\\u202c"),
        ("\u2066x\u2069\u2028\u2029\ufeff", "\\u2066x\\u2069\\u2028\\u2029\\ufeff"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_controls_are_shown_as_escapes(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_lines_of_ours_stay_lines():
    assert printable_lines("one\n  two\x1b[0m\n") == "one\n  two\\x1b[0m\n"


def test_markup_is_text():
    assert markup_text("<b>\x1b&\n") == "&lt;b&gt;\\x1b&amp;\\n"
