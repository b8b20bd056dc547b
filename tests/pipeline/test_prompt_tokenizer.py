"""A tokenizer made of a sentencepiece model gives the numbers of transformers' own; what is no model is told."""

import contextlib
import struct

import pytest

pytest.importorskip("transformers")

from hypothesis import example, given
from hypothesis import strategies as st

from wan_loader.errors import CheckpointError
from wan_pipeline.prompt_tokenizer import SentencePiece, load_tokenizer
from wan_pipeline.synth.tokenizer import sentencepiece_model, tokenizer_files

PROMPTS = (
    "two cats boxing on a stage",
    "  Über \n x\tred ",
    "x" * 700,
    "",
    "</s> <pad>",
    "A cat, a dog; and 12 birds.",
)
ASKED = {"padding": "max_length", "max_length": 512, "truncation": True, "return_attention_mask": True}
# the smallest that there is: </s> and <unk>, <pad> and a letter
_PIECES = b"".join(
    bytes([0x0A, len(one) + 7, 0x0A, len(one), *one, 0x15]) + struct.pack("<f", -1.0)
    for one in (b"<pad>", b"</s>", b"<unk>", "\N{LOWER ONE EIGHTH BLOCK}a".encode())
)
_IDS = bytes([0x12, 9, 0xC0, 0x02, 2, 0xD0, 0x02, 1, 0xD8, 0x02, 0])
SMALL = _PIECES + _IDS


def source(path, content, *, before=b""):
    path.write_bytes(before + content)
    return SentencePiece(path, len(before), len(content))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files().items():
        (root / name).write_bytes(content)
    return root


def test_it_gives_the_same_numbers(published, tmp_path):
    theirs = load_tokenizer(published)
    ours = load_tokenizer(source(tmp_path / "x.safetensors", sentencepiece_model(), before=b"other tensors"))
    for prompt in PROMPTS:
        expected, found = theirs(prompt, **ASKED), ours(prompt, **ASKED)
        assert found.input_ids == expected.input_ids
        assert found.attention_mask == expected.attention_mask
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2)
    assert ours.model_max_length == 512


def test_its_files_are_a_tokenizers_directory(published, tmp_path):
    files = source(tmp_path / "m", sentencepiece_model()).files()
    for name, content in files.items():
        assert content == (published / name).read_bytes()


def test_it_is_what_sentencepiece_makes(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ours = load_tokenizer(source(tmp_path / "m", sentencepiece_model()))
    for prompt in PROMPTS[:1] + PROMPTS[-1:]:
        assert ours(prompt).input_ids == [*theirs.encode(prompt), theirs.eos_id()]


def test_normalisation_counts(tmp_path):
    """Of a model that was trained as T5's are, with its map of characters."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("a cat and a dog fix the roof of the old house by the lake\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "small"),
        vocab_size=40,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    model = (tmp_path / "small.model").read_bytes()
    theirs, ours = (
        sentencepiece.SentencePieceProcessor(model_proto=model),
        load_tokenizer(source(tmp_path / "m", model)),
    )
    for prompt in ("a cat", "\ufb01x the \uff44og", "a\u00a0 cat  by\tthe lake "):
        assert ours(prompt).input_ids == [*theirs.encode(prompt), 1]
    assert 2 not in ours("\ufb01x the \uff44og").input_ids


def test_the_smallest(tmp_path):
    assert load_tokenizer(source(tmp_path / "m", SMALL))("a a").input_ids == [3, 3, 1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 40,
        SMALL[:-1],
        SMALL[:30],
        _PIECES,
        _IDS,
        SMALL + bytes([0x0A, 2, 0x0A, 5]),
        SMALL + bytes([0x0A, 0]),
        SMALL + bytes([0x0A, 4, 0x0A, 2, 0xFF, 0xFF]),
        SMALL + b"\x0b",
        _PIECES + bytes([0x12, 11, *_IDS[2:], 0x18, 2]),
        _PIECES + bytes([0x12, 9, 0xC0, 0x02, 9, *_IDS[5:]]),
    ],
    ids=[
        "empty",
        "noise",
        "cut",
        "cut in a piece",
        "no numbers",
        "no pieces",
        "cut in a text",
        "no text",
        "no UTF-8",
        "a group",
        "of another kind",
        "a number that is no piece",
    ],
)
def test_what_is_no_model(tmp_path, content):
    with pytest.raises(CheckpointError, match="no sentencepiece model") as error:
        load_tokenizer(source(tmp_path / "m", content))
    assert error.value.path == str(tmp_path / "m")


def test_a_long_one_is_not_read(tmp_path):
    (tmp_path / "m").touch()
    with pytest.raises(CheckpointError, match="100000001 bytes"):
        SentencePiece(tmp_path / "m", 0, 100_000_001).load()
    with pytest.raises(CheckpointError, match="cannot be read"):
        SentencePiece(tmp_path / "none", 0, 5).load()


@given(st.binary(max_size=60), st.integers(0, len(SMALL)))
@example(noise=b"\x00\x80\x7f\xdd\x00\x00", place=51)  # a score of infinity
def test_any_bytes_are_a_model_or_an_error(tmp_path_factory, noise, place):
    path = tmp_path_factory.mktemp("noise") / "m"
    with contextlib.suppress(CheckpointError):
        load_tokenizer(source(path, SMALL[:place] + noise + SMALL[place:]))
