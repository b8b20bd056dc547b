"""Fields of our own JSON documents: of the right type, or an error that names them."""

import json

import pytest

from wan_loader.documents import Doc, DocumentError, read_json
from wan_loader.errors import SessionError


def test_fields_of_the_right_type():
    doc = Doc({"a": "x", "n": 3, "t": True, "s": 1.5, "l": ["p", "q"], "d": {"n": 1}, "none": None})
    assert (doc.text("a"), doc.whole("n"), doc.boolean("t"), doc.number("s")) == ("x", 3, True, 1.5)
    assert (doc.texts("l"), doc.optional_list("l"), doc.doc("d").whole("n")) == (("p", "q"), ["p", "q"], 1)
    assert [doc.optional_text("none"), doc.optional_whole("none"), doc.optional_list("none")] == [None] * 3
    doc.doc("d").only("n")


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda d: d.text("n"), r"in\.n is missing or not a string"),
        (lambda d: d.whole("t"), r"in\.t is missing or not an integer"),
        (lambda d: d.boolean("n"), r"in\.n is missing or not true or false"),
        (lambda d: d.whole("huge"), r"in\.huge is no number that was counted"),
        (lambda d: d.number("gone"), r"in\.gone is missing"),
        (lambda d: d.optional_list("n"), r"in\.n is missing or not a list"),
        (lambda d: d.only("n"), r"in has not exactly n"),
        (lambda d: d.docs("l"), r"in\.l\[0\] is not an object"),
    ],
)
def test_what_is_wrong_is_named(read, said):
    with pytest.raises(DocumentError, match=said):
        read(Doc({"n": 1, "t": True, "huge": 1 << 63, "l": [5]}, "in."))


@pytest.mark.parametrize("text", ["[]", "5", '{"a": 1, "a": 2}', "{", '{"a": ' * 3000, "\ud800"])
def test_a_file_that_is_no_document_is_one_error(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(SessionError, match=r"a\.json"):
        read_json(tmp_path / "a.json", "not a session")


def test_names_of_files_that_are_no_utf8_are_read_back(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"target": "caf\udce9.safetensors"}))
    assert read_json(tmp_path / "a.json", "") == {"target": "caf\udce9.safetensors"}
