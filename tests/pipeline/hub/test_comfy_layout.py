"""ComfyUI's folders hold many models: the files of one are found by what they are called, or nothing is guessed."""

import shutil

import pytest

pytest.importorskip("diffusers")

from wan_loader.cli.app import main
from wan_loader.errors import CheckpointError, MissingFileError
from wan_pipeline.families import FAMILIES
from wan_pipeline.hub.comfy_layout import comfy_family, comfy_file, comfy_files, comfy_parts, comfy_root
from wan_pipeline.hub.recognise import recognise
from wan_pipeline.wan_checkpoint import open_wan

A14B, TI2V = FAMILIES[:2]
#: Names as they are published: ComfyUI's own, and those of other makers.
HIGH = (
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    "wan2.2_t2v_high_noise_14B_fp16.safetensors",
    "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf",
    "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
    "wan2.2_t2v_high_noise_14B_Q8_0.gguf",
)
TEXT = ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "umt5-xxl-enc-bf16.safetensors", "umt5-xxl-encoder-Q5_K_M.gguf")
VAE = ("wan_2.1_vae.safetensors", "Wan2_1_VAE_bf16.safetensors", "Wan2.1_VAE.pth")
OTHERS = (
    "diffusion_models/flux1-dev.safetensors",
    "diffusion_models/wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
    "diffusion_models/wan2.2_t2v_lightx2v_lora_high_noise.safetensors",
    "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors.aria2",
    "diffusion_models/.wan2.2_t2v_high_noise_14B.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "text_encoders/clip_l.safetensors",
    "vae/ae.safetensors",
    "vae/wan2.2_vae.safetensors",
    "loras/wan2.2_t2v_high.safetensors",
)


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.mark.parametrize("high", HIGH)
@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("vae", VAE)
def test_published_names(tmp_path, high, text, vae):
    low = high.replace("high", "low").replace("High", "Low").replace("HIGH", "LOW")
    found = [f"diffusion_models/{high}", f"diffusion_models/{low}", f"text_encoders/{text}", f"vae/{vae}"]
    make(tmp_path, *found, *OTHERS)
    family, parts = comfy_parts(tmp_path)
    assert family is A14B
    assert parts == dict(zip(("transformer", "transformer_2", "text_encoder", "vae"), found, strict=True))
    assert list(parts) == ["text_encoder", "transformer", "transformer_2", "vae"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.task)
def test_every_family_is_found_by_its_names(tmp_path, family):
    folders = {"dit": "unet", "text_encoder": "clip", "vae": "vae"}
    names = [f"{folders[n.kind]}/wan/{family.comfy[n.synth_name]}_fp16.safetensors" for n in family.networks]
    make(tmp_path, *names)
    assert comfy_family(tmp_path) is family
    assert list(comfy_parts(tmp_path)[1].values()) == names


def test_of_several_models_the_one_of_which_least_is_missing(tmp_path):
    text, vae = "text_encoders/umt5_xxl_fp16.safetensors", "vae/wan2.2_vae.safetensors"
    make(tmp_path, text, vae, "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors", "diffusion_models/" + HIGH[0])
    assert comfy_family(tmp_path) is TI2V
    assert comfy_family(tmp_path, [A14B, TI2V], ["vae", "low_noise"]) is A14B
    make(tmp_path, "vae/wan_2.1_vae.safetensors", "diffusion_models/" + HIGH[0].replace("high", "low"))
    assert comfy_family(tmp_path) is A14B  # both are whole: the first


def test_the_folders_may_lie_deeper(tmp_path):
    assert comfy_root(tmp_path) is None
    for name in ("split_files", "models", "."):
        (tmp_path / name / "diffusion_models").mkdir(parents=True)
        assert comfy_root(tmp_path) == tmp_path / name


def test_links_are_followed_and_end(tmp_path):
    disk = make(tmp_path / "disk", HIGH[0])
    folder = tmp_path / "comfy" / "diffusion_models"
    folder.mkdir(parents=True)
    (folder / "disk").symlink_to(disk)
    (folder / "circle").symlink_to(folder)
    found = comfy_files(tmp_path / "comfy", A14B, A14B["transformer"])
    assert f"diffusion_models/disk/{HIGH[0]}" in found
    assert len(found) < 10


def test_several_candidates_are_listed(tmp_path):
    make(tmp_path, *(f"diffusion_models/{name}" for name in HIGH[:3]))
    with pytest.raises(CheckpointError) as error:
        comfy_file(tmp_path, A14B, A14B["transformer"])
    assert all(name in error.value.reason for name in HIGH[:3])
    assert error.value.remedy == "choose one with --high_noise FILE"
    assert comfy_parts(tmp_path) is None


def test_what_is_missing(tmp_path):
    make(tmp_path, *OTHERS)
    with pytest.raises(MissingFileError) as error:
        comfy_file(tmp_path, A14B, A14B["transformer_2"])
    assert "holds no low-noise expert of Wan2.2-T2V-A14B (such as diffusion_models/wan2.2_t2v_low_noise" in str(
        error.value
    )
    assert "flux1-dev.safetensors" in error.value.reason
    assert error.value.remedy.endswith("choose one with --low_noise FILE")
    assert recognise(str(tmp_path)) is None
    assert recognise(str(tmp_path / "vae")) is None


def test_a_flag_chooses_among_several(tiny_comfy, tmp_path):
    root = shutil.copytree(tiny_comfy("gguf"), tmp_path / "comfy")
    for path in (tiny_comfy() / "diffusion_models").iterdir():
        shutil.copy(path, root / "diffusion_models")
    with pytest.raises(CheckpointError, match="several files that are called like the high-noise expert"):
        open_wan(root)
    held = {word: sorted((root / "diffusion_models").glob(f"*{word}*")) for word in ("high_noise", "low_noise")}
    for i in range(2):
        named = {word: files[i] for word, files in held.items()}
        found = open_wan(root, **named)
        assert [c.source for c in found.experts] == [str(path) for path in named.values()]
        assert (found.layout, found.directory) == ("comfy", root)


def test_wan_loader_knows_the_model(tiny_comfy, call_main, capfd):
    assert call_main(main, "inspect", tiny_comfy()) == 0
    told = capfd.readouterr().out
    assert "Wan2.2-T2V-A14B, comfy layout" in told
    assert all(title in told for title in ("text encoder", "high-noise expert", "low-noise expert", "VAE"))
    model = recognise(str(tiny_comfy()))
    assert [part.name for part in model.parts] == [network.name for network in A14B.networks]
    assert not model.missing


def test_an_entry_for_plain_files_alone(tiny_comfy, tmp_path, call_main, capfd):
    words = ("cache", "build", "--dtype", "bf16", "--cache-dir", tmp_path / "cache")
    assert call_main(main, *words, tiny_comfy("comfy")) == 0
    assert call_main(main, *words, tiny_comfy("gguf")) == 1
    assert "it is quantised, and smaller than its numbers" in capfd.readouterr().err
