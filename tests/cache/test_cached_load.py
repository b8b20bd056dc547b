"""Loads through the converted cache: bit for bit what the source gives, whatever happens to source, entry, tensors."""

import itertools
import logging
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from entries import flip, left_over  # noqa: E402
from loader_cases import MiB, random_tensor, same, write  # noqa: E402
from programs import run  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import nn  # noqa: E402
from versions import DTYPES, IN_SAFETENSORS, needs_dtype  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.cache.cached_load import read_segments  # noqa: E402
from wan_loader.cache.checksums import check_entry  # noqa: E402
from wan_loader.cache.loaded_tensors import TensorSegment  # noqa: E402
from wan_loader.cache.manifest import EntryFile, digest, parse_manifest  # noqa: E402
from wan_loader.cache.outline import outline_file  # noqa: E402
from wan_loader.cache.store import Store  # noqa: E402
from wan_loader.dtypes import FLOATING, ITEMSIZE  # noqa: E402
from wan_loader.engine.activity import loading  # noqa: E402

SHAPES = [(), (0,), (1,), (3,), (1023,), (2, 0, 3), (5, 7)]


def zoo(names=tuple(IN_SAFETENSORS)):
    out = {}
    for i, (dtype, shape) in enumerate(itertools.product(names, SHAPES)):
        if dtype == "float4_e2m1fn_x2" and not shape:  # safetensors knows only pairs, as a dimension
            continue
        out[f"{i:03d}.{dtype}.norm.{shape}"] = random_tensor(getattr(torch, dtype), shape, i)
    return out


def weights():
    """One tensor that is written from memory, and small and odd ones that are read again."""
    torch.manual_seed(5)
    return {
        "big": torch.randn(600, 1024),
        "odd.weight": torch.randn(1023),
        "norm.weight": torch.randn(64),
        "scalar": torch.tensor(1.1),
        "empty": torch.empty(0, 4),
        "steps": torch.arange(7),
        "last.weight": torch.randn(3, 333),
    }


def converted(tensors, dtype, keep=()):
    def convert(name, t):
        if str(t.dtype)[6:] not in FLOATING:
            return t
        return t.to(torch.float32 if any(part in name.split(".") for part in keep) else dtype)

    return {name: convert(name, t) for name, t in tensors.items()}


def same_dicts(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        same(actual[name], tensor)


def in_file_order(path, tensors):
    return {name: tensors[name] for name in wan_loader.open_checkpoint(path).names}


def load(path, cache, state=None, **options):
    """Load with the cache, wait for the entry; `state` is what the report must say."""
    loaded = wan_loader.load(path, cache=True, cache_dir=cache, **{"dtype": "bf16", **options})
    if state is not None:
        assert loaded.report.cache.state == state, loaded.report.cache
    if loaded.build is not None:
        assert loaded.build.wait(60)
        assert loaded.build.failure is None
    return loaded


def entries(cache):
    return sorted((cache / "entries").iterdir())


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    return write("safetensors", tmp_path, weights())


# bit for bit


@pytest.mark.parametrize("keep", [(), ("norm", "float64")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"])
def test_every_dtype_and_shape(tmp_path, cache, dtype, keep):
    tensors = zoo()
    path = write("pth", tmp_path, tensors)
    options = {"dtype": dtype, "keep_fp32": keep}
    expected = converted(in_file_order(path, tensors), getattr(torch, dtype), keep)
    same_dicts(load(path, cache, "building", **options).tensors, expected)
    same_dicts(load(path, cache, "hit", **options).tensors, expected)
    same_dicts(load(path, cache, "hit", verify=True, **options).tensors, expected)
    assert not left_over(cache)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "sharded safetensors", "list of safetensors"])
@pytest.mark.parametrize("mode", ["auto", "mapped", "direct", "buffered"])
def test_every_kind_and_way(tmp_path, device, cache, kind, mode):
    path = write(kind, tmp_path, weights())
    options = {"device": device, "io": mode, "keep_fp32": ["norm"]}
    expected = converted(in_file_order(path, weights()), torch.bfloat16, ["norm"])
    for state in ("building", "hit", "hit"):
        loaded = load(path, cache, state, verify=state == "hit", **options)
        same_dicts(loaded.tensors, expected)
        assert {t.device.type for t in loaded.tensors.values()} == {device}
        assert not loaded.report.warnings
    assert len(entries(cache)) == 1


def test_an_entry_is_an_ordinary_safetensors_file(path, cache):
    load(path, cache)
    (entry,) = entries(cache)
    file = entry / "model.safetensors"
    read = safetensors.torch.load_file(file)
    expected = converted(weights(), torch.bfloat16)
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        same(read[name], tensor)
    header_nbytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert header_nbytes % 4096 == 0
    with safe_open(file, framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
    checkpoint = wan_loader.open_checkpoint(file)
    assert all(checkpoint.storages[t.storage].start % ITEMSIZE[t.dtype] == 0 for t in checkpoint.tensors), (
        "every tensor can be mapped as it lies"
    )
    assert [n for n in checkpoint.names if not n.startswith(("odd", "scalar", "last"))] == [
        n for n in wan_loader.open_checkpoint(path).names if not n.startswith(("odd", "scalar", "last"))
    ]
    assert entry.stat().st_mode & 0o777 == 0o700
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("first", [["last.weight", "big"], None])
def test_a_selection_in_its_order(path, cache, first, verify):
    """The entry holds everything, whatever was selected when it was made."""
    load(path, cache, "building", names=first)
    expected = converted(weights(), torch.bfloat16)
    for names in (["steps", "odd.weight"], ["big"], list(reversed(expected))):
        loaded = load(path, cache, "hit", names=names, verify=verify)
        same_dicts(loaded.tensors, {n: expected[n] for n in names})
    same_dicts(load(path, cache, "hit").tensors, in_file_order(path, expected))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(700, 1024)
        self.norm = nn.LayerNorm(1024)
        self.head = nn.Linear(1024, 700, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))


def test_load_into_with_key_map_and_tied_weights(tmp_path, device, cache):
    torch.manual_seed(1)
    state = {n: t.detach().clone() for n, t in Net().state_dict().items() if n != "head.weight"}
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file({f"model.{n}": t for n, t in state.items()} | {"other": torch.randn(9)}, path)

    def load_net(dtype="bf16"):
        with torch.device("meta"):
            net = Net()
        report = wan_loader.load_into(
            net,
            path,
            device=device,
            dtype=dtype,
            key_map=lambda name: name.removeprefix("model.") if name.startswith("model.") else None,
            keep_fp32=["norm"],
            cache=True,
            cache_dir=cache,
        )
        assert net.head.weight is net.embed.weight
        loaded = dict(net.state_dict())
        del loaded["head.weight"]
        for name, tensor in converted(state, torch.bfloat16, ["norm"]).items():
            same(loaded[name], tensor)
        return report.cache.state

    assert load_net() == "building"
    from wan_loader.cache.build import wait_for_builds

    wait_for_builds()
    assert load_net() == "hit"
    assert len(entries(cache)) == 1


def test_another_rule_is_another_entry(path, cache):
    for dtype, keep in (("bf16", ()), ("fp16", ()), ("bf16", ("norm",))):
        load(path, cache, "building", dtype=dtype, keep_fp32=keep)
    assert len(entries(cache)) == 3
    for dtype, keep in (("bf16", ()), ("fp16", ()), ("bf16", ("norm",))):
        expected = converted(weights(), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype], keep)
        same_dicts(load(path, cache, "hit", dtype=dtype, keep_fp32=keep).tensors, in_file_order(path, expected))


def test_nothing_to_convert_needs_no_entry(path, cache):
    for dtype in (None, "fp32"):
        loaded = load(path, cache, "source", dtype=dtype)
        assert "nothing is converted" in loaded.report.cache.reason
    assert not cache.exists()


def test_shared_memory_is_not_cached(tmp_path, cache):
    base = torch.randn(20, 30)
    torch.save({"base": base, "row": base[3]}, tmp_path / "m.pth")
    loaded = load(tmp_path / "m.pth", cache, "source")
    assert "shares its memory" in loaded.report.cache.reason
    same(loaded.tensors["row"], base[3].bfloat16())


@needs_dtype("float4_e2m1fn_x2")
def test_a_single_packed_pair_is_not_cached(tmp_path, cache):
    tensors = {"pair": random_tensor(DTYPES["float4_e2m1fn_x2"], ()), "w": torch.randn(9)}
    torch.save(tensors, tmp_path / "m.pth")
    loaded = load(tmp_path / "m.pth", cache, "source")
    assert "single pair" in loaded.report.cache.reason
    same_dicts(loaded.tensors, converted(tensors, torch.bfloat16))


def test_tensors_outlive_their_entry(path, cache):
    load(path, cache)
    tensors = load(path, cache, "hit").tensors
    store = Store(cache)
    assert len(store.prune(max_size=1)) == 1
    assert not entries(cache)
    same_dicts(tensors, in_file_order(path, converted(weights(), torch.bfloat16)))
    tensors["big"].zero_()


# the source changes


def rewrite_in_place(path, tensors):
    data = safetensors.torch.save(tensors)
    assert len(data) == path.stat().st_size
    with open(path, "r+b") as f:
        f.write(data)


def change_content(path, tensors):
    path.unlink()
    safetensors.torch.save_file({n: t[:-1] if n == "big" else t for n, t in tensors.items()}, path)


def change_in_place_and_restore_times(path, tensors):
    st = path.stat()
    rewrite_in_place(path, tensors)
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    assert path.stat().st_mtime_ns == st.st_mtime_ns


def replace_by_rename_with_same_times(path, tensors):
    st, beside = path.stat(), path.with_name("beside")
    safetensors.torch.save_file(tensors, beside)
    os.utime(beside, ns=(st.st_atime_ns, st.st_mtime_ns))
    beside.replace(path)


def change_one_byte(path, tensors):
    with open(path, "r+b") as f:
        f.seek(-2, os.SEEK_END)
        f.write(b"\x55")


@pytest.mark.parametrize(
    "change",
    [
        rewrite_in_place,
        change_content,
        change_in_place_and_restore_times,
        replace_by_rename_with_same_times,
        change_one_byte,
        lambda path, tensors: os.utime(path),
    ],
)
def test_a_changed_source_is_never_served_from_the_cache(path, cache, change):
    load(path, cache, "building")
    load(path, cache, "hit")
    change(path, {n: t + 1 for n, t in weights().items()})
    now = converted(safetensors.torch.load_file(path), torch.bfloat16)
    same_dicts(load(path, cache, "building").tensors, in_file_order(path, now))
    same_dicts(load(path, cache, "hit").tensors, in_file_order(path, now))


def test_one_changed_shard_is_enough(tmp_path, cache):
    path = write("sharded safetensors", tmp_path, weights())
    load(path, cache, "building")
    shard = tmp_path / "model-00002-of-00002.safetensors"
    half = {n: t * 2 for n, t in safetensors.torch.load_file(shard).items()}
    rewrite_in_place(shard, half)
    loaded = load(path, cache, "building").tensors
    for name, tensor in half.items():
        same(loaded[name], converted({name: tensor}, torch.bfloat16)[name])
    assert len(entries(cache)) == 2


def test_what_is_written_from_the_source_does_not_lie_in_it(path):
    """A source that is truncated while its entry is written is an error; out of a mapping, it would be a signal."""
    file = outline_file("x", wan_loader.open_checkpoint(path), lambda name, dtype: dtype)
    tensor = next(t for t in file.tensors if t.name == "big")
    (part,) = read_segments(file, [TensorSegment(tensor, 1024, 2048)])
    os.truncate(path, 0)
    same(part, weights()["big"][1:3].reshape(-1))


@pytest.mark.parametrize("restore_times", [False, True])
def test_a_source_changed_while_the_entry_is_written(path, cache, restore_times, caplog):
    """Small tensors are read again: those of the new content must not be served as the old, nor mixed with it."""
    with loading():
        loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
        change = change_in_place_and_restore_times if restore_times else rewrite_in_place
        change(path, {n: t + 1 for n, t in weights().items()})
    loaded.build.wait()
    assert re.search("was (changed|modified) while", loaded.build.failure)
    assert not entries(cache)
    assert not left_over(cache)
    assert len(caplog.records) == 1
    now = converted(safetensors.torch.load_file(path), torch.bfloat16)
    same_dicts(load(path, cache, "building").tensors, in_file_order(path, now))


def test_changed_at_once_again_and_again(tmp_path, cache):
    """File times are coarse: whatever is loaded is what was in the file at that moment."""
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(300)}, path)
    for i in range(25):
        rewrite_in_place(path, {"w": torch.full((300,), float(i))})
        loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
        assert (loaded.tensors["w"] == i).all(), loaded.report.cache
        if i % 3 == 0 and loaded.build is not None:
            loaded.build.wait()
    from wan_loader.cache.build import wait_for_builds

    wait_for_builds()
    assert (load(path, cache).tensors["w"] == 24).all()


# the tensors change before they are written

CHANGES = {
    "nothing": lambda t: None,
    "zeroed": lambda t: t["big"].zero_(),
    "one element": lambda t: t["big"].view(-1)[-1].add_(1),
    "negated": lambda t: t["big"].neg_(),
    "doubled": lambda t: t["big"].mul_(2),
    "one sign": lambda t: t["big"].view(-1)[3].neg_(),
    "rows turned": lambda t: t["big"].copy_(t["big"].flip(0).clone()),
    "two rows swapped": lambda t: swap(t["big"], 3, 4),
    "two distant rows swapped": lambda t: swap(t["big"], 3, 3 + 509),
    "rolled": lambda t: t["big"].copy_(t["big"].roll(509, 0).clone()),
    "bits rearranged": lambda t: t["big"].copy_(t["big"].view(300, 2, -1).transpose(0, 1).reshape(600, -1).clone()),
    "through .data": lambda t: t["big"].data.add_(1),
    "under a parameter": lambda t: nn.Parameter(t["big"]).data.mul_(3),
    "resized to nothing": lambda t: t["big"].untyped_storage().resize_(0),
    "resized to less": lambda t: t["big"].untyped_storage().resize_(1000),
    "resized to more": lambda t: t["big"].untyped_storage().resize_(4 * MiB),
    "metadata": lambda t: t["big"].t_(),
    "freed": lambda t: t.clear(),
    "other data": lambda t: t["big"].set_(torch.ones(5, dtype=torch.bfloat16, device=t["big"].device)),
}


def swap(tensor, i, j):
    tensor[[i, j]] = tensor[[j, i]].clone()


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_changed_before_they_are_written(path, device, cache, change):
    with loading():
        loaded = wan_loader.load(path, device=device, dtype="bf16", cache=True, cache_dir=cache)
        build, tensors = loaded.build, loaded.tensors
        del loaded
        CHANGES[change](tensors)
        assert build.nbytes_written == 0
    build.wait()
    assert build.failure is None
    big = weights()["big"].numel() * 2
    untouched = change in ("nothing", "metadata", "resized to more")
    assert (build.nbytes_from_source < big) == untouched, "what is as it was is not read again, what is not, is"
    del tensors
    expected = in_file_order(path, converted(weights(), torch.bfloat16))
    same_dicts(load(path, cache, "hit", verify=True, device=device).tensors, expected)


@pytest.mark.parametrize("change", ["resized to nothing", "freed", "resized to less"])
def test_zeros_that_go_away(tmp_path, cache, change):
    """Sums of nothing are the sums of zeros."""
    path = tmp_path / "m.safetensors"
    tensors = {"big": torch.zeros(700, 1024), "other": torch.randn(9)}
    safetensors.torch.save_file(tensors, path)
    with loading():
        loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
        CHANGES[change](loaded.tensors)
    loaded.build.wait()
    expected = in_file_order(path, converted(tensors, torch.bfloat16))
    same_dicts(load(path, cache, "hit", verify=True).tensors, expected)


def test_training_begins_while_the_entry_is_written(tmp_path, cache):
    """No hook, no lock: weights change all the time, and the entry is right."""
    tensors = {f"w{i}": torch.randn(600, 1024) for i in range(12)}
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(tensors, path)
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
    while not loaded.build.wait(0):
        for tensor in loaded.tensors.values():
            tensor.add_(0.5)
    assert loaded.build.failure is None
    same_dicts(load(path, cache, "hit").tensors, in_file_order(path, converted(tensors, torch.bfloat16)))


# the entry is damaged


def header_of(entry):
    return (entry / "model.safetensors").read_bytes()[:4096]


def as_truncated(entry):
    (entry / "model.safetensors").chmod(0o600)
    os.truncate(entry / "model.safetensors", 5000)


def as_link(entry):
    away = entry.parent.parent.parent / "away"
    entry.rename(away)
    entry.symlink_to(away)


def as_linked_file(entry):
    file = entry / "model.safetensors"
    away = entry.parent.parent.parent / "away.safetensors"
    file.rename(away)
    file.symlink_to(away)


def as_file(entry):
    shutil.rmtree(entry)
    entry.write_text("?")


DAMAGE = {
    "header": lambda e: flip(e / "model.safetensors", 20),
    "header that still parses": lambda e: flip(e / "model.safetensors", header_of(e).index(b'"pt"') + 1),
    "header length": lambda e: flip(e / "model.safetensors", 1),
    "padding": lambda e: flip(e / "model.safetensors", 4090),
    "manifest": lambda e: flip(e / "manifest.json", 30),
    "manifest's end": lambda e: flip(e / "manifest.json", os.path.getsize(e / "manifest.json") - 1),
    "manifest empty": lambda e: os.truncate((flip(e / "manifest.json", 0), e / "manifest.json")[1], 0),
    "manifest gone": lambda e: (e / "manifest.json").unlink(),
    "file gone": lambda e: (e / "model.safetensors").unlink(),
    "truncated": as_truncated,
    "a link": as_link,
    "a broken link": lambda e: (shutil.rmtree(e), e.symlink_to("/nowhere")),
    "a file": as_file,
    "linked file": as_linked_file,
    "another's manifest": lambda e: None,
}
DATA = {
    "data begin": lambda e: flip(e / "model.safetensors", 4096),
    "data middle": lambda e: flip(e / "model.safetensors", 700_001),
    "data end": lambda e: flip(e / "model.safetensors", os.path.getsize(e / "model.safetensors") - 1),
}


def flip_on_the_disk(entry, position):
    """A disk that flips a bit does not touch the file's times; here, the manifest is made to agree with them."""
    file, place = entry / "model.safetensors", entry / "manifest.json"
    flip(file, position)
    manifest, st = parse_manifest(place.read_bytes(), str(place)), file.stat()
    dated = replace(manifest.files[0], mtime_ns=st.st_mtime_ns, ctime_ns=st.st_ctime_ns)
    place.chmod(0o600)
    place.write_bytes(replace(manifest, files=(dated,)).to_bytes())


def found_and_repaired(path, cache, verify, **options):
    expected = in_file_order(path, converted(weights(), torch.bfloat16))
    names = options.get("names") or list(expected)
    loaded = load(path, cache, "building", verify=verify, **options)
    same_dicts(loaded.tensors, {n: expected[n] for n in names})
    assert any("set aside" in w and "built again" in w for w in loaded.report.warnings), loaded.report.warnings
    loaded = load(path, cache, "hit", verify=True)
    same_dicts(loaded.tensors, expected)
    assert not loaded.report.warnings
    assert len(list((cache / "damaged").iterdir())) == 1
    assert not left_over(cache)


@pytest.mark.parametrize("damage", [*DAMAGE, *DATA])
def test_damage_that_every_load_finds(path, cache, damage):
    load(path, cache, "building")
    (entry,) = entries(cache)
    if damage == "another's manifest":
        load(path, cache, "building", dtype="fp16")
        (other,) = (e for e in entries(cache) if e != entry)
        (entry / "manifest.json").unlink()
        shutil.copy(other / "manifest.json", entry / "manifest.json")
    (DAMAGE | DATA)[damage](entry)
    found_and_repaired(path, cache, verify=False)
    away = path.parent / "away"
    assert not away.exists() or len(list(away.iterdir())) == 2, "what a link led to is left alone"


@pytest.mark.parametrize("names", [None, ["norm.weight"]])
@pytest.mark.parametrize("position", [4096, 700_001, -1])
def test_damage_that_verify_finds(path, cache, position, names):
    load(path, cache, "building")
    (entry,) = entries(cache)
    flip_on_the_disk(entry, position % (entry / "model.safetensors").stat().st_size)
    assert load(path, cache, "hit").tensors, "nothing but a checksum tells"
    found_and_repaired(path, cache, verify=True, names=names)


@pytest.mark.parametrize("names", [None, ["norm.weight"]])
def test_a_flipped_bit_whose_time_was_put_back(path, cache, names):
    load(path, cache, "building")
    (entry,) = entries(cache)
    file = entry / "model.safetensors"
    st = file.stat()
    flip(file, 700_001)
    os.utime(file, ns=(st.st_atime_ns, st.st_mtime_ns))
    found_and_repaired(path, cache, verify=False, names=names)


def test_an_entry_whose_modes_were_changed_is_served(path, cache):
    expected = load(path, cache, "building").tensors
    (entry,) = entries(cache)
    (entry / "model.safetensors").chmod(0o444)
    loaded = load(path, cache, "hit")
    assert "checksums" in loaded.report.cache.reason
    same_dicts(loaded.tensors, expected)


def test_verify_finds_a_flipped_bit_in_every_block(tmp_path, device, cache):
    """Blocks are 16 MiB: a file of three."""
    tensors = {"a": torch.randn(9 * MiB), "b": torch.randn(10 * MiB + 1), "c": torch.randn(5)}
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(tensors, path)
    expected = in_file_order(path, converted(tensors, torch.bfloat16))
    load(path, cache, "building")
    (entry,) = entries(cache)
    assert len(Store(cache).find(entry.name).manifest.files[0].blocks) == 4
    same_dicts(load(path, cache, "hit", verify=True, device=device).tensors, expected)
    for position in (16 * MiB - 1, 16 * MiB, 33 * MiB):
        flip_on_the_disk(entry, position)
        loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache, verify=True, device=device)
        same_dicts(loaded.tensors, expected)
        assert any("do not match their checksum" in w for w in loaded.report.warnings)
        assert loaded.build.wait(60)
        shutil.rmtree(entry)  # and on with the old one, repaired
        (cache / "damaged" / entry.name).rename(entry)
        flip_on_the_disk(entry, position)


def test_a_module_is_filled_once_although_its_entry_was_damaged(tmp_path, cache):
    torch.manual_seed(2)
    reference = nn.Linear(800, 800)
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(reference.state_dict(), path)
    load(path, cache, "building")
    flip_on_the_disk(*entries(cache), 700_001)
    with torch.device("meta"):
        module = nn.Linear(800, 800)
    report = wan_loader.load_into(module, path, device="cpu", dtype="bf16", cache=True, cache_dir=cache, verify=True)
    assert report.cache.state == "building"
    same(module.weight, reference.weight.bfloat16())
    from wan_loader.cache.build import wait_for_builds

    wait_for_builds()


def test_an_entry_that_fits_its_checksums_and_is_no_checkpoint(path, cache):
    """Written wrongly in the first place: its file ends before its last tensor."""
    load(path, cache, "building")
    (entry,) = entries(cache)
    file, place = entry / "model.safetensors", entry / "manifest.json"
    header_nbytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.chmod(0o600)
    place.chmod(0o600)
    os.truncate(file, header_nbytes + 100)
    manifest = parse_manifest(place.read_bytes(), str(place))
    short = EntryFile("model.safetensors", header_nbytes + 100, header_nbytes, ())
    blocks = tuple(digest(file.read_bytes()[a:b]) for a, b in short.ranges())
    place.write_bytes(replace(manifest, files=(replace(short, blocks=blocks),)).to_bytes())
    assert check_entry(entry, Store(cache).find(entry.name).manifest) == []
    found_and_repaired(path, cache, verify=False)


@pytest.mark.parametrize("what", ["no file", "another file", "other tensors"])
def test_an_entry_that_is_sound_and_of_something_else(path, cache, what):
    load(path, cache, "building")
    (entry,) = entries(cache)
    place, file = entry / "manifest.json", entry / ("model.safetensors" if what == "other tensors" else "b.safetensors")
    manifest = parse_manifest(place.read_bytes(), str(place))
    file.unlink(missing_ok=True)
    safetensors.torch.save_file({"x": torch.zeros(9)}, file)
    header_nbytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    made = EntryFile(file.name, file.stat().st_size, header_nbytes, ())
    made = replace(made, blocks=tuple(digest(file.read_bytes()[a:b]) for a, b in made.ranges()))
    place.chmod(0o600)
    place.write_bytes(replace(manifest, files=() if what == "no file" else (made,)).to_bytes())
    found_and_repaired(path, cache, verify=False)


def test_a_newer_version_s_manifest_is_not_used(path, cache):
    load(path, cache, "building")
    (entry,) = entries(cache)
    manifest = entry / "manifest.json"
    text = manifest.read_bytes().replace(b'"format_version": 1', b'"format_version": 2')
    manifest.chmod(0o600)
    manifest.write_bytes(text)
    loaded = load(path, cache, "building")
    assert any("format version 2" in w for w in loaded.report.warnings)
    same_dicts(loaded.tensors, in_file_order(path, converted(weights(), torch.bfloat16)))


# the cache directory is unusable


def with_warning(path, cache, *words, **options):
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache, **options)
    assert loaded.build is None
    assert loaded.report.cache.state == "source"
    (warning,) = loaded.report.warnings
    for word in ("the cache cannot be used", *words):
        assert word in warning
    same_dicts(loaded.tensors, in_file_order(path, converted(weights(), torch.bfloat16)))


def test_a_link(path, cache, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "real")
    with_warning(path, cache, "is a link")
    assert not list((tmp_path / "real").iterdir())


def test_a_room_that_is_a_link(path, cache, tmp_path):
    Store(cache)
    (tmp_path / "real").mkdir(mode=0o700)
    (cache / "entries").rmdir()
    (cache / "entries").symlink_to(tmp_path / "real")
    with_warning(path, cache, "is a link")


def test_a_file(path, cache):
    cache.write_text("mine")
    with_warning(path, cache)
    assert cache.read_text() == "mine"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_others_can_write(path, cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with_warning(path, cache, "can be written by others", "chmod go-w")
    assert not list(cache.iterdir())


def test_a_directory_that_is_used_for_something_else(path, cache):
    (cache / "trash").mkdir(parents=True, mode=0o700)
    (cache / "trash" / "precious").write_text("mine")
    cache.chmod(0o700)
    with_warning(path, cache, "holds other things")
    assert [p.name for p in cache.iterdir()] == ["trash"]
    assert (cache / "trash" / "precious").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_somebody_else_s(path, cache):
    cache.mkdir(mode=0o700)
    os.chown(cache, 65534, 65534)
    with_warning(path, cache, "belongs to user 65534")


def test_an_operating_system_error_in_the_cache_is_not_the_end(path, cache, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    with_warning(path, cache, "Input/output error")
    assert not left_over(cache)


def test_a_missing_source_is_the_source_s_error(tmp_path, cache):
    with pytest.raises(wan_loader.MissingFileError):
        wan_loader.load_file(tmp_path / "none.safetensors", dtype="bf16", cache=True, cache_dir=cache)


def test_a_failing_load_leaves_nothing(path, cache):
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size - 10)
    with pytest.raises(wan_loader.CheckpointError):
        wan_loader.load_file(path, dtype="bf16", cache=True, cache_dir=cache)
    assert not cache.exists() or not left_over(cache)


AS_NOBODY = """
import os, sys, wan_loader
path, warm, *caches = sys.argv[1:]
wan_loader.load(path, dtype="bf16", cache=True, cache_dir=warm).build.wait()  # imports what the other user may not read
os.system(f"chmod -R a+rX {warm}")
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
for cache in (*caches, warm):
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
    print(loaded.report.cache.state, loaded.build, len(loaded.tensors), loaded.report.warnings)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_directories_that_may_not_be_written(path):
    """Not even by the owner; or somebody else's. A directory of root's that may be read does serve."""
    directory = Path(tempfile.mkdtemp())
    try:
        directory.chmod(0o755)
        model, warm = directory / "m.safetensors", directory / "warm"
        shutil.copy(path, model)
        model.chmod(0o644)
        caches = []
        for i, (mode, owner) in enumerate([(0o500, 65534), (0o000, 65534), (0o700, 0), (0o755, 0)]):
            caches.append(directory / f"cache {i}")
            caches[-1].mkdir()
            os.chown(caches[-1], owner, owner)
            caches[-1].chmod(mode)
        done = run("-c", AS_NOBODY, model, warm, *caches)
        assert done.returncode == 0, done.stderr
        *refused, served = done.stdout.splitlines()
        assert len(refused) == 4
        for line in refused:
            assert line.startswith("source None 7 ('the cache cannot be used: ")
            assert "Permission denied" in line
        assert served == "hit None 7 ()"
        assert not any(list(cache.iterdir()) for cache in caches)
    finally:
        shutil.rmtree(directory)


# names


@pytest.mark.parametrize("name", ["with space", "日本語 ü", "a" * 250, "semi;colon'\"$(x)", "line\nbreak", "\udcff"])
def test_awkward_paths(tmp_path, name):
    directory = tmp_path / name
    directory.mkdir()
    path = write("safetensors", directory, weights())
    cache = directory / "cache dir"
    expected = in_file_order(path, converted(weights(), torch.bfloat16))
    same_dicts(load(path, cache, "building").tensors, expected)
    same_dicts(load(path, cache, "hit").tensors, expected)


def test_a_long_path(tmp_path):
    directory = tmp_path / ("d" * 150) / ("e" * 150) / ("f" * 150)
    directory.mkdir(parents=True)
    path = write("safetensors", directory, weights())
    cache = directory / "cache"
    load(path, cache, "building")
    load(path, cache, "hit")


def test_the_same_name_elsewhere_is_another_source(tmp_path, cache):
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        write("safetensors", tmp_path / f"{i}", {"w": torch.full((9,), float(i))})
    for i in range(2):
        assert (load(tmp_path / f"{i}", cache, "building").tensors["w"] == i).all()
    for i in range(2):
        assert (load(tmp_path / f"{i}", cache, "hit").tensors["w"] == i).all()


# side by side


def test_who_comes_second_loads_the_source(path, cache):
    with loading():
        first = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
        second = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
        assert second.build is None
        assert re.search("another .*is writing", second.report.cache.reason)
        assert not second.report.warnings
    first.build.wait()
    same_dicts(second.tensors, first.tensors)
    assert check_entry(first.build.path, Store(cache).find(first.build.path.name).manifest) == []


def test_the_library_is_silent(path, cache, capfd, caplog):
    caplog.set_level(logging.INFO)
    load(path, cache)
    load(path, cache)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
