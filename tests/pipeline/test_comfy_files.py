"""Tiny checkpoints in ComfyUI's forms: called and laid out as theirs, with the weights of the published layouts."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from safetensors import safe_open
from typer.testing import CliRunner

import wan_loader
from wan_loader.cli.app import app
from wan_loader.verify import verify
from wan_pipeline.synth import plan_synth, synth
from wan_pipeline.synth.comfy_files import PREFIX

_STEM = "diffusion_models/wan2.2_t2v_{}_14B"
EXPERTS = {expert: _STEM.format(expert) for expert in ("high_noise", "low_noise")}
SUFFIX = {"comfy": "_fp16.safetensors", "fp8-scaled": "_fp8_scaled.safetensors", "gguf": "-Q8_0.gguf"}
TEXT = {
    "comfy": "text_encoders/umt5_xxl_fp16.safetensors",
    "fp8-scaled": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "gguf": "text_encoders/umt5_xxl_fp16.safetensors",
}
VAE = "vae/wan_2.1_vae.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """form -> the report of a tiny checkpoint; tests must not change it."""
    root = tmp_path_factory.mktemp("forms")
    return {form: synth(root / form, form=form) for form in SUFFIX}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return synth(tmp_path_factory.mktemp("published")).directory


@pytest.mark.parametrize("form", SUFFIX)
def test_files_are_called_as_comfyui_calls_them(tiny, form):
    report = tiny[form]
    names = {str(path.relative_to(report.directory)) for path in report.files}
    assert names == {*(stem + SUFFIX[form] for stem in EXPERTS.values()), TEXT[form], VAE}
    assert report.nbytes == sum(path.stat().st_size for path in report.files)


@pytest.mark.parametrize("form", ["fp8-scaled", "gguf"])
def test_most_of_a_full_expert_is_quantised(form):
    plan = plan_synth(size="full", form=form, components=["high_noise"])
    (file,) = plan.weights
    small = sum(t.nbytes for t in file.tensors if t.dtype in ("fp8", "q8_0"))
    assert small > 0.95 * sum(t.nbytes for t in file.tensors)
    assert file.nbytes == pytest.approx({"fp8-scaled": 14.3e9, "gguf": 15.2e9}[form], rel=0.03)


@pytest.mark.parametrize("form", SUFFIX)
@pytest.mark.parametrize("expert", EXPERTS)
def test_an_expert_has_the_weights_of_the_published_one(tiny, published, form, expert):
    """Rounded as the form rounds: half a step of it at most."""
    path = tiny[form].directory / (EXPERTS[expert] + SUFFIX[form])
    loaded = wan_loader.load_file(path, dtype="fp32")
    verify(path, loaded)
    expected = wan_loader.load_file(published / f"{expert}_model")
    if form == "comfy":
        expected = {PREFIX + name: tensor for name, tensor in expected.items()}
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.shape == expected[name].shape
        error, largest = (tensor - expected[name]).abs(), expected[name].abs()
        if form == "gguf" and tensor.dim() == 2:
            largest = largest.amax()
        steps = {"comfy": 2**-11, "fp8-scaled": 2**-4, "gguf": 2**-7}
        assert (error <= largest * steps[form] + 1e-5).all(), name


def test_every_form_has_what_it_is_for(tiny):
    facts = {
        form: wan_loader.open_checkpoint(tiny[form].directory / (EXPERTS["high_noise"] + SUFFIX[form]))
        for form in SUFFIX
    }
    assert {one.kind for one in facts["gguf"].quantised.values()} == {"Q8_0"}
    patch = next(t for t in facts["gguf"].tensors if t.name == "patch_embedding.weight")
    assert (patch.dtype, len(patch.shape)) == ("float16", 5)
    with safe_open(facts["fp8-scaled"].path, "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("blocks.0.self_attn.q.weight").dtype == torch.float8_e4m3fn
        assert file.get_tensor("blocks.0.self_attn.q.scale_weight").shape == ()
        assert file.get_tensor("blocks.0.modulation").dtype == torch.float16
    assert "scaled_fp8" in names
    assert "patch_embedding.scale_weight" not in names
    assert all(name.startswith(PREFIX) for name in facts["comfy"].names)


@pytest.mark.parametrize("form", SUFFIX)
def test_an_expert_fills_a_module(tiny, published, form):
    """Of plain diffusers, through the family's key map."""
    import diffusers

    from wan_pipeline.keymap import keymap
    from wan_pipeline.wan_checkpoint import open_wan

    config = dict(open_wan(published)["transformer"].config)
    with wan_loader.empty_weights():
        module = diffusers.WanTransformer3DModel(**config)
    to_diffusers = keymap("dit").native.rename
    path = tiny[form].directory / (EXPERTS["high_noise"] + SUFFIX[form])
    wan_loader.load_into(
        module, path, device="cpu", dtype="bf16", key_map=lambda name: to_diffusers(name.removeprefix(PREFIX))
    )
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("form", SUFFIX)
def test_the_text_encoder_and_the_vae(tiny, published, form):
    loaded = wan_loader.load_file(tiny[form].directory / TEXT[form], dtype="bf16")
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in loaded
    assert not [name for name in loaded if "scale_weight" in name or "scaled_fp8" in name]
    vae = wan_loader.load_file(tiny[form].directory / VAE)
    assert vae.keys() == wan_loader.load_file(published / "Wan2.1_VAE.pth").keys()
    assert {t.dtype for t in vae.values()} == {torch.bfloat16}


def test_the_command(tmp_path):
    done = CliRunner().invoke(app, ["synth", str(tmp_path / "a"), "--form", "gguf", "--component", "high_noise"])
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "a").glob("*/*")
    assert path.name == "wan2.2_t2v_high_noise_14B-Q8_0.gguf"
    with pytest.raises(wan_loader.OptionError, match="leave out --layout"):
        synth(tmp_path / "b", form="gguf", layout="diffusers")
    with pytest.raises(wan_loader.OptionError, match="--form int3"):
        synth(tmp_path / "b", form="int3")


@pytest.mark.parametrize("task", ["ti2v-5B", "t2v-1.3B", "t2v-14B"])
def test_every_family_has_names(task):
    for form in SUFFIX:
        paths = [file.path for file in plan_synth(form=form, task=task).files]
        assert len(paths) == 3
        assert all("wan2" in path or "umt5" in path or "wan_2" in path for path in paths)
