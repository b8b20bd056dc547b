"""Files that are named one by one: however they spell and store a network, it is the same; what is wrong is told."""

import re
import shutil

import comfy_folders
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import gguf_files
import torch
from safetensors.torch import load_file, save_file

from wan_loader.errors import CheckpointError, MissingFileError, OptionError
from wan_pipeline import configs, startup
from wan_pipeline.component import open_component
from wan_pipeline.families import FAMILIES
from wan_pipeline.fitting import network_dtype
from wan_pipeline.keymap import keymap, spelling
from wan_pipeline.presets import load_preset
from wan_pipeline.prompt_tokenizer import SentencePiece
from wan_pipeline.start_options import StartOptions
from wan_pipeline.synth import plan_synth
from wan_pipeline.synth.arch import ARCHS
from wan_pipeline.wan_checkpoint import open_wan

A14B = FAMILIES[0]


@pytest.fixture
def named(tiny_comfy, tmp_path):
    """Scaled files that a test may change, by the names of arguments."""
    return comfy_folders.files(shutil.copytree(tiny_comfy(), tmp_path / "comfy"), "fp8-scaled")


@pytest.fixture
def plain(tiny_comfy):
    return comfy_folders.files(tiny_comfy("comfy"), "comfy")


def respelled(path, target, rename):
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, target)
    return target


# --- spellings


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_an_expert_in_every_spelling(plain, tmp_path, prefix, layout):
    """With or without a prefix, under names of either layout: the module gets the same tensors."""
    names = keymap("dit")

    def rename(name):
        bare = name.removeprefix("model.diffusion_model.")
        return prefix + (names.to_diffusers(bare) if layout == "diffusers" else bare)

    path = respelled(plain["high_noise"], tmp_path / "a.safetensors", rename)
    (tmp_path / "config.json").write_bytes(config_of("high_noise"))
    found, expected = (open_component(A14B, A14B["transformer"], p) for p in (path, plain["high_noise"]))
    assert found.config == expected.config
    assert module_names(found) == module_names(expected)


def config_of(name):
    plan = plan_synth(components=[name])
    return next(file.content for file in plan.texts if file.path.endswith("config.json"))


def module_names(component):
    rename = component.key_map or (lambda name: name)
    return {rename(tensor.name): tensor.shape for tensor in component.facts.tensors}


def llama_names(name):
    """Names of transformers -> those that llama.cpp's converter gives."""
    table = keymap("text_encoder").llama
    whole = {new: old for old, new in table.outer.items()}
    if name in whole:
        return whole[name]
    number, _, rest = name.removeprefix("encoder.block.").partition(".")
    return f"enc.blk.{number}.{ {new: old for old, new in table.inner.items()}[rest] }"


def test_a_text_encoder_as_llama_cpp_names_it(plain, tiny_wan, tmp_path):
    """A GGUF file without a tokenizer that could be read: it comes from beside, or is named."""
    held = {name: tensor for name, tensor in load_file(plain["text_encoder"]).items() if name != "spiece_model"}
    path = tmp_path / "umt5-xxl-encoder.gguf"
    tensors = {llama_names(name): gguf_files.plain(tensor) for name, tensor in held.items()}
    path.write_bytes(gguf_files.gguf_bytes(tensors, [gguf_files.string("general.architecture", "t5encoder")]))
    text = open_component(A14B, A14B["text_encoder"], path)
    assert module_names(text) == {name: tuple(tensor.shape) for name, tensor in held.items()}
    with pytest.raises(MissingFileError, match=r"comes without a tokenizer.*--tokenizer DIR"):
        open_wan(**{**plain, "text_encoder": path})
    tokenizer = tiny_wan() / "google/umt5-xxl"
    assert open_wan(**{**plain, "text_encoder": path}, tokenizer=tokenizer).tokenizer == tokenizer
    shutil.copytree(tokenizer, tmp_path / "google/umt5-xxl")
    assert open_wan(**{**plain, "text_encoder": path}).tokenizer == tmp_path / "google/umt5-xxl"


def test_names_of_no_network_are_not_respelled():
    assert spelling("dit", ["a", "b"]) is None
    assert spelling("vae2.1", ["blocks.0.modulation"]) is None


# --- the tokenizer


def test_the_tokenizer_in_the_file(named):
    text = open_component(A14B, A14B["text_encoder"], named["text_encoder"])
    assert "spiece_model" not in text.facts.names
    assert text.tokenizer == open_wan(**named).tokenizer
    assert isinstance(text.tokenizer, SentencePiece)
    assert text.tokenizer.load()("two cats").input_ids[-1] == 1


def test_a_tokenizer_that_is_named(named, tiny_wan, tmp_path):
    folder = tiny_wan() / "google/umt5-xxl"
    assert open_wan(**named, tokenizer=folder).tokenizer == folder
    model = folder / "spiece.model"
    expected = SentencePiece(model, 0, model.stat().st_size)
    assert open_wan(**named, tokenizer=model).tokenizer == expected
    (tmp_path / "only").mkdir()
    with pytest.raises(MissingFileError, match=r"holds no tokenizer: name a directory with tokenizer\.json"):
        open_wan(**named, tokenizer=tmp_path / "only")
    shutil.copy(model, tmp_path / "only")
    assert open_wan(**named, tokenizer=tmp_path / "only").tokenizer.path == tmp_path / "only/spiece.model"
    with pytest.raises(MissingFileError, match="does not exist"):
        open_wan(**named, tokenizer=tmp_path / "none")


# --- configurations


@pytest.mark.parametrize("task", [family.task for family in FAMILIES])
def test_published_shapes_give_the_published_configuration(task):
    """From the tensors of a whole expert, under native names."""
    arch = ARCHS[task, "full"]
    plan = plan_synth(size="full", task=task, components=[arch.experts[0]])
    network = arch.family.experts[0]
    shapes = {tensor.name: tensor.shape for file in plan.weights for tensor in file.tensors}
    found = configs.dit_config_of_shapes(network, arch.family.sizes.head_dim, shapes, "x")
    assert found == configs.dit_config(network, arch.dit.native_config(arch.model_type), shapes, "x")


def test_what_tells_the_configuration(named, tmp_path):
    """The metadata of a tiny file, else a config.json beside it, which comes first, else the shapes if they can."""
    from_metadata = open_component(A14B, A14B["transformer"], named["high_noise"]).config
    path = tmp_path / "alone" / "high.safetensors"
    path.parent.mkdir()
    save_file(load_file(named["high_noise"]), path)
    with pytest.raises(CheckpointError, match=r"96 wide.*how many heads.*put the config\.json"):
        open_component(A14B, A14B["transformer"], path)
    (path.parent / "config.json").write_bytes(config_of("high_noise"))
    assert open_component(A14B, A14B["transformer"], path).config == from_metadata
    (path.parent / "config.json").write_bytes(config_of("high_noise").replace(b'"num_layers": 4', b'"num_layers": 5'))
    with pytest.raises(CheckpointError, match="disagrees with the weights: 5 blocks by the config, 4 in the files"):
        open_component(A14B, A14B["transformer"], path)
    for text in ("no JSON", "[1]", '{"a": 1}'):  # somebody else's
        save_file(load_file(named["high_noise"]), named["high_noise"], metadata={"config": text})
        with pytest.raises(CheckpointError, match="how many heads"):
            open_component(A14B, A14B["transformer"], named["high_noise"])


def test_one_expert_decides_which_model_it_is(tmp_path):
    """The flag is the same for three models; channels and blocks tell which."""
    from wan_pipeline.synth import synth

    for task in ("ti2v-5B", "t2v-1.3B"):
        root = synth(tmp_path / task, form="comfy", task=task).directory
        paths = {p.parent.name: p for p in root.glob("*/*")}
        files = {"transformer": paths["diffusion_models"], "text_encoder": paths["text_encoders"], "vae": paths["vae"]}
        assert open_wan(**files).task == task
        assert open_wan(root).task == task
    with pytest.raises(OptionError, match="no model has networks for --high_noise, --transformer together"):
        open_wan(high_noise="a", transformer="b")


@pytest.mark.parametrize(
    ("stored", "like_diffusers", "expected"),
    [
        (torch.float8_e4m3fn, False, torch.bfloat16),
        (torch.float8_e4m3fn, True, torch.bfloat16),
        (torch.float16, False, torch.bfloat16),
        (torch.float16, True, None),
        (torch.bfloat16, False, None),
        (torch.float32, False, None),
    ],
    ids=str,
)
def test_a_text_encoder_is_used_in_what_it_can_be(plain, tmp_path, stored, like_diffusers, expected):
    """As in the file; in bf16 where that is nothing to compute in."""
    held = {
        name: tensor.to(stored) for name, tensor in load_file(plain["text_encoder"]).items() if "spiece" not in name
    }
    save_file(held, tmp_path / "umt5.safetensors")
    text = open_component(A14B, A14B["text_encoder"], tmp_path / "umt5.safetensors")
    assert network_dtype(text, load_preset("fastest"), StartOptions(like_diffusers=like_diffusers)) == expected


def test_several_processes_load_no_quantised_file(tiny_comfy, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = StartOptions(size=(128, 128), frame_num=5)
    with pytest.raises(OptionError, match="is quantised, and there are 2 processes"):
        startup._checked_degrees(open_wan(tiny_comfy("gguf")), options)
    startup._checked_degrees(open_wan(tiny_comfy("comfy")), options)


# --- what is wrong


def wrong_scale(tensors, shape):
    tensors["blocks.0.ffn.0.scale_weight"] = torch.ones(shape)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("blocks.1.ffn.0.scale_weight"), r"'blocks\.1\.ffn\.0\.weight' lacks its scale"),
        (lambda t: wrong_scale(t, (3,)), r"scale 'blocks\.0\.ffn\.0\.scale_weight' of shape \[3\]"),
        (lambda t: wrong_scale(t, (192, 2)), r"of shape \[192, 2\]"),
        (lambda t: t.pop("blocks.3.norm3.weight"), r"lacks blocks\.3\.norm3\.weight"),
        (lambda t: t.pop("head.modulation"), r"lacks head\.modulation"),
        (
            lambda t: t.update({"img_emb.proj.0.weight": torch.ones(2)}),
            "holds 'img_emb.proj.0.weight', which no WAN dit",
        ),
        (
            lambda t: t.update({"patch_embedding.weight": torch.ones(96, 36, 1, 2, 2)}),
            "takes 36 channels for 16 of a latent: it is an image-to-video",
        ),
        (lambda t: t.update({"blocks.0.self_attn.q.scale_input": torch.ones(())}), "has a scale of its inputs"),
    ],
    ids=["no scale", "scale", "scale of two columns", "in a block", "outside", "more", "image to video", "inputs"],
)
def test_an_expert_that_cannot_be(named, edit, match):
    comfy_folders.rewrite(named["low_noise"], edit)
    with pytest.raises(CheckpointError, match=match) as error:
        open_wan(**named)
    assert str(named["low_noise"]) in str(error.value)


@pytest.mark.parametrize(("number", "match"), [(99, "number 99, which is not known"), (12, r"rows of 96 elements")])
def test_a_type_of_gguf_that_is_not_known(tiny_comfy, tmp_path, number, match):
    gguf = comfy_folders.files(tiny_comfy("gguf"), "gguf")
    content = bytearray(gguf["high_noise"].read_bytes())
    name = b"blocks.0.self_attn.q.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    assert content[place] == 8
    content[place] = number
    (tmp_path / "high.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        open_wan(**{**gguf, "high_noise": tmp_path / "high.gguf"})


def test_a_type_of_gguf_whose_numbers_are_not_made(plain, tmp_path):
    """Recognised, and refused by its name."""
    values = comfy_folders.plain_values(plain["high_noise"])
    tensors = {name: gguf_files.plain(tensor) for name, tensor in values.items()}
    tensors["blocks.0.self_attn.q.weight"] = (gguf_files.KINDS["IQ4_XS"], (96, 256), bytes(96 * 136))
    (tmp_path / "high.gguf").write_bytes(gguf_files.gguf_bytes(tensors))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.self_attn\.q\.weight.*IQ4_XS, whose numbers are not made"):
        open_wan(**{**plain, "high_noise": tmp_path / "high.gguf"})


@pytest.mark.parametrize(
    ("role", "given", "match"),
    [
        ("vae", "low_noise", "is no VAE: by the names in it, it is an expert (--high_noise"),
        ("text_encoder", "vae", "is no text encoder: by the names in it, it is a VAE of WAN 2.1 (--vae)"),
        ("high_noise", "text_encoder", "is no high-noise expert: by the names in it, it is a text encoder"),
    ],
)
def test_a_file_in_another_role(named, role, given, match):
    with pytest.raises(CheckpointError, match=re.escape(match)) as error:
        open_wan(**{**named, role: named[given]})
    assert error.value.remedy == f"name another file with --{role}"


def test_experts_that_are_exchanged(named):
    """Their names and shapes are the same: only what they are called tells."""
    low, high = named["low_noise"], named["high_noise"]
    for files in ({"high_noise": low}, {"low_noise": high}, {"low_noise": high, "high_noise": low}):
        with pytest.raises(OptionError, match="is called like the other expert: swap the two"):
            open_wan(**{**named, **files})
    plain_name = high.with_name("slow_flow.safetensors")  # contains "low", and is no word
    shutil.copy(high, plain_name)
    assert open_wan(**{**named, "high_noise": plain_name})["transformer"].source == str(plain_name)
    with pytest.raises(OptionError, match="--high_noise and --low_noise are both"):
        open_wan(**{**named, "high_noise": plain_name, "low_noise": plain_name})


def test_files_beside_an_open_checkpoint(named, tiny_wan):
    with pytest.raises(OptionError, match="name them when it is opened"):
        open_wan(open_wan(tiny_wan()), vae=named["vae"])
    with named["vae"].open() as file, pytest.raises(OptionError, match="vae is an open"):
        open_wan(vae=file)


def test_a_directory_that_lacks_what_is_named(tiny_wan, named, tmp_path):
    """It need not hold what comes from elsewhere."""
    root = shutil.copytree(tiny_wan(), tmp_path / "native")
    shutil.rmtree(root / "high_noise_model")
    shutil.rmtree(root / "google")
    (root / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    files = {name: named[name] for name in ("high_noise", "text_encoder")}
    assert open_wan(root, **files)["transformer"].source == str(named["high_noise"])
    with pytest.raises(MissingFileError, match=r"missing: high_noise_model/: finish"):
        open_wan(root, text_encoder=named["text_encoder"])
    with pytest.raises(MissingFileError, match=r"missing: models_t5_umt5-xxl-enc-bf16\.pth, google"):
        open_wan(root, high_noise=named["high_noise"])
