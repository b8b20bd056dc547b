"""Checkpoints for the tests of loads, and comparing what comes of them."""

import itertools
import json

import safetensors
import safetensors.torch
import torch
import versions

MiB = 1 << 20
IO = ["auto", "mapped", "direct", "buffered"]
DTYPES = list(versions.DTYPES.values())
SHAPES = [(), (0,), (1,), (3,), (5, 7), (2, 0, 3), (1, 1, 13, 1)]
ST_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int16": "I16",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


def random_tensor(dtype, shape, seed=0):
    """Random bits: NaNs, infinities and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).to(torch.bool)
    count = 1
    for n in shape:
        count *= n
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def zoo(dtypes=DTYPES):
    """Every dtype in every awkward shape, with odd single bytes in between."""
    out = {}
    for i, (dtype, shape) in enumerate(itertools.product(dtypes, SHAPES)):
        out[f"{i:03d}.{dtype}.{'x'.join(map(str, shape))}"] = random_tensor(dtype, shape, seed=i)
        out[f"{i:03d}.odd"] = random_tensor(torch.uint8, (i % 3 * 2 + 1,), seed=i)
    return out


def weights(n=6, nbytes=100_000, dtype=torch.float32):
    """Finite floats of odd sizes."""
    generator = torch.Generator().manual_seed(n)
    count = nbytes // dtype.itemsize
    return {f"layer.{i}.weight": torch.randn(count + i, generator=generator).to(dtype) for i in range(n)}


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def same_dicts(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        same(actual[name], tensor)


def storable(tensors):
    """Those that the installed safetensors can write."""
    out = {}
    for name, tensor in tensors.items():
        try:
            safetensors.torch.save({name: tensor})
        except (KeyError, ValueError, safetensors.SafetensorError):
            continue
        out[name] = tensor
    return out


def write_by_hand(path, tensors, *, header_remainder=0):
    """A safetensors file with the tensors in this order and its data section at `header_remainder` modulo 16."""
    header, position = {}, 0
    for name, t in tensors.items():
        entry = {"dtype": ST_NAMES[str(t.dtype)[6:]], "shape": list(t.shape)}
        header[name] = entry | {"data_offsets": [position, position + t.nbytes]}
        position += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * ((header_remainder - 8 - len(text)) % 16)
    data = b"".join(bits(t).numpy().tobytes() for t in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write(kind, directory, tensors):
    """A checkpoint of one kind; returns its path."""
    names = list(tensors)
    halves = [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]
    match kind:
        case "safetensors":
            path = directory / "model.safetensors"
            safetensors.torch.save_file(tensors, path)
        case "pth":
            path = directory / "model.pth"
            torch.save(tensors, path)
        case "sharded safetensors":
            path = directory / "model.safetensors.index.json"
            shards = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
            for shard, half in zip(shards, halves, strict=True):
                safetensors.torch.save_file(half, directory / shard)
            weight_map = {n: shard for shard, half in zip(shards, halves, strict=True) for n in half}
            path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        case "list of pth":
            path = [directory / "a.pth", directory / "b.pth"]
            for p, half in zip(path, halves, strict=True):
                torch.save(half, p)
        case "list of safetensors":
            path = [directory / "a.safetensors", directory / "b.safetensors"]
            for p, half in zip(path, halves, strict=True):
                safetensors.torch.save_file(half, p)
        case "legacy pickle":
            path = directory / "legacy.pt"
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def read_by_others(path):
    """What safetensors and torch give."""
    paths = path if isinstance(path, list) else [path]
    if str(paths[0]).endswith(".json"):
        paths = sorted(paths[0].parent.glob("*.safetensors"))
    out = {}
    for p in paths:
        by_torch = p.suffix != ".safetensors"
        out |= torch.load(p, weights_only=True) if by_torch else safetensors.torch.load_file(p)
    return out


KINDS = ["safetensors", "pth", "sharded safetensors", "list of pth"]
