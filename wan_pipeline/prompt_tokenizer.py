"""The tokenizer of prompts: a directory as transformers has it, or what a sentencepiece model says.

ComfyUI keeps umT5's sentencepiece model as a tensor of bytes (`spiece_model`) in the file of the text encoder. A
tokenizer is made of it as transformers makes one of `spiece.model`: the same pieces, scores and normalisation, without
the fallback to bytes that sentencepiece has for what no piece covers, and transformers has not.

The model is untrusted: its length is capped, and what is no such protocol buffer is an error.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_loader import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["SPIECE_FILE", "TOKENIZER_FILES", "SentencePiece", "load_tokenizer", "tokenizer_config", "unigram"]

#: What a directory that transformers loads a tokenizer from holds at least.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
#: What the sentencepiece model is called where it is a file of its own.
SPIECE_FILE = "spiece.model"
_MAX_MODEL_BYTES = 100_000_000
_MAX_PIECES = 4_000_000
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_MAX_LENGTH = 512

# sentencepiece_model.proto: numbers of fields, and types on the wire.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE = 1, 2
_MODEL_TYPE, _UNKNOWN_ID, _END_ID, _PAD_ID = 3, 40, 42, 43
_CHARSMAP = 2
_UNIGRAM = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """The bytes of a sentencepiece model: those of a file, or of a tensor in it."""

    path: Path
    start: int
    nbytes: int

    def files(self) -> dict[str, bytes]:
        """Make the files of a tokenizer's directory: name -> content. Reads the model.

        Raises:
            CheckpointError: It is no such model.
        """
        made, special = self._make()
        return {
            TOKENIZER_FILES[0]: str(made.to_str(pretty=True)).encode(),
            TOKENIZER_FILES[1]: tokenizer_config(special),
        }

    def load(self) -> Any:
        """Make transformers' tokenizer. Reads the model.

        Raises:
            CheckpointError: It is no such model.
        """
        from transformers import PreTrainedTokenizerFast

        made, special = self._make()
        kind: Any = PreTrainedTokenizerFast
        return kind(tokenizer_object=made, model_max_length=_MAX_LENGTH, **special)

    def _make(self) -> tuple[Any, dict[str, str]]:
        content = self._read()
        try:
            pieces, ids, charsmap = _read_model(content)
            special = {role: pieces[number][0] for role, number in ids.items()}
            return unigram(pieces, special, ids["unk_token"], charsmap), special
        except Exception as error:  # of the library's, too: it raises plain ones
            reason = f"holds no sentencepiece model that T5 could have ({error})"
            raise CheckpointError.because(reason, "name a tokenizer's directory: --tokenizer", path=self.path) from None

    def _read(self) -> bytes:
        if self.nbytes > _MAX_MODEL_BYTES:
            raise CheckpointError.because(f"has a sentencepiece model of {self.nbytes} bytes: damaged", path=self.path)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                return file.read(self.nbytes)
        except OSError as error:
            raise CheckpointError.because(f"cannot be read: {error.strerror}", path=self.path) from error


def load_tokenizer(source: Path | SentencePiece, *, quick: bool = False) -> Any:
    """Load the tokenizer as transformers has it.

    Args:
        source: Its directory, or a sentencepiece model.
        quick: Have what makes the same ids of a prompt, and all else when it is asked for.
    """
    if isinstance(source, SentencePiece):
        return source.load()
    if quick:
        from wan_pipeline.quick_tokenizer import QuickTokenizer

        return QuickTokenizer(source)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(source))


def unigram(
    pieces: Sequence[tuple[str, float]], special: Mapping[str, str], unknown: int, charsmap: bytes = b""
) -> Any:
    """Make a tokenizer of T5's kind: words begin with a mark for the space, and a text ends with the end token.

    Args:
        pieces: Each piece with its log probability; the place in the list is the token's number.
        special: The pieces that stand for themselves alone, by role: eos_token and others.
        unknown: The number of the piece for what no other covers.
        charsmap: The normalisation, as sentencepiece compiles it; none if empty.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(list(pieces), unk_id=unknown, byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    end = special["eos_token"]
    number = next(i for i, (piece, _) in enumerate(pieces) if piece == end)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, number)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in special.values()])
    return tokenizer


def tokenizer_config(special: Mapping[str, str]) -> bytes:
    """Return what transformers wants to know beside `tokenizer.json`."""
    config = {
        **special,
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "extra_ids": 0,
        "model_max_length": _MAX_LENGTH,
        "tokenizer_class": "T5Tokenizer",
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _read_model(model: bytes) -> tuple[list[tuple[str, float]], dict[str, int], bytes]:
    """Return the pieces with their scores, the numbers of special ones by role, and the normalisation.

    Raises:
        ValueError: It is no model, or one of another kind.
    """
    pieces: list[tuple[str, float]] = []
    trainer, charsmap = dict[int, Any](), b""
    for field, value in _fields(model):
        if field == _PIECES:
            one = dict(_fields(value))
            if _TEXT not in one:
                raise ValueError("a piece without text")
            (score,) = struct.unpack("<f", one.get(_SCORE, bytes(4)))
            if not math.isfinite(score):  # transformers could not write it down
                raise ValueError(f"a piece whose score is {score}")
            pieces.append((one[_TEXT].decode(), score))
            if len(pieces) > _MAX_PIECES:
                raise ValueError(f"more than {_MAX_PIECES} pieces")
        elif field == _TRAINER:
            trainer = dict(_fields(value))
        elif field == _NORMALIZER:
            charsmap = dict(_fields(value)).get(_CHARSMAP, b"")
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
        raise ValueError("no unigram model")
    ids = {"eos_token": trainer.get(_END_ID, 2), "pad_token": trainer.get(_PAD_ID, -1)}
    ids["unk_token"] = trainer.get(_UNKNOWN_ID, 0)
    if wrong := [role for role, number in ids.items() if not 0 <= number < len(pieces)]:
        raise ValueError(f"no {wrong[0]}")
    return pieces, ids, charsmap


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protocol buffer: integers, or bytes; `ValueError` if it is none."""
    position, end = 0, len(message)
    while position < end:
        # a quarter of a million pieces: what one byte holds is read without a call
        key, position = (message[position], position + 1) if message[position] < 0x80 else _varint(message, position)
        kind = key & 7
        if kind == _BYTES and position < end and (nbytes := message[position]) < 0x80:
            position += 1
        elif kind == _VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        elif kind == _BYTES:
            nbytes, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            nbytes = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if nbytes > end - position:
            raise ValueError("cut off")
        yield key >> 3, message[position : position + nbytes]
        position += nbytes


def _varint(message: Any, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position behind it."""
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError("cut off")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
