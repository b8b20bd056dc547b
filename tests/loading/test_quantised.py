"""Quantised weights: as they are in the file, with a word about their scales; never converted without them."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from loader_cases import same_dicts, write  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.cli.app import app  # noqa: E402

SCALED = {
    "l.weight": torch.tensor([[1.0, -448.0], [0.5, 2.0]]).to(torch.float8_e4m3fn),
    "l.weight_scale": torch.tensor(0.0123),
    "norm.weight": torch.tensor([1.5, 2.5]),
}
PACKED = {
    "l.weight": torch.tensor([[1], [200]], dtype=torch.uint8),
    "l.weight.absmax": torch.tensor([0.3]),
    "norm.weight": torch.tensor([1.5, 2.5]),
}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(2, 2, bias=False)
        self.norm = torch.nn.RMSNorm(2)


@pytest.fixture(params=["safetensors", "pth", "sharded safetensors"])  # torch reads no such legacy pickle
def scaled(request, tmp_path):
    return write(request.param, tmp_path, SCALED)


def fill(path, **options):
    return wan_loader.load_into(Net(), path, device="cpu", **options)


def test_a_request_in_another_library_s_place_makes_no_numbers(scaled):
    from wan_loader.plan.dtype_policy import DtypePolicy
    from wan_loader.plan.request import LoadRequest

    request = LoadRequest(source=scaled, policy=DtypePolicy("bfloat16"))
    assert "l.weight_scale" in request.open().names
    assert "l.weight_scale" not in replace(request, makes_values=True).open().names
    with pytest.raises(wan_loader.CheckpointError, match="only with a scale"):
        request.policy.check(request.open(), request.open().tensors)


#: As DeepSeek has it: a scale for each block of 128 * 128, which is made by nobody here.
BY_BLOCK = {"l.weight_scale_inv" if name == "l.weight_scale" else name: t for name, t in SCALED.items()}


@pytest.fixture(params=["safetensors", "pth"])
def by_block(request, tmp_path):
    return write(request.param, tmp_path, BY_BLOCK)


@pytest.mark.parametrize("dtype", ["bf16", torch.float32, "float8_e5m2"], ids=str)
@pytest.mark.parametrize("load", [wan_loader.load_file, wan_loader.load, fill], ids=lambda call: call.__name__)
def test_no_dtype_without_the_scale(by_block, load, dtype):
    said = r"'l\.weight' with 'l\.weight_scale_inv'"
    with pytest.raises(wan_loader.CheckpointError, match=said) as caught:
        load(by_block, dtype=dtype)
    assert (caught.value.path, caught.value.tensor) == (str(by_block), "l.weight")
    assert caught.value.remedy.startswith("load the file without a dtype")
    with pytest.raises(wan_loader.CheckpointError, match=said):
        load(by_block, dtype=dtype, keep_fp32=["l"])
    with pytest.raises(wan_loader.CheckpointError, match=said):
        wan_loader.load(by_block, dtype=dtype, names=["l.weight"])


def test_a_module_stays_as_it_was(by_block):
    module = Net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for options in ({}, {"strict": False}, {"key_map": {"l.weight_scale_inv": None}}):
        with pytest.raises(wan_loader.CheckpointError, match="only with a scale"):
            wan_loader.load_into(module, by_block, device="cpu", dtype="bf16", **options)
    same_dicts(module.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float8_e5m2], ids=str)
def test_with_its_scale_a_weight_is_their_product_rounded_once(scaled, dtype):
    product = (SCALED["l.weight"].float() * SCALED["l.weight_scale"]).to(dtype)
    expected = {"l.weight": product, "norm.weight": SCALED["norm.weight"].to(dtype)}
    loaded = wan_loader.load(scaled, dtype=dtype)
    same_dicts(loaded.tensors, expected)
    assert loaded.report.warnings == ()
    assert loaded.report.nbytes_device == sum(tensor.nbytes for tensor in expected.values())
    same_dicts(dict(wan_loader.iter_file(scaled, dtype=dtype)), expected)
    wan_loader.load_into(module := Net(), scaled, device="cpu", dtype=dtype)
    same_dicts(module.state_dict(), expected)
    kept = wan_loader.load_file(scaled, dtype=dtype, keep_fp32=["l"])
    same_dicts(kept, {**expected, "l.weight": SCALED["l.weight"].float() * SCALED["l.weight_scale"]})


def test_without_a_dtype_they_are_what_the_file_holds(scaled):
    loaded = wan_loader.load(scaled)
    same_dicts(loaded.tensors, SCALED)
    assert [w for w in loaded.report.warnings if "'l.weight_scale'" in w and "as they are in the file" in w]
    wan_loader.load_into(module := Net(), scaled, device="cpu", key_map={"l.weight_scale": None})
    same_dicts(module.state_dict(), {name: SCALED[name] for name in ("l.weight", "norm.weight")})


def test_what_is_not_quantised_is_converted(scaled):
    """The others of such a file; and eight-bit floats that no scale belongs to."""
    loaded = wan_loader.load(scaled, dtype="bf16", names=["norm.weight"])
    same_dicts(loaded.tensors, {"norm.weight": SCALED["norm.weight"].bfloat16()})
    only = wan_loader.load_into(
        torch.nn.RMSNorm(2), scaled, device="cpu", dtype="bf16", key_map=lambda n: {"norm.weight": "weight"}.get(n)
    )
    assert only.n_tensors == 1


def test_plain_eight_bit_floats_are_converted(tmp_path):
    plain = {"l.weight": SCALED["l.weight"], "l.scale_shift_table": SCALED["norm.weight"]}
    save_file(plain, tmp_path / "model.safetensors")
    loaded = wan_loader.load(tmp_path / "model.safetensors", dtype="bf16")
    same_dicts(loaded.tensors, {name: tensor.bfloat16() for name, tensor in plain.items()})
    assert loaded.report.warnings == ()


def test_integers_stay_and_it_is_said(tmp_path):
    save_file(PACKED, tmp_path / "model.safetensors")
    loaded = wan_loader.load(tmp_path / "model.safetensors", dtype="bf16")
    assert {name: t.dtype for name, t in loaded.tensors.items()} == {
        "l.weight": torch.uint8,
        "l.weight.absmax": torch.bfloat16,
        "norm.weight": torch.bfloat16,
    }
    assert "'l.weight.absmax': not converted" in loaded.report.warnings[0]
    assert wan_loader.load(tmp_path / "model.safetensors").report.warnings == ()


@pytest.mark.parametrize(
    "words", [["cache", "build"], ["load"], ["estimate"], ["profile", "--no-ceilings"]], ids=lambda words: words[0]
)
def test_commands_refuse_a_dtype_for_them(tmp_path, words):
    path = write("safetensors", tmp_path, BY_BLOCK)
    done = CliRunner().invoke(app, [*words, str(path), "--dtype", "bf16"])
    assert isinstance(done.exception, wan_loader.CheckpointError)
    assert "only with a scale" in str(done.exception)
    assert "only with a scale" in CliRunner().invoke(app, ["inspect", str(path)]).output


@pytest.mark.parametrize("words", [["load"], ["estimate"], ["profile", "--no-ceilings"]], ids=lambda words: words[0])
def test_commands_take_a_dtype_where_the_numbers_can_be_made(tmp_path, words):
    path = write("safetensors", tmp_path, SCALED)
    done = CliRunner().invoke(app, [*words, str(path), "--dtype", "bf16"])
    assert done.exit_code == 0, done.output


def test_the_cache_does_not_keep_them(tmp_path):
    path = write("safetensors", tmp_path, BY_BLOCK)
    with pytest.raises(wan_loader.CheckpointError, match="only with a scale"):
        wan_loader.load(path, dtype="bf16", cache=True, cache_dir=tmp_path / "cache")
    assert not list((tmp_path).glob("cache/*/model.safetensors"))


def test_the_cache_does_not_keep_numbers_either_and_says_so(tmp_path):
    path = write("safetensors", tmp_path, SCALED)
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=tmp_path / "cache")
    same_dicts(loaded.tensors, wan_loader.load_file(path, dtype="bf16"))
    assert (loaded.report.cache.state, loaded.build) == ("source", None)
    assert "it is quantised" in loaded.report.cache.reason
    assert not list((tmp_path).glob("cache/*/model.safetensors"))
