"""Which tensors are quantised: by every name that quantisers give a scale, and by no other name."""

import pytest

from wan_loader.formats.checkpoint_facts import TensorFacts
from wan_loader.formats.scales import find_scales

FP8 = "float8_e4m3fn"


def facts(**dtypes):
    """Tensors of four elements by name."""
    return [TensorFacts(name, dtype, (4,), i, (1,)) for i, (name, dtype) in enumerate(dtypes.items())]


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ("l.weight", "l.weight_scale"),
        ("l.weight", "l.weight_scale_inv"),
        ("l.weight", "l.weight_scale_2"),
        ("l.weight", "l.scale_weight"),
        ("weight", "scale_weight"),
        ("l.weight", "l.weight.scale"),
        ("l.weight", "l.scale"),
        ("l.weight", "l.fp8_scale"),
        ("l.weight", "l.weights_scaling_factor"),
        ("l.weight", "l.comfy_quant"),
        ("l.weight._data", "l.weight._scale"),
        ("l.weight_qdata", "l.weight_scale"),
        ("l.weight:qdata", "l.weight:scale"),
        ("l.weight", "l.weight_quantizer._scale"),
        ("l.weight", "l.weight_quantizer._double_scale"),
        ("l.weight", "l.weight_block_scale"),
        ("experts.gate_up_proj", "experts.gate_up_proj_scale_inv"),
        ("l.w1", "l.w1_scale"),
        ("l.weight", "model.scaled_fp8"),
    ],
)
@pytest.mark.parametrize("dtype", [FP8, "float8_e5m2"])
def test_eight_bit_floats_with_a_scale(weight, scale, dtype):
    others = {"norm.weight": "float32", "norm.scale": "float32", "other.weight_scale": "float32"}
    both = facts(**others, **{scale: "float32", weight: dtype})
    assert find_scales(both) == find_scales(both[::-1]) == {weight: scale}


@pytest.mark.parametrize(
    ("weight", "scale", "dtype"),
    [
        ("l.weight", "l.weight.absmax", "uint8"),
        ("l.weight", "l.weight.quant_state.bitsandbytes__nf4", "uint8"),
        ("l.weight", "l.SCB", "int8"),
        ("l.qweight", "l.scales", "int32"),
        ("l.weight_packed", "l.weight_scale", "int32"),
        ("w_blocks", "w_scales", "uint8"),
        ("l.weight", "l.weight_scale", "float4_e2m1fn_x2"),
    ],
)
def test_integers_with_a_scale(weight, scale, dtype):
    assert find_scales(facts(**{weight: dtype, scale: "float32"})) == {weight: scale}


@pytest.mark.parametrize(
    ("name", "other", "dtype"),
    [
        ("l.weight", "l.input_scale", "float32"),
        ("l.weight", "l.input_quantizer._scale", "float32"),
        ("l.weight", "l.scale_input", "float32"),
        ("k.weight", "k_scale", "float32"),
        ("l.weight", "l.scale_shift_table", "float32"),
        ("text_projection", "logit_scale", "float32"),
        ("l.weight", "l.scale", FP8),
        ("l.weight", "m.weight_scale", "float32"),
        ("l.scale", "l.weight", "float32"),
    ],
)
def test_what_is_no_scale_of_a_weight(name, other, dtype):
    """Scales of activations and of other tensors; parameters that are called so, of eight bits like all others."""
    assert find_scales(facts(**{name: FP8, other: dtype})) == {}


def test_full_precision_is_not_quantised():
    assert find_scales(facts(**{"l.weight": "bfloat16", "l.weight_scale": "float32", "scaled_fp8": FP8})) == {}
    assert find_scales([TensorFacts("scaled_fp8", FP8, (0,), 0, (1,)), *facts(w="bfloat16", steps="int64")]) == {}
