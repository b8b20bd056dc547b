"""A tokenizer of a few hundred pieces, made offline, in the files in which umT5's own is published.

It splits English into known words and single ASCII characters; all else is `<unk>`. It stands in for the real one,
which cannot be made here, wherever token ids need only be valid and repeatable.
"""

from __future__ import annotations

import json
import string
import struct

from wan_pipeline.prompt_tokenizer import tokenizer_config, unigram

__all__ = ["VOCAB_SIZE", "sentencepiece_model", "tokenizer_files"]

_SPECIAL = ("<pad>", "</s>", "<unk>")
_UNKNOWN = 2
_SPECIAL_ROLES = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_WORDS = """
    a and animal at ball beach bear bird blue boat box boxing bright camera car cat cats child city close cloud color
    cute dance dark day dog eyes face field fire fish flower forest girl gloves grass green hand house in is its jump
    lake large light man moon mountain night ocean of old on over park person plays rain red river road robot room run
    running sand sea shot sky slow small snow stage star street sun sunset swim the to train tree video walk walking
    water wave wearing white wind with woman wood yellow
"""


def _pieces() -> list[tuple[str, float]]:
    """List every piece with its log probability; the place in the list is the token id."""
    characters = [c for c in string.printable if not c.isspace()]
    return [
        *((piece, 0.0) for piece in _SPECIAL),
        (_SPACE, -3.0),
        *((_SPACE + word, -6.0) for word in _WORDS.split()),
        *((c, -8.0) for c in characters),
    ]


VOCAB_SIZE = len(_pieces())


def tokenizer_files() -> dict[str, bytes]:
    """Make the files of a tokenizer directory: name -> content."""
    made = unigram(_pieces(), _SPECIAL_ROLES, _UNKNOWN)
    return {
        "special_tokens_map.json": (json.dumps(_SPECIAL_ROLES, indent=2, sort_keys=True) + "\n").encode(),
        "spiece.model": sentencepiece_model(),
        "tokenizer.json": str(made.to_str(pretty=True)).encode(),
        "tokenizer_config.json": tokenizer_config(_SPECIAL_ROLES),
    }


# spiece.model is a protocol buffer, `sentencepiece_model.proto`: ModelProto(pieces=1, trainer_spec=2,
# normalizer_spec=3). Written by hand, since training one would need the sentencepiece library.


def sentencepiece_model() -> bytes:
    """Make the same tokenizer as sentencepiece keeps it."""
    normal, unknown, control = 1, 2, 3
    types = {"<unk>": unknown, "<pad>": control, "</s>": control}
    model = b""
    for text, score in _pieces():
        fields = _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _int(3, types.get(text, normal))
        model += _bytes(1, fields)
    unigrams, no_id = 1, -1
    trainer = _int(3, unigrams) + _int(4, VOCAB_SIZE) + _int(40, _UNKNOWN) + _int(41, no_id) + _int(42, 1) + _int(43, 0)
    add_dummy_prefix, remove_extra_spaces, escape_spaces = _int(3, 1), _int(4, 1), _int(5, 1)
    normalizer = _bytes(1, b"identity") + add_dummy_prefix + remove_extra_spaces + escape_spaces
    return model + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
