"""The models that run here, one value each: `FAMILIES` is all that other code knows of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from wan_loader import OptionError
from wan_pipeline.model_family import Defaults, ModelFamily, Network, Sizes

__all__ = ["FAMILIES", "TITLES", "Task", "family_called"]

#: Their names in `--task`.
Task = Literal["t2v-A14B", "ti2v-5B", "t2v-1.3B", "t2v-14B"]

_TEXT_ENCODER = Network(
    name="text_encoder",
    kind="text_encoder",
    title="text encoder",
    synth_name="text_encoder",
    map_name="text_encoder",
    module=("transformers", "UMT5EncoderModel"),
    native="models_t5_umt5-xxl-enc-bf16.pth",
    native_word="t5",
    config={"feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 128},
    blocks="encoder.block",
)
_HIGH_NOISE = Network(
    name="transformer",
    kind="dit",
    title="high-noise expert",
    synth_name="high_noise",
    map_name="dit",
    module=("diffusers", "WanTransformer3DModel"),
    native="high_noise_model",
    config={"cross_attn_norm": True, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads"},
    blocks="blocks",
    # as diffusers keeps them, in its words and in the native ones
    keep_fp32=("time_embedder", "scale_shift_table", "norm2", "time_embedding", "modulation", "norm3"),
)
_LOW_NOISE = replace(
    _HIGH_NOISE, name="transformer_2", title="low-noise expert", synth_name="low_noise", native="low_noise_model"
)
_TRANSFORMER = replace(_HIGH_NOISE, title="transformer", synth_name="transformer", native="")
_VAE_21 = Network(
    name="vae",
    kind="vae",
    title="VAE",
    synth_name="vae",
    map_name="vae2.1",
    module=("diffusers", "AutoencoderKLWan"),
    native="Wan2.1_VAE.pth",
    native_word="vae",
    native_mark=r"wan-?2[._]1",
    encodes_only=("encoder.", "conv1.", "quant_conv."),
)
# Mean and deviation of each latent channel, as published with it; those of VAE 2.1 are diffusers' defaults.
_VAE_22_MEAN = (
    "-.2289 -.0052 -.1323 -.2339 -.2799 .0174 .1838 .1557 -.1382 .0542 .2813 .0891 .1570 -.0098 .0375 -.1825 "
    "-.2246 -.1207 -.0698 .5109 .2665 -.2108 -.2158 .2502 -.2055 -.0322 .1109 .1567 -.0729 .0899 -.2799 -.1230 "
    "-.0313 -.1649 .0117 .0723 -.2839 -.2083 -.0520 .3748 .0152 .1957 .1433 -.2944 .3573 -.0548 -.1681 -.0667"
)
_VAE_22_STD = (
    ".4765 1.0364 .4514 1.1677 .5313 .4990 .4818 .5013 .8158 1.0344 .5894 1.0901 .6885 .6165 .8454 .4978 "
    ".5759 .3523 .7135 .6804 .5833 1.4146 .8986 .5659 .7069 .5338 .4889 .4917 .4069 .4999 .6866 .4093 "
    ".5709 .6065 .6415 .4944 .5726 1.2042 .5458 1.6887 .3971 1.0600 .3943 .5537 .5444 .4089 .7468 .7744"
)
_VAE_22 = replace(
    _VAE_21,
    map_name="vae2.2",
    native="Wan2.2_VAE.pth",
    native_mark=r"wan-?2[._]2",
    config={
        "in_channels": 12,
        "is_residual": True,
        "latents_mean": [float(x) for x in _VAE_22_MEAN.split()],
        "latents_std": [float(x) for x in _VAE_22_STD.split()],
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
)
_SCHEDULER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}

_COMFY_TEXT = "umt5_xxl"
_MARK_TEXT = ("umt5",)
_MARK_VAE_21 = ("wan21", "vae")

_T2V_A14B = ModelFamily(
    task="t2v-A14B",
    title="Wan2.2-T2V-A14B",
    repositories={"native": "Wan-AI/Wan2.2-T2V-A14B", "diffusers": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"},
    networks=(_TEXT_ENCODER, _HIGH_NOISE, _LOW_NOISE, _VAE_21),
    tokenizer={"native": "google/umt5-xxl", "diffusers": "tokenizer"},
    scheduler=_SCHEDULER,
    boundary_ratio=0.875,
    expand_timesteps=False,
    defaults=Defaults(size=(1280, 720), frame_num=81, steps=40, shift=12.0, guide_scale=(3.0, 4.0)),
    fps=16,
    sizes=Sizes(heads=40, ffn_dim=13824, layers=40, channels=16, vae_base=96),
    comfy={
        "text_encoder": _COMFY_TEXT,
        "high_noise": "wan2.2_t2v_high_noise_14B",
        "low_noise": "wan2.2_t2v_low_noise_14B",
        "vae": "wan_2.1_vae",
    },
    marks={
        "text_encoder": _MARK_TEXT,
        "high_noise": ("wan22", "t2v", "high"),
        "low_noise": ("wan22", "t2v", "low"),
        "vae": _MARK_VAE_21,
    },
)
_TI2V_5B = ModelFamily(
    task="ti2v-5B",
    title="Wan2.2-TI2V-5B",
    repositories={"native": "Wan-AI/Wan2.2-TI2V-5B", "diffusers": "Wan-AI/Wan2.2-TI2V-5B-Diffusers"},
    networks=(_TEXT_ENCODER, _TRANSFORMER, _VAE_22),
    tokenizer=_T2V_A14B.tokenizer,
    scheduler=_SCHEDULER,
    boundary_ratio=None,
    expand_timesteps=True,
    defaults=Defaults(size=(1280, 704), frame_num=121, steps=50, shift=5.0, guide_scale=(5.0, 5.0)),
    fps=24,
    sizes=Sizes(heads=24, ffn_dim=14336, layers=30, channels=48, vae_base=160, vae_decoder_base=256),
    comfy={"text_encoder": _COMFY_TEXT, "transformer": "wan2.2_ti2v_5B", "vae": "wan2.2_vae"},
    marks={"text_encoder": _MARK_TEXT, "transformer": ("wan22", "ti2v", "5b"), "vae": ("wan22", "vae")},
)
# Its shapes, files and the settings of its generate.py are from the published code (Wan-Video/Wan2.1). Not checked, as
# the weights were not at hand: the scheduler configuration of its diffusers repositories. The README recommends
# shift 8 and guidance 6 for the 1.3B model; here are the program's own settings. It makes no larger videos than these.
_T2V_1_3B = ModelFamily(
    task="t2v-1.3B",
    title="Wan2.1-T2V-1.3B",
    repositories={"native": "Wan-AI/Wan2.1-T2V-1.3B", "diffusers": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
    networks=(_TEXT_ENCODER, _TRANSFORMER, _VAE_21),
    tokenizer=_T2V_A14B.tokenizer,
    scheduler=_SCHEDULER,
    boundary_ratio=None,
    expand_timesteps=False,
    defaults=Defaults(size=(832, 480), frame_num=81, steps=50, shift=5.0, guide_scale=(5.0, 5.0)),
    fps=16,
    sizes=Sizes(heads=12, ffn_dim=8960, layers=30, channels=16, vae_base=96),
    comfy={"text_encoder": _COMFY_TEXT, "transformer": "wan2.1_t2v_1.3B", "vae": "wan_2.1_vae"},
    marks={"text_encoder": _MARK_TEXT, "transformer": ("wan21", "t2v", "13b"), "vae": _MARK_VAE_21},
)
_T2V_14B = replace(
    _T2V_1_3B,
    task="t2v-14B",
    title="Wan2.1-T2V-14B",
    repositories={"native": "Wan-AI/Wan2.1-T2V-14B", "diffusers": "Wan-AI/Wan2.1-T2V-14B-Diffusers"},
    defaults=Defaults(size=(1280, 720), frame_num=81, steps=50, shift=5.0, guide_scale=(5.0, 5.0)),
    sizes=Sizes(heads=40, ffn_dim=13824, layers=40, channels=16, vae_base=96),
    comfy={"text_encoder": _COMFY_TEXT, "transformer": "wan2.1_t2v_14B", "vae": "wan_2.1_vae"},
    marks={"text_encoder": _MARK_TEXT, "transformer": ("wan21", "t2v", "14b"), "vae": _MARK_VAE_21},
)

#: Where a directory tells too little, it counts as the first that it may be.
FAMILIES: tuple[ModelFamily, ...] = (_T2V_A14B, _TI2V_5B, _T2V_1_3B, _T2V_14B)
assert tuple(family.task for family in FAMILIES) == get_args(Task)

#: What messages call the networks of a model that they do not know.
TITLES: dict[str, str] = {n.name: n.title for family in reversed(FAMILIES) for n in family.networks}


def family_called(task: str) -> ModelFamily:
    """Return the model with this name in `--task`; `OptionError` if there is none."""
    for family in FAMILIES:
        if family.task == task:
            return family
    tasks = ", ".join(family.task for family in FAMILIES)
    raise OptionError.because(f"no model is called {task!r:.60}", f"use {tasks}")
