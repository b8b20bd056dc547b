"""Loads of GGUF: the file's own blocks, or the numbers that they stand for."""

import json

import pytest

torch = pytest.importorskip("torch")

from gguf_files import blocks, gguf_bytes, integers, plain  # noqa: E402
from loader_cases import same, same_dicts  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.cli.app import app  # noqa: E402
from wan_loader.errors import CheckpointError, KeyMismatchError, OptionError  # noqa: E402
from wan_loader.formats.gguf import DEQUANTISED  # noqa: E402
from wan_loader.formats.gguf_types import GGUF_TYPES  # noqa: E402
from wan_loader.verify import verify  # noqa: E402

BLOCK_BYTES = {found.name: found.block_nbytes for found in GGUF_TYPES.values()}
NUMBERS = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


def q8_0(numbers):
    """Blocks of a tensor, and the numbers that they stand for; in a few lines of torch."""
    groups = numbers.reshape(-1, 32)
    d = (groups.abs().amax(1, keepdim=True) / 127).half()
    q = (groups / d.float()).round().clamp(-127, 127).to(torch.int8)
    made = torch.cat([d.view(torch.uint8), q.view(torch.uint8)], dim=1)
    return made, (q.float() * d.float()).view(numbers.shape)


BLOCKS, VALUES = q8_0(NUMBERS)
PLAIN = {
    "norm": torch.arange(5.0),
    "half": torch.arange(6, dtype=torch.float16).view(2, 3),
    "bf": torch.arange(3, dtype=torch.bfloat16),
    "steps": torch.tensor([1, 2]),
}
RAW = {"w.weight": BLOCKS.view(64, 544), **PLAIN, "patch": BLOCKS[:8].view(4, 68)}


@pytest.fixture
def path(tmp_path):
    tensors = {
        "w.weight": blocks("Q8_0", (64, 512), BLOCKS),
        **{name: plain(tensor) for name, tensor in PLAIN.items()},
        "patch": blocks("Q8_0", (4, 64), BLOCKS[:8]),
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(tensors, [integers("comfy.gguf.orig_shape.patch", [4, 16, 1, 2, 2])]))
    return path


def numbers(dtype):
    patch = VALUES.reshape(-1, 32)[:8].reshape(4, 16, 1, 2, 2)
    values = {"w.weight": VALUES, **PLAIN, "patch": patch}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in values.items()}


@pytest.mark.parametrize("io", ["auto", "mapped", "buffered", "direct"])
def test_without_a_dtype_the_file_s_own_tensors(path, io):
    loaded = wan_loader.load(path, io=io)
    same_dicts(loaded.tensors, RAW)
    (said,) = [w for w in loaded.report.warnings if "quantised" in w]
    assert "2 quantised tensors (Q8_0): loaded as the blocks" in said
    assert verify(path, loaded.tensors) == len(RAW)


@pytest.mark.parametrize("io", ["auto", "mapped", "buffered", "direct"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_with_a_dtype_numbers(path, dtype, io):
    loaded = wan_loader.load(path, dtype=dtype, io=io)
    same_dicts(loaded.tensors, numbers(dtype))
    assert not [w for w in loaded.report.warnings if "quantised" in w]
    assert loaded.report.nbytes_device == sum(tensor.nbytes for tensor in loaded.tensors.values())
    assert loaded.plan.nbytes_loaded == loaded.report.nbytes_device
    assert "the numbers of 2 tensors (Q8_0)" in str(loaded.plan)
    viewed = {tensor.name for storage in loaded.plan.layout.viewed for tensor in storage.tensors}
    assert viewed.isdisjoint({"w.weight", "patch"}), "this process would be killed if the file shrank"
    assert verify(path, loaded.tensors) == len(RAW)
    loaded.tensors["w.weight"][3, 4] += 1
    with pytest.raises(CheckpointError, match=r"'w\.weight' differs"):
        verify(path, loaded.tensors)


def test_parts_of_a_file(path):
    expected = numbers(torch.bfloat16)
    same_dicts(
        wan_loader.load_file(path, dtype="bf16", names=["patch", "norm"]),
        {name: expected[name] for name in ("patch", "norm")},
    )
    assert list(wan_loader.load_file(path, dtype="bf16", names=["norm", "w.weight"])) == ["norm", "w.weight"]
    kept = wan_loader.load_file(path, dtype="bf16", keep_fp32=["patch"])
    same(kept["patch"], numbers(torch.float32)["patch"])
    same(kept["w.weight"], expected["w.weight"])


def test_one_by_one(path):
    same_dicts(dict(wan_loader.iter_file(path, dtype="bf16")), numbers(torch.bfloat16))
    same_dicts(dict(wan_loader.iter_file(path)), RAW)
    part = dict(wan_loader.iter_file(path, dtype="bf16", slices={"w.weight": (slice(3, 9), slice(5, None, 7))}))
    same(part["w.weight"], VALUES[3:9, 5::7].bfloat16().contiguous())
    assert part["w.weight"].untyped_storage().nbytes() == part["w.weight"].nbytes
    with wan_loader.open_file(path, dtype="bf16") as file:
        for name, expected in numbers(torch.bfloat16).items():
            same(file.get_tensor(name), expected)
        same(file.get_slice("w.weight")[2:4], VALUES[2:4].bfloat16())
        assert file.get_slice("w.weight").get_shape() == [64, 512]
    with wan_loader.open_file(path) as file:
        same(file.get_tensor("w.weight"), RAW["w.weight"])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(512, 64, bias=False)


def test_into_a_module(path):
    keys = {name: None for name in RAW if name != "w.weight"}
    wan_loader.load_into(module := Net(), path, device="cpu", dtype="bf16", key_map=keys)
    same(module.w.weight.data, VALUES.bfloat16())
    with pytest.raises(CheckpointError, match=r"holds quantised tensors.*pass a dtype, such as bf16"):
        wan_loader.load_into(Net(), path, device="cpu", key_map=keys)
    with pytest.raises(KeyMismatchError):
        wan_loader.load_into(torch.nn.Linear(3, 3), path, device="cpu", dtype="bf16")


def test_files_that_are_one_checkpoint(tmp_path):
    for number, name in enumerate("ab", 1):
        content = gguf_bytes(
            {"x" + name: plain(torch.ones(2)), name: blocks("Q8_0", (4, 64), BLOCKS[8 * number :][:8])}
        )
        (tmp_path / f"m-{number:05d}-of-00002.gguf").write_bytes(content)
    loaded = wan_loader.load_file(tmp_path, dtype="float32")
    expected = VALUES.reshape(-1, 32)
    same_dicts(
        loaded,
        {
            "xa": torch.ones(2),
            "a": expected[8:16].reshape(4, 64),
            "xb": torch.ones(2),
            "b": expected[16:24].reshape(4, 64),
        },
    )


@pytest.mark.parametrize("kind", sorted(DEQUANTISED))
def test_every_kind_is_loaded_as_the_gguf_package_reads_it(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    rng = torch.Generator().manual_seed(5)
    content = torch.randint(0, 120, (40, BLOCK_BYTES[kind]), generator=rng, dtype=torch.uint8)
    elements = next(t.block_elements for t in GGUF_TYPES.values() if t.name == kind)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes({"w": blocks(kind, (20, 2 * elements), content)}))
    (read,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    expected = torch.from_numpy(gguf.quants.dequantize(read.data, read.tensor_type))
    for dtype in (torch.float32, torch.bfloat16):
        same(wan_loader.load_file(tmp_path, dtype=dtype)["w"], expected.to(dtype))


def test_a_kind_whose_numbers_are_not_made_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(
        gguf_bytes({"w": blocks("IQ4_XS", (256,), torch.zeros(136, dtype=torch.uint8)), "v": plain(VALUES)})
    )
    assert wan_loader.load_file(path)["w"].shape == (136,)
    assert wan_loader.load_file(path, dtype="bf16", names=["v"])["v"].dtype == torch.bfloat16
    for load in (wan_loader.load_file, lambda *a, **o: dict(wan_loader.iter_file(*a, **o))):
        with pytest.raises(CheckpointError, match="tensor 'w' is quantised as IQ4_XS") as caught:
            load(path, dtype="bf16")
        assert (caught.value.path, caught.value.tensor) == (str(path), "w")
    with wan_loader.open_file(path, dtype="bf16") as file, pytest.raises(CheckpointError, match="IQ4_XS"):
        file.get_tensor("w")


def test_blocks_go_as_numbers_come(path, monkeypatch):
    """Nothing of a load keeps what numbers were made of."""
    import weakref

    from wan_loader.loading import make_values

    seen = []

    def watched(raw, *arguments):
        assert [ref() for ref in seen] == [None] * len(seen), "those before are gone already"
        seen.append(weakref.ref(raw))
        return make_here(raw, *arguments)

    make_here = make_values.dequantise
    monkeypatch.setattr(make_values, "dequantise", watched)
    loaded = wan_loader.load(path, dtype="bf16", cache=False)
    assert len(seen) == 2
    assert [ref() for ref in seen] == [None, None]
    assert loaded.tensors.keys() == RAW.keys()


def test_too_little_memory_is_seen_before(path, monkeypatch):
    from wan_loader.plan import quantised_values

    monkeypatch.setattr(quantised_values, "SCRATCH_BYTES", 1 << 60)
    with pytest.raises(wan_loader.HostMemoryError, match="needs"):
        wan_loader.load_file(path, dtype="bf16")
    wan_loader.load_file(path)


def test_no_room_for_the_numbers_is_an_error_of_ours(path, monkeypatch):
    from wan_loader.loading import make_values

    def fails(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] can't allocate memory")

    monkeypatch.setattr(make_values, "dequantise", fails)
    with pytest.raises(wan_loader.HostMemoryError, match=r"no room for the numbers of 'w\.weight'") as caught:
        wan_loader.load_file(path, dtype="bf16")
    assert caught.value.tensor == "w.weight"


def test_a_file_cut_short_behind_its_header(path):
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(CheckpointError, match="truncated: tensor 'patch'"):
        wan_loader.load_file(path, dtype="bf16")


def test_a_process_of_several_is_refused(path):
    from wan_loader.loading.probe import probe
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.plan.plan import make_plan
    from wan_loader.plan.request import LoadRequest

    request = LoadRequest(source=path, policy=DtypePolicy("bfloat16"), makes_values=True)
    checkpoint = request.open()
    with pytest.raises(OptionError, match="made by one process alone"):
        make_plan(request, checkpoint, probe(checkpoint, request), reads={})


def test_inspect_shows_the_types(path):
    document = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json", "--tensors"]).output)
    assert document["format"] == "gguf"
    assert {row["dtype"]: row["n_tensors"] for row in document["dtypes"]} == {
        "Q8_0": 2,
        "float32": 1,
        "float16": 1,
        "bfloat16": 1,
        "int64": 1,
    }
    rows = {row["name"]: row for row in document["tensors"]}
    assert (rows["w.weight"]["dtype"], rows["w.weight"]["shape"]) == ("Q8_0", [64, 512])
    assert rows["w.weight"]["nbytes"] == RAW["w.weight"].nbytes
    assert rows["patch"]["shape"] == [4, 16, 1, 2, 2]
    assert "Q8_0" in CliRunner().invoke(app, ["inspect", str(path)]).output


@pytest.mark.parametrize(
    "words", [["load", "--verify"], ["estimate"], ["profile", "--no-ceilings"]], ids=lambda w: w[0]
)
def test_commands(path, words):
    for dtype in ([], ["--dtype", "bf16"]):
        done = CliRunner().invoke(app, [*words, str(path), *dtype])
        assert done.exit_code == 0, done.output


def test_a_directory_with_a_copy_in_gguf_is_what_else_it_holds(tmp_path, path):
    from safetensors.torch import save_file

    assert wan_loader.open_checkpoint(tmp_path).format == "gguf"
    save_file({"v": torch.ones(2)}, tmp_path / "diffusion.safetensors")
    both = wan_loader.open_checkpoint(tmp_path)
    assert both.format == "safetensors"
    assert "model.gguf" in both.warnings[0]


@pytest.mark.gpu
@pytest.mark.parametrize("io", ["auto", "mapped", "buffered", "direct"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_has_the_same_numbers(path, dtype, io):
    loaded = wan_loader.load(path, "cuda", dtype=dtype, io=io)
    same_dicts({name: t.cpu() for name, t in loaded.tensors.items()}, numbers(dtype))
    arrived = {name: t.cpu() for name, t in wan_loader.iter_file(path, "cuda", dtype=dtype)}
    same_dicts(arrived, numbers(dtype))
    raw = wan_loader.load_file(path, "cuda", io=io)
    same_dicts({name: t.cpu() for name, t in raw.items()}, RAW)


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_that_of_the_numbers(tmp_path):
    """The blocks of twenty tensors of 8 MiB, which become 15 MiB each: they are never all there beside the numbers."""
    many = BLOCKS.repeat(240, 1)
    tensors = {f"w{i}": blocks("Q8_0", (len(many), 32), many.roll(i, 0)) for i in range(20)}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(tensors))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = wan_loader.load(tmp_path, "cuda", dtype="bf16")
    made = sum(tensor.nbytes for tensor in loaded.tensors.values())
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= made + many.nbytes + (128 << 20) + (32 << 20)
