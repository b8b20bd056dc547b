"""umT5's tokenizer from its published file, without what transformers does beside reading it.

That file has 256,300 pieces. transformers reads it several times, in Python, and builds a second tokenizer out of the
first: 1.7 s, in which nothing else of the interpreter runs. The tokenizers library alone takes 0.3 s. Here it makes the
ids of a prompt; transformers' own tokenizer is made where more is asked for, and where it might give other ids: for a
file that says more than the pieces, and for a prompt in which a special token is written out.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["QuickTokenizer"]

_CLASSES = ("T5Tokenizer", "T5TokenizerFast")
_ROLES = ("eos_token", "pad_token", "unk_token")
#: What a configuration may say beside the special tokens without a change of ids.
_SIDES = {"padding_side": "right", "truncation_side": "right", "add_prefix_space": None, "split_special_tokens": False}
_WORDS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "WhitespaceSplit"},
        {"type": "Metaspace", "replacement": "\N{LOWER ONE EIGHTH BLOCK}", "prepend_scheme": "always", "split": True},
    ],
}
#: As the words are split at spaces, this changes nothing; some versions of transformers leave it out.
_ONE_SPACE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
#: Keys of the model; no piece can look like them, since its quotes are escaped.
_MODEL = (re.compile(rb'"type"\s*:\s*"Unigram"'), re.compile(rb'"unk_id"\s*:\s*2\s*[,}]'))
_BYTES = re.compile(rb'"byte_fallback"\s*:\s*true')
#: What all special tokens begin with, those that transformers adds itself, too.
_SPECIAL = "<"
_OPTIONS = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
_DEFAULTS = {"add_special_tokens": True, "return_attention_mask": True}


class QuickTokenizer:
    """What transformers' tokenizer of a directory is, made in parts. Reads the file of the pieces at once.

    Args:
        directory: A directory with `tokenizer.json` and `tokenizer_config.json`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._whole: Any = None
        self._quick = _read(directory)

    def __call__(self, text: Any, **options: Any) -> Any:
        """Make ids as transformers' tokenizer does: (prompts, `max_length`) of int64, and which of them are text."""
        if self._quick is not None and _is_plain(text, options):
            found = self._quick.encode([text] if isinstance(text, str) else text, options["max_length"])
            if found is not None:
                return found
        return self._made(text, **options)

    def __len__(self) -> int:
        return len(self._made)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # diffusers looks for some of its own in whatever a pipeline has
            raise AttributeError(name)
        return getattr(self._made, name)

    @property
    def _made(self) -> Any:
        """Transformers' own."""
        if self._whole is None:
            from transformers import AutoTokenizer

            self._whole = AutoTokenizer.from_pretrained(str(self._directory))
        return self._whole


class _Quick(NamedTuple):
    """What the file says, where that is all."""

    tokenizer: Any
    pad: str
    special: frozenset[int]
    """Ids that only a special token has: text that no piece covers has the unknown one's."""

    def encode(self, texts: list[str], length: int) -> Any:
        """Make the ids; None if a special token is in a text, before its end."""
        import torch
        from transformers import BatchEncoding

        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length, pad_id=self.tokenizer.token_to_id(self.pad), pad_token=self.pad)
        found = self.tokenizer.encode_batch(texts)
        ids, masks = [one.ids for one in found], [one.attention_mask for one in found]
        if any(not self.special.isdisjoint(row[: sum(mask) - 1]) for row, mask in zip(ids, masks, strict=True)):
            return None
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)})


def _is_plain(text: Any, options: Mapping[str, Any]) -> bool:
    """Say whether a call is for the ids of texts without special tokens, all of one length."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(one, str) and _SPECIAL not in one for one in texts):
        return False
    length = options.get("max_length")
    rest = {name: value for name, value in options.items() if name != "max_length"}
    return bool(texts) and type(length) is int and length > 1 and _DEFAULTS | rest == _DEFAULTS | _OPTIONS


def _read(directory: Path) -> _Quick | None:
    """Read the file; None where it says what transformers may take in another way, or cannot be read."""
    try:
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
        content = (directory / "tokenizer.json").read_bytes()
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("tokenizer_class") not in _CLASSES:
        return None
    if any(config.get(name, value) != value for name, value in _SIDES.items()):
        return None
    special = [config.get(role) for role in _ROLES]
    names = [str(one.get("content") if isinstance(one, dict) else one) for one in special]
    if not all(part.search(content) for part in _MODEL) or _BYTES.search(content):
        return None
    return _made_of(content, *names)


def _made_of(content: bytes, end: str, pad: str, unknown: str) -> _Quick | None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception:  # whatever it is, transformers says it
        return None
    added = tokenizer.get_added_tokens_decoder()
    plain = all(str(token.content).startswith(_SPECIAL) for token in added.values())
    if not plain or None in map(tokenizer.token_to_id, (end, pad, unknown)) or not _is_known(tokenizer, end):
        return None
    return _Quick(tokenizer, pad, frozenset(added) - {tokenizer.token_to_id(unknown)})


def _is_known(tokenizer: Any, end: str) -> bool:
    """Say whether texts are divided and ended as T5's are."""
    normalizer, words, after = (
        None if part is None else json.loads(part.__getstate__())
        for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor)
    )
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
    return (
        all(part["type"] == "Precompiled" or part == _ONE_SPACE for part in parts)
        and words == _WORDS
        and after is not None
        and after.get("single") == text
        and after["special_tokens"][end]["ids"] == [tokenizer.token_to_id(end)]
    )
