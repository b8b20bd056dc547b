"""Inputs of the differential fuzz: small sound checkpoints, and changes of them that are told by a number.

An input is a dict of file names to bytes; the first file is the checkpoint. The same kind, seed and number always give
the same input.
"""

from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict
from functools import cache
from typing import Any

import gguf_files
import torch
from safetensors.torch import save
from zips import Archive, Entry, mutate_archive

KINDS = ("zip", "pickle", "safetensors", "index", "gguf")


def make(kind: str, seed: int, number: int) -> dict[str, bytes]:
    """Input `number` of a kind."""
    rng = random.Random(f"{kind} {seed} {number}")
    makers = {"zip": _zip, "pickle": _pickle, "safetensors": _safetensors, "index": _index, "gguf": _gguf}
    return makers[kind](rng)


def _flip(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, repeated or put elsewhere."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not out:
            break
        position = rng.randrange(len(out))
        if rng.random() < 0.4:
            position = max(len(out) - 1 - rng.randrange(min(len(out), 700)), 0)  # headers lie at the ends
        change = rng.randrange(6)
        if change == 0:
            out[position] ^= 1 << rng.randrange(8)
        elif change == 1:
            out[position] = rng.choice((0, 1, 0xFF, 0x7F, 0x80, rng.randrange(256)))
        elif change == 2:
            del out[position : position + rng.choice((1, 1, 2, 8, 40))]
        elif change == 3:
            out[position:position] = out[position : position + rng.choice((1, 4, 30))]
        elif change == 4:
            width = rng.choice((2, 4, 8))
            value = rng.choice((0, 1, -1, 2 ** (8 * width - 1), rng.randrange(1000))) % 2 ** (8 * width)
            out[position : position + width] = value.to_bytes(width, "little")
        else:
            start = rng.randrange(len(out))
            out[position:position] = out[start : start + rng.choice((1, 10, 60))]
    return bytes(out)


# Torch


@cache
def _torch_states() -> list[Any]:
    base = torch.arange(12, dtype=torch.float32)
    half = torch.tensor([1.5, -2, float("nan")], dtype=torch.bfloat16)
    plain = {"a.weight": base.view(3, 4), "b": half, "mask": torch.tensor([True, False])}
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    for name, tensor in module.items():
        module[name] = torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return [
        plain,
        OrderedDict(plain),
        {"whole": base, "row": base.view(3, 4)[1], "t": base.view(3, 4).t(), "empty": torch.empty(0, 3)},
        module,
        {"p": torch.nn.Parameter(torch.ones(2)), "u": torch.tensor([1, 65535], dtype=torch.uint16)},
        {"state_dict": plain, "epoch": 3, "lr": 0.5, "betas": (0.9, 0.99)},
        {"c": torch.tensor([1 + 2j]), "f8": torch.ones(3).to(torch.float8_e4m3fn), "n": torch.tensor(7)},
    ]


@cache
def _archives() -> list[Archive]:
    """The states as torch.save writes them, taken apart."""
    out = []
    for state in _torch_states():
        stream = io.BytesIO()
        torch.save(state, stream)
        with zipfile.ZipFile(stream) as archive:
            out.append(Archive([Entry(i.filename.encode(), archive.read(i)) for i in archive.infolist()]))
    return out


def _zip(rng: random.Random) -> dict[str, bytes]:
    archive = rng.choice(_archives())
    if rng.random() < 0.6:
        archive = mutate_archive(archive, rng)
    content = archive.write()
    if rng.random() < 0.4:
        content = _flip(content, rng)
    return {"model.pth": content}


@cache
def _programs() -> list[tuple[Archive, list[bytes]]]:
    """Archives, and their pickles as lists of opcodes with their arguments."""
    out = []
    for archive in _archives():
        data = next(e.content for e in archive.entries if e.name.endswith(b"/data.pkl"))
        starts = [position for _, _, position in pickletools.genops(data)]
        out.append((archive, [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]))
    return out


_NAMES = [
    b"torch._utils\n_rebuild_tensor_v2\n",
    b"torch._utils\n_rebuild_tensor_v3\n",
    b"torch._utils\n_rebuild_parameter\n",
    b"torch._utils\n_rebuild_tensor\n",
    b"torch._utils\n_rebuild_sparse_tensor\n",
    b"torch._utils\n_rebuild_meta_tensor_no_storage\n",
    b"torch._tensor\n_rebuild_from_type_v2\n",
    b"collections\nOrderedDict\n",
    b"collections\nCounter\n",
    b"torch\nSize\n",
    b"torch\ndevice\n",
    b"torch\nTensor\n",
    b"torch.nn.parameter\nParameter\n",
    b"_codecs\nencode\n",
    b"__builtin__\nset\n",
    b"builtins\ncomplex\n",
    b"builtins\nbytearray\n",
    b"builtins\nprint\n",
    b"torch\nfloat32\n",
    b"torch\nint8\n",
    b"torch\nQInt8Storage\n",
    b"torch.storage\nUntypedStorage\n",
    *(
        f"torch\n{kind}Storage\n".encode()
        for kind in ("Float", "Double", "Int", "Byte", "Bool", "Half", "BFloat16", "Long")
    ),
]
_TEXTS = [
    "storage",
    "0",
    "1",
    "2",
    "cpu",
    "cuda:0",
    "a.weight",
    "b",
    "",
    "../0",
    "0\0x",
    "neg",
    "conj",
    "latin1",
    "é",
    "module",
]
_INTS = [0, 1, 2, 3, 4, 6, 12, 255, 65535, -1, 2**31 - 1, -(2**31)]
_CODES = [bytes([code]) for code in b"().N]}\x88\x89\x85\x86\x87tQRasueb\x81\x8f\x90\x91\x94"]


def _opcode(rng: random.Random) -> bytes:
    """An opcode with an argument."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(_CODES)
    if kind == 3:
        return b"c" + rng.choice(_NAMES)
    if kind == 4:
        text = rng.choice(_TEXTS).encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if kind == 5:
        value = rng.choice(_INTS)
        return rng.choice(
            (b"J" + struct.pack("<i", value), b"K" + bytes([value & 255]), b"\x8a\x09" + bytes(8) + b"\1")
        )
    if kind == 6:
        return rng.choice((b"h", b"q")) + bytes([rng.randrange(40)])
    return rng.choice(
        (b"G" + struct.pack(">d", 1.0), b"U\x010", b"\x80\x02", b"\x80\x05", b"C\x010", bytes([rng.randrange(256)]))
    )


@cache
def _legacy_files() -> list[bytes]:
    out = []
    for state in _torch_states():
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=False)
        out.append(stream.getvalue())
    return out


def _pickle(rng: random.Random) -> dict[str, bytes]:
    if rng.random() < 0.1:
        return {"model.pth": _flip(rng.choice(_legacy_files()), rng)}
    archive, program = rng.choice(_programs())
    ops = list(program)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(ops)) if ops else 0
        change = rng.randrange(8)
        if change == 0 and ops:
            del ops[at : at + rng.choice((1, 1, 1, 3, 10))]
        elif change == 1 and ops:
            ops[at:at] = ops[at : at + rng.choice((1, 2, 12, 40))]
        elif change == 2 and ops:
            other = rng.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        elif change == 3:
            ops.insert(at, _opcode(rng))
        elif change in (4, 5):
            _replace_alike(ops, rng)
        elif change == 6 and ops:
            ops[at] = _opcode(rng)
        else:
            ops = [_flip(b"".join(ops), rng)]
    data = b"".join(ops)
    entries = [Entry(e.name, data if e.name.endswith(b"/data.pkl") else e.content) for e in archive.entries]
    return {"model.pth": Archive(entries).write()}


def _replace_alike(ops: list[bytes], rng: random.Random) -> None:
    """Another argument for an opcode, so that the program goes on."""
    kind = rng.choice((b"X", b"K", b"c", b"h", b"\x89", b"}"))
    places = [i for i, op in enumerate(ops) if op.startswith(kind)]
    if not places:
        return
    at = rng.choice(places)
    texts = [op for op in ops if op.startswith(b"X")]
    ops[at] = {
        b"X": lambda: (
            rng.choice(texts) if rng.random() < 0.5 else b"X" + struct.pack("<I", 1) + rng.choice((b"0", b"1", b"z"))
        ),
        b"K": lambda: rng.choice(
            (
                b"K" + bytes([rng.choice((0, 1, 2, 3, 4, 12, 200))]),
                b"J" + struct.pack("<i", rng.choice(_INTS)),
                b"N",
                b"\x88",
            )
        ),
        b"c": lambda: b"c" + rng.choice(_NAMES),
        b"h": lambda: b"h" + bytes([rng.randrange(40)]),
        b"\x89": lambda: rng.choice((b"\x88", b"N", b"K\1")),
        b"}": lambda: rng.choice((b"]", b")", b"}", b"ccollections\nOrderedDict\n)R")),
    }[kind]()


# Safetensors


@cache
def _safetensors_states() -> list[bytes]:
    base = torch.arange(12, dtype=torch.float32)
    states: list[dict[str, torch.Tensor]] = [
        {"a.weight": base.view(3, 4), "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)},
        {"mask": torch.tensor([True, False]), "empty": torch.empty(0, 3), "scalar": torch.tensor(7), "w": base[:3]},
        {"u8": torch.arange(5, dtype=torch.uint8), "f64": base.double(), "f8": base.to(torch.float8_e5m2)},
        {},
    ]
    return [save(state, metadata) for state in states for metadata in (None, {"format": "pt", "note": "ä"})]


_VALUES: list[Any] = [
    None,
    True,
    0,
    1,
    2,
    -1,
    8,
    2**31,
    2**63,
    2**64,
    1.0,
    "",
    "F32",
    "BF16",
    "F4",
    "X",
    [],
    [0],
    [0, 0],
    [0, 8],
    [2, 2],
    {},
    {"x": None},
]
_PIECES = [
    b"null",
    b"{}",
    b"[]",
    b"0",
    b"-0",
    b"1e2",
    b"NaN",
    b'"x"',
    b",",
    b":",
    b"\\",
    b"\\u0061",
    b"\\ud800",
    b"\xff",
    b" ",
    b"\t",
    b"\x01",
    b'"',
]


def _mutate_header(header: dict[str, Any], rng: random.Random) -> None:
    names = [name for name in header if name != "__metadata__"]
    change = rng.randrange(8)
    if change == 0 or not names:
        header[rng.choice(("__metadata__", "new", "a.weight", "é"))] = copy.deepcopy(rng.choice(_VALUES))
    elif change == 1:
        one, two = rng.choice(names), rng.choice(names)
        header[one], header[two] = header[two], header[one]
    elif change == 2:
        del header[rng.choice(names)]
    elif change == 3:
        header[rng.choice((*names, "copy"))] = copy.deepcopy(header[rng.choice(names)])
    elif change == 4:
        name = rng.choice(names)
        if isinstance(header[name], dict):
            header[name][rng.choice(("dtype", "shape", "data_offsets", "extra"))] = copy.deepcopy(rng.choice(_VALUES))
    elif change == 5:
        entry = header[rng.choice(names)]
        if isinstance(entry, dict) and entry:
            entry.pop(rng.choice(list(entry)))
    else:
        entry = header[rng.choice(names)]
        numbers = entry.get(rng.choice(("shape", "data_offsets"))) if isinstance(entry, dict) else None
        if isinstance(numbers, list) and numbers:
            at = rng.randrange(len(numbers))
            numbers[at] = rng.choice(
                (
                    0,
                    1,
                    2,
                    3,
                    4,
                    8,
                    12,
                    numbers[at] if not isinstance(numbers[at], int) else numbers[at] + 1,
                    -1,
                    2**40,
                    2**62,
                )
            )


def _mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.55:
        header = json.loads(text)
        for _ in range(rng.choice((1, 1, 2))):
            _mutate_header(header, rng)
        text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode()
    if rng.random() < 0.45:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(_PIECES) + text[at + rng.choice((0, 0, 1, 2, 4)) :]
    if rng.random() < 0.1:
        data = rng.choice((data[:-1], data + b"\0", b""))
    length = len(text) + (rng.choice((-1, 1, -8, 8, 2**40)) if rng.random() < 0.05 else 0)
    content = struct.pack("<Q", max(length, 0)) + text + data
    return _flip(content, rng) if rng.random() < 0.2 else content


def _safetensors(rng: random.Random) -> dict[str, bytes]:
    return {"model.safetensors": _mutate_safetensors(rng.choice(_safetensors_states()), rng)}


# GGUF


def _gguf(rng: random.Random) -> dict[str, bytes]:
    """A file whose header is put together of odd parts, or a sound one with bytes of its header changed."""
    tensors = {
        "a.weight": (0, (2, 3), bytes(range(24))),
        "b.weight": (8, (2, 64), bytes(range(136))),
        "c": (30, (5,), bytes(range(10))),
        "d": (12, (256,), bytes(range(144))),
        "n": (27, (1,), bytes(8)),
    }
    metadata = [
        gguf_files.string("general.architecture", "wan"),
        gguf_files.number("general.alignment", 32),
        gguf_files.integers("sizes", [1, 2, 3]),
    ]
    if rng.random() < 0.5:
        content = gguf_files.gguf_bytes(tensors, rng.sample(metadata, rng.randrange(4)))
        end = len(content) - 500
        changed = _flip(content[:end], rng) if rng.random() < 0.9 else content[:end]
        return {"model.gguf": changed + content[end:] if rng.random() < 0.9 else changed}
    return {"model.gguf": _odd_gguf(rng, metadata)}


def _odd_gguf(rng: random.Random, metadata: list[bytes]) -> bytes:
    sizes = (0, 1, 2, 31, 32, 64, 256, 2**31, 2**40, 2**63)
    infos = []
    for i in range(rng.randrange(4)):
        dims = [
            rng.choice(sizes[:7] if rng.random() < 0.9 else sizes) for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 5)))
        ]
        name = rng.choice((f"t{i}", "same", "", "é", b"\xff"))
        infos.append(gguf_files.tensor_info(name, dims, rng.choice((0, 1, 8, 12, 30, 27, 99)), 32 * rng.randrange(5)))
    metadata = metadata[: rng.randrange(4)] + (
        [gguf_files.number("general.alignment", rng.choice(sizes[:7]))] * (i % 2) if infos else []
    )
    counts = {} if rng.random() < 0.8 else {rng.choice(("n_tensors", "n_keys")): rng.choice((0, 1, 5, 2**32, 2**63))}
    head = gguf_files.header(infos, metadata, version=rng.choice((2, 3, 3, 3, 1, 4)), **counts)
    return gguf_files.padded(head) + bytes(rng.choice((0, 31, 256, 4096)))


# Indexes


@cache
def _shards() -> dict[str, bytes]:
    one = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    two = {"c": torch.tensor([1, 2, 3]), "d": torch.empty(0)}
    return {"model-00001-of-00002.safetensors": save(one), "model-00002-of-00002.safetensors": save(two)}


def _index(rng: random.Random) -> dict[str, bytes]:
    shards = dict(_shards())
    first, second = shards
    weight_map: dict[str, Any] = {"a": first, "b": first, "c": second, "d": second}
    index: dict[str, Any] = {"metadata": {"total_size": 44}, "weight_map": weight_map}
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(weight_map) or ["a"])
        change = rng.randrange(7)
        if change == 0:
            weight_map.pop(name, None)
        elif change == 1:
            weight_map[rng.choice(("new", "", "é", name))] = rng.choice((first, second, "gone.safetensors"))
        elif change == 2:
            weight_map[name] = rng.choice(
                (None, 1, [first], "", ".", "..", f"./{first}", f"../{first}", f"/{first}", first + "\0", second)
            )
        elif change == 3:
            index[rng.choice(("metadata", "weight_map", "extra"))] = copy.deepcopy(rng.choice(_VALUES))
        elif change == 4:
            index.pop(rng.choice(list(index) or ["x"]), None)
        elif change == 5:
            shards[first], shards[second] = shards[second], shards[first]
        else:
            shard = rng.choice((first, second))
            shards[shard] = _mutate_safetensors(_shards()[shard], rng)
    text = json.dumps(index).encode()
    if rng.random() < 0.4:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(_PIECES) + text[at + rng.choice((0, 0, 1, 2, 4)) :]
    if rng.random() < 0.1:
        text = _flip(text, rng)
    return {"model.safetensors.index.json": text, **shards}
