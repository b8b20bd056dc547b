"""The quick tokenizer gives transformers' numbers, whatever the file and the prompt are."""

import copy
import io
import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from wan_pipeline.prompt_tokenizer import SentencePiece, load_tokenizer
from wan_pipeline.synth.tokenizer import tokenizer_files

PROMPTS = (
    "two cats boxing on a stage",
    "  Über \n x\tred ",
    "x " * 700,
    "",
    "A cat, a dog; and 12 birds.",
    "x\x00\u200b",
)
SPECIAL = ("</s> <pad>", "a</s>b", "<extra_id_3>", "a < b")
WANTED = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
WANTED |= {"add_special_tokens": True, "return_attention_mask": True}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokenizer"))


def write(root, change=None, **config):
    """The files of a tokenizer, one with other contents."""
    for name, content in tokenizer_files().items():
        document = content if name.endswith(".model") else json.loads(content)
        if name == "tokenizer.json" and change is not None:
            change(document)
        if name == "tokenizer_config.json":
            document |= config
        (root / name).write_bytes(content if name.endswith(".model") else json.dumps(document).encode())
    return root


def both(root, text, length=512, **options):
    quick, whole = load_tokenizer(root, quick=True), AutoTokenizer.from_pretrained(str(root))
    found, expected = (one(text, max_length=length, **{**WANTED, **options}) for one in (quick, whole))
    assert list(found) == list(expected)
    for name in expected:
        if isinstance(expected[name], torch.Tensor):
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name]), (text, name)
        else:
            assert found[name] == expected[name]
    return quick


@pytest.mark.parametrize("length", [7, 512])
def test_prompts_have_the_same_ids_and_transformers_is_not_asked(published, length, monkeypatch):
    whole = AutoTokenizer.from_pretrained(str(published))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    quick = load_tokenizer(published, quick=True)
    for text in (*PROMPTS, list(PROMPTS)):
        found, expected = (one(text, max_length=length, **WANTED) for one in (quick, whole))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("text", [*SPECIAL, list(SPECIAL), [PROMPTS[0], SPECIAL[0]]])
def test_special_tokens_that_are_written_out_are_left_to_transformers(published, text):
    assert both(published, text)._whole is not None


@given(st.text(max_size=60))
@settings(max_examples=300)
def test_any_text_has_the_same_ids(any_text_of, text):
    quick, whole = any_text_of
    found, expected = (one(text, max_length=16, **WANTED) for one in (quick, whole))
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.attention_mask, expected.attention_mask)


@pytest.fixture(scope="module")
def any_text_of(published):
    return load_tokenizer(published, quick=True), AutoTokenizer.from_pretrained(str(published))


@pytest.mark.parametrize(
    "options",
    [{"padding": True}, {"truncation": False}, {"return_tensors": None}, {"add_special_tokens": False}, {"stride": 1}],
)
def test_other_calls_are_transformers_own(published, options):
    assert both(published, PROMPTS[0], **options)._whole is not None


def test_what_else_it_is_asked_for_is_transformers_own(published):
    quick = load_tokenizer(published, quick=True)
    assert len(quick) == len(AutoTokenizer.from_pretrained(str(published)))
    again = copy.deepcopy(load_tokenizer(published, quick=True))
    assert torch.equal(
        again("two cats", max_length=9, **WANTED).input_ids, quick("two cats", max_length=9, **WANTED).input_ids
    )
    assert quick.decode([3, 4]) == AutoTokenizer.from_pretrained(str(published)).decode([3, 4])
    with pytest.raises(AttributeError):
        _ = quick.__nothing__


def test_spaces_that_a_file_makes_one_change_nothing(tmp_path):
    one_space = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    root = write(
        tmp_path, lambda document: document.update(normalizer={"type": "Sequence", "normalizers": [one_space]})
    )
    assert both(root, "  two   cats ")._whole is None


def change(place, **values):
    def work(document):
        for name in place:
            document = document[name]
        document.update(values)

    return work


@pytest.mark.parametrize(
    ("changed", "config"),
    [
        (change([], normalizer={"type": "Lowercase"}), {}),
        (change(["pre_tokenizer", "pretokenizers", 1], prepend_scheme="never"), {}),
        (change([], pre_tokenizer={"type": "Whitespace"}), {}),
        (change([], post_processor=None), {}),
        (change(["added_tokens", 0], content="[pad]"), {}),
        (None, {"padding_side": "left"}),
        (None, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ],
)
def test_a_file_that_says_more_is_left_to_transformers(tmp_path, changed, config):
    assert load_tokenizer(write(tmp_path, changed, **config), quick=True)._quick is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\x00", b'{"model": {"type": "Unigram", "unk_id": 2}}'])
def test_what_cannot_be_read_is_for_transformers_to_tell(published, tmp_path, name, content):
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path, quick=True)._quick is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tokenizer of a model that was trained as T5's are, with its map of characters."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model, root = io.BytesIO(), tmp_path_factory.mktemp("trained")
    sentences = iter(["Two cats are boxing on a stage, and it is cafe time"] * 30)
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False, "vocab_size": 60}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, normalization_rule_name="nmt_nfkc", minloglevel=2, **options
    )
    (root / "spiece.model").write_bytes(model.getvalue())
    for name, content in SentencePiece(root / "spiece.model", 0, len(model.getvalue())).files().items():
        (root / name).write_bytes(content)
    return load_tokenizer(root, quick=True), AutoTokenizer.from_pretrained(str(root))


@given(st.text(max_size=60))
@example("\ufb01ve \uff1c/s\uff1e ①\u3000two\tcafé\u00a0")
@settings(max_examples=300)
def test_characters_are_mapped_alike(trained, text):
    quick, whole = trained
    assert quick._quick.tokenizer.normalizer is not None
    found, expected = (one(text, max_length=16, **WANTED) for one in (quick, whole))
    assert torch.equal(found.input_ids, expected.input_ids), text
