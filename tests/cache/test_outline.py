"""What an entry holds and what it is called: order, alignment, header, and everything that must make another key."""

import json
import os
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from wan_loader.cache.outline import Outline, outline_file, safetensors_header, why_not  # noqa: E402
from wan_loader.dtypes import ITEMSIZE  # noqa: E402
from wan_loader.errors import CacheError, CheckpointError  # noqa: E402
from wan_loader.formats import open_checkpoint  # noqa: E402
from wan_loader.plan.dtype_policy import DtypePolicy  # noqa: E402


def outline(path, dtype="bfloat16", keep=(), small=None, **options):
    checkpoint = open_checkpoint(path)
    file = outline_file("model.safetensors", checkpoint, DtypePolicy(dtype, keep).target, **options)
    return Outline(str(path), dtype, (file,), small or {})


def key(path, *arguments, **options):
    made = outline(path, *arguments, **options)
    return made.key(made.sources)


@pytest.fixture
def path(tmp_path):
    tensors = {"a.w": torch.randn(12), "b.odd": torch.randn(3), "c.norm": torch.randn(4), "d.one": torch.randn(())}
    tensors["e.flags"] = torch.tensor([True, False, True])
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_odd_sizes_come_last_largest_elements_first(path):
    in_file = list(open_checkpoint(path).names)
    file = outline(path, keep=("d",)).files[0]
    names = [t.name for t in file.tensors]
    whole = [n for n in in_file if n in ("a.w", "c.norm")]
    assert names == [*whole, "d.one", "b.odd", "e.flags"]
    position = 0
    for tensor in file.tensors:
        assert position % ITEMSIZE[tensor.dtype] == 0
        position += tensor.nbytes
    assert file.nbytes == position == 24 + 8 + 4 + 6 + 3


def test_order_of_first_use(path):
    file = outline(path, order={"c.norm": 0}).files[0]
    assert next(t.name for t in file.tensors) == "c.norm"


def test_names_of_the_entry(path):
    file = outline(path, rename=lambda n: None if n == "a.w" else n.upper()).files[0]
    assert {t.name for t in file.tensors} == {"B.ODD", "C.NORM", "D.ONE", "E.FLAGS"}
    header = safetensors_header(outline(path, rename=lambda n: n.upper()).files[0].tensors)
    assert "A.W" in json.loads(header[8:])


def test_two_tensors_of_one_name_are_refused(path):
    with pytest.raises(CacheError) as error:
        safetensors_header(outline(path, rename=lambda _: "x").files[0].tensors)
    assert error.value.tensor == "x"
    with pytest.raises(CacheError, match="two tensors"):
        safetensors_header(outline(path, rename=lambda n: "__metadata__").files[0].tensors)


@pytest.mark.parametrize("n", [0, 1, 50, 91, 92, 93, 5000])
def test_the_data_begins_at_a_multiple_of_4096(tmp_path, n):
    safetensors.torch.save_file({f"{i:07d}": torch.zeros(2) for i in range(n)} or {"": torch.zeros(1)}, tmp_path / "m")
    os.rename(tmp_path / "m", tmp_path / "m.safetensors")
    header = safetensors_header(outline(tmp_path / "m.safetensors").files[0].tensors)
    assert len(header) % 4096 == 0
    assert int.from_bytes(header[:8], "little") + 8 == len(header)
    assert header[8:9] == b"{"


def test_the_key_is_stable(path):
    assert key(path) == key(path)
    assert len(key(path)) == 32
    assert set(key(path)) <= set("0123456789abcdef")


def test_whatever_the_bytes_depend_on_makes_another_key(path, monkeypatch):
    keys = {
        "as it is": key(path),
        "dtype": key(path, "float16"),
        "keep_fp32": key(path, keep=("norm",)),
        "key map": key(path, rename=lambda n: f"x.{n}"),
        "left out": key(path, rename=lambda n: None if n == "a.w" else n),
        "order": key(path, order={"c.norm": 0}),
        "small file": key(path, small={"config.json": b"{}"}),
        "small file's content": key(path, small={"config.json": b"[]"}),
        "small file's name": key(path, small={"config2.json": b"{}"}),
    }
    made = outline(path)
    for name in ("nbytes", "mtime_ns", "ctime_ns", "inode"):
        source = made.sources[0]
        keys[name] = made.key([replace(source, **{name: getattr(source, name) + 1})])
    keys["name"] = made.key([replace(made.sources[0], path="/elsewhere/n.safetensors")])
    keys["more files"] = made.key([*made.sources, made.sources[0]])
    monkeypatch.setattr("wan_loader.cache.outline.FORMAT_VERSION", 2)
    keys["format"] = key(path)
    assert len(set(keys.values())) == len(keys)


def test_a_moved_directory_is_the_same_source(path, tmp_path):
    before = outline(path)
    elsewhere = replace(before.sources[0], path="/elsewhere/m.safetensors")
    assert before.key(before.sources) == before.key([elsewhere])


def test_sources_that_are_gone(path):
    made = outline(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        _ = made.sources


def test_each_source_is_named_once(tmp_path):
    for name in "ab":
        safetensors.torch.save_file({name: torch.randn(3)}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    file = outline_file("m.safetensors", open_checkpoint(paths), DtypePolicy("bfloat16").target)
    assert [s.path for s in Outline("x", None, (file, file)).sources] == [str(p) for p in paths]


base = torch.randn(4, 5)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"a": base, "b": base[1]}, "shares its memory"),
        ({"a": base.t()}, "not contiguous"),
        ({"a": base[1:]}, "not contiguous|part of a larger"),
        ({"a": base[:2]}, "part of a larger"),
        ({"a": torch.zeros(3, dtype=torch.complex128)}, "complex128"),
        ({"a": torch.randn(3)}, None),
        ({"a": torch.randn(3).to(torch.float8_e5m2), "b": torch.zeros(0), "c": torch.tensor(True)}, None),
    ],
)
def test_what_safetensors_cannot_express(tmp_path, tensors, why):
    torch.save(tensors, tmp_path / "m.pth")
    reason = why_not(outline(tmp_path / "m.pth").files[0])
    if why is None:
        assert reason is None
    else:
        import re

        assert re.search(why, reason)


def test_legacy_pickles_are_left_alone(tmp_path):
    torch.save({"a": base}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert "only torch.load" in why_not(outline(tmp_path / "m.pt").files[0])
