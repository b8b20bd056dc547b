"""Scaled eight-bit floats as numbers: which are made, out of what, and what is refused by name."""

import json

import pytest

torch = pytest.importorskip("torch")

from loader_cases import same_dicts  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from versions import DTYPES  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader import CheckpointError, open_checkpoint  # noqa: E402
from wan_loader.formats.quantised import with_values  # noqa: E402

RAW = torch.arange(-6.0, 6.0).view(3, 4).to(torch.float8_e4m3fn)
ONE, ROWS = torch.tensor(0.3), torch.tensor([0.1, 2.0, 0.7])
PLAIN = torch.tensor([1.5, 2.5], dtype=torch.bfloat16)
MARK = torch.zeros(2, dtype=torch.float8_e4m3fn)


def note(**says):
    return torch.frombuffer(bytearray(json.dumps(says).encode()), dtype=torch.uint8)


def saved(tmp_path, tensors, metadata=None):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata)
    return path


SPELLINGS = {
    "with a mark": {"l.scale_weight": ONE, "scaled_fp8": MARK},
    "with an empty mark": {"l.scale_weight": ONE, "scaled_fp8": MARK[:0]},
    "with a mark under a prefix": {"l.scale_weight": ONE, "model.diffusion_model.scaled_fp8": MARK},
    "without a mark": {"l.scale_weight": ONE},
    "the other": {"l.weight_scale": ONE},
    "of one element": {"l.weight_scale": ONE.view(1)},
    "by row": {"l.weight_scale": ROWS},
    "by row, as a column": {"l.scale_weight": ROWS.view(3, 1)},
    "with a note": {"l.weight_scale": ONE, "l.comfy_quant": note(format="float8_e4m3fn")},
    "with a note of how it is used": {
        "l.weight_scale": ONE,
        "l.comfy_quant": note(format="float8_e4m3fn", full_precision_matrix_mult=True),
    },
    "in bfloat16": {"l.weight_scale": ONE.bfloat16()},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_products(tmp_path, spelling, dtype):
    companions = SPELLINGS[spelling]
    path = saved(tmp_path, {"l.weight": RAW, "norm": PLAIN, **companions})
    scale = next(t for name, t in companions.items() if "scale_weight" in name or "weight_scale" in name).float()
    expected = (RAW.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))).to(dtype)
    loaded = wan_loader.load_file(path, dtype=dtype)
    same_dicts(loaded, {"l.weight": expected, "norm": PLAIN.to(dtype)})
    as_they_are = wan_loader.load_file(path)
    same_dicts(as_they_are, {"l.weight": RAW, "norm": PLAIN, **companions})


def test_several_weights_each_with_its_own(tmp_path):
    tensors = {f"{i}.weight": RAW for i in "abc"} | {
        f"{i}.weight_scale": torch.tensor(float(n)) for n, i in enumerate("abc", 2)
    }
    tensors["plain.weight"] = PLAIN
    path = saved(tmp_path, {name: tensor.clone() for name, tensor in tensors.items()})
    expected = {f"{i}.weight": (RAW.float() * n).bfloat16() for n, i in enumerate("abc", 2)}
    same_dicts(wan_loader.load_file(path, dtype="bf16"), {**expected, "plain.weight": PLAIN})
    same_dicts(wan_loader.load_file(path, dtype="bf16", names=["b.weight"]), {"b.weight": expected["b.weight"]})


def test_the_other_eight_bit_float(tmp_path):
    raw = RAW.float().to(torch.float8_e5m2)
    path = saved(tmp_path, {"l.weight": raw, "l.scale_weight": ONE, "scaled_fp8": raw.view(-1)[:0].clone()})
    same_dicts(wan_loader.load_file(path, dtype="fp16"), {"l.weight": (raw.float() * ONE).half()})


def test_notes_in_the_metadata(tmp_path):
    said = {"format_version": "1.0", "layers": {"l": {"format": "float8_e4m3fn"}}}
    path = saved(tmp_path, {"l.weight": RAW, "l.weight_scale": ONE}, {"_quantization_metadata": json.dumps(said)})
    same_dicts(wan_loader.load_file(path, dtype="bf16"), {"l.weight": (RAW.float() * ONE).bfloat16()})
    said["layers"]["l"]["format"] = "nvfp4"
    path = saved(tmp_path, {"l.weight": RAW, "l.weight_scale": ONE}, {"_quantization_metadata": json.dumps(said)})
    with pytest.raises(CheckpointError, match="'nvfp4'"):
        wan_loader.load_file(path, dtype="bf16")


CODES = torch.zeros(3, 4, dtype=torch.uint8)
REFUSED = {
    "no scale under a mark": (
        {"scaled_fp8": MARK},
        r"lacks its scale: .*neither 'l\.scale_weight' nor 'l\.weight_scale'",
    ),
    "no scale with a note": ({"l.comfy_quant": note(format="float8_e4m3fn")}, "lacks its scale"),
    "two scales": ({"l.scale_weight": ONE, "l.weight_scale": ONE.clone()}, "has two scales"),
    "a scale by column": ({"l.weight_scale": torch.ones(4)}, r"'l\.weight_scale' of shape \[4\], .* each of 3 rows"),
    "a scale by block": ({"l.weight_scale": torch.ones(3, 2)}, r"of shape \[3, 2\]"),
    "an empty scale": ({"l.weight_scale": torch.ones(0)}, r"of shape \[0\]"),
    "a scale of integers": ({"l.weight_scale": torch.tensor([1])}, "of int64"),
    "a scale of the inputs": (
        {"l.scale_weight": ONE, "l.scale_input": ONE.clone()},
        r"of its inputs, 'l\.scale_input'",
    ),
    "the same, later": ({"l.weight_scale": ONE, "l.input_scale": ONE.clone()}, r"of its inputs, 'l\.input_scale'"),
    "another kind": ({"l.weight_scale": ONE, "l.comfy_quant": note(format="mxfp8")}, "kind 'mxfp8' of comfy_quant"),
    "a kind of the other float": (
        {"l.weight_scale": ONE, "l.comfy_quant": note(format="float8_e5m2")},
        "'float8_e5m2'",
    ),
    "a kind that does more": (
        {"l.weight_scale": ONE, "l.comfy_quant": note(format="float8_e4m3fn", convrot=True)},
        "kind 'float8_e4m3fn' of comfy_quant with 'convrot'",
    ),
    "a note that is none": ({"l.weight_scale": ONE, "l.comfy_quant": CODES}, "kind None of comfy_quant"),
    "codes with a note": (
        {"l.weight": CODES.clone(), "l.weight_scale": ONE, "l.comfy_quant": note(format="nvfp4")},
        "kind 'nvfp4' of comfy_quant",
    ),
}
if "float8_e8m0fnu" in DTYPES:
    REFUSED["a scale of powers"] = (
        {"l.weight_scale": torch.ones(3, 1).to(torch.float8_e8m0fnu)},
        "of float8_e8m0fnu",
    )


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_is_refused_by_name_and_still_loads_as_it_is(tmp_path, case):
    companions, said = REFUSED[case]
    tensors = {"l.weight": RAW, "norm": PLAIN, **companions}
    path = saved(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"tensor 'l\.weight' .*{said}") as caught:
        wan_loader.load_file(path, dtype="bf16")
    assert (caught.value.path, caught.value.tensor) == (str(path), "l.weight")
    assert caught.value.remedy.startswith("load the file without a dtype")
    same_dicts(wan_loader.load_file(path, dtype="bf16", names=["norm"]), {"norm": PLAIN})
    same_dicts(wan_loader.load_file(path), tensors)


def test_a_weight_that_shares_its_memory_is_refused(tmp_path):
    torch.save({"l.weight": RAW, "again": RAW.view(4, 3), "l.weight_scale": ONE}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="shares its memory"):
        wan_loader.load_file(tmp_path / "m.pth", dtype="bf16")
    torch.save({"l.weight": RAW.t(), "l.weight_scale": ONE}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="is not contiguous"):
        wan_loader.load_file(tmp_path / "m.pth", dtype="bf16")


def test_values_are_put_in_once_and_nothing_where_none_is_quantised(tmp_path):
    plain = open_checkpoint(saved(tmp_path, {"l.weight": PLAIN, "codes": CODES}))
    assert with_values(plain) is plain
    checkpoint = open_checkpoint(saved(tmp_path, {"l.weight": RAW, "l.weight_scale": ONE}))
    made = with_values(checkpoint)
    assert with_values(made) == made
    (tensor,) = made.tensors
    assert (tensor.dtype, tensor.shape) == ("float32", (3, 4))
    opened = wan_loader.load_file(made, dtype="bf16")
    same_dicts(opened, wan_loader.load_file(checkpoint, dtype="bf16"))
