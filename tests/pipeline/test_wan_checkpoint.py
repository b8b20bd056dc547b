"""Both layouts lead to the same parts, and everything that is wrong with one is found from headers alone."""

import json
import shutil
import subprocess
import sys

import pytest

from wan_loader.errors import CheckpointError, MissingFileError

pytest.importorskip("diffusers")

import torch
from networks import built
from safetensors.torch import load_file, save_file
from versions import as_dtype

from wan_pipeline import modules
from wan_pipeline.synth import synth
from wan_pipeline.wan_checkpoint import open_wan

LAYOUTS = ("native", "diffusers")


@pytest.fixture
def copy(tiny_wan, tmp_path):
    """layout -> a copy of a tiny checkpoint that a test may damage."""

    def make(layout="native", task="t2v-A14B"):
        return shutil.copytree(tiny_wan(layout, task), tmp_path / layout)

    return make


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_open_checkpoint_stays_what_it_is(tiny_wan):
    checkpoint = open_wan(tiny_wan())
    assert open_wan(checkpoint) is checkpoint
    names = "text_encoder, transformer, transformer_2, vae"
    assert repr(checkpoint) == f"WanCheckpoint({str(checkpoint.directory)!r}, t2v-A14B, native layout: {names})"


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_layouts_have_the_same_parts(tiny_wan, task):
    native, diffusers = (open_wan(tiny_wan(layout, task)) for layout in LAYOUTS)
    assert (native.layout, diffusers.layout) == LAYOUTS
    assert native.task == diffusers.task == task
    assert native.names == diffusers.names
    assert native.boundary_ratio == diffusers.boundary_ratio
    for name in native.names:
        for dtype in ("bfloat16", "float32", None):
            assert native[name].nbytes(dtype) == diffusers[name].nbytes(dtype)
        assert native[name].nbytes(None, decoder_only=True) <= native[name].nbytes(None)


def test_order_is_that_of_first_use(tiny_wan):
    assert open_wan(tiny_wan()).names == ("text_encoder", "transformer", "transformer_2", "vae")


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_modules_are_what_from_pretrained_makes(tiny_wan, layout, dtype):
    from diffusers import WanPipeline

    expected = WanPipeline.from_pretrained(tiny_wan("diffusers"), **as_dtype(dtype))
    for component in open_wan(tiny_wan(layout)).components:
        module = built(component, dtype)
        modules.check(module, component)
        assert all(p.is_meta for p in module.parameters())
        for _ in range(2):  # the second time after it was emptied
            tree, report = modules.fetch(component, device="cpu", dtype=dtype)
            modules.adopt(module, component, tree)
            assert not report.warnings
            assert_same(module, getattr(expected, component.name))
            modules.empty(module)
            assert all(p.is_meta for p in module.parameters())


def assert_same(module, expected):
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(module, kind)()), dict(getattr(expected, kind)())
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype, name
            assert torch.equal(tensor, wanted[name]), name
    assert module.state_dict().keys() == expected.state_dict().keys()
    assert module.dtype == expected.dtype
    assert not module.training


def test_a_vae_without_its_encoder(tiny_wan):
    component = open_wan(tiny_wan())["vae"]
    module = built(component, torch.float32, decoder_only=True)
    modules.check(module, component)
    tree, report = modules.fetch(component, device="cpu", dtype=torch.float32, decoder_only=True)
    modules.adopt(module, component, tree)
    assert report.nbytes_device == component.nbytes("float32", decoder_only=True)
    assert not any(p.is_meta for p in module.parameters())


def test_opening_needs_no_torch(tiny_wan):
    code = f"import sys, wan_pipeline; wan_pipeline.open_wan({str(tiny_wan())!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what is wrong


def test_neither_layout(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"neither model_index\.json .* it holds model\.gguf"):
        open_wan(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        open_wan(tmp_path / "nothing")
    assert error.value.path == str(tmp_path / "nothing")
    assert error.value.reason == "is no directory"


def test_half_a_native_download_names_all_that_is_missing(copy):
    root = copy("native")
    (root / "Wan2.1_VAE.pth").unlink()
    (root / "low_noise_model" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    shutil.rmtree(root / "google")
    with pytest.raises(MissingFileError) as error:
        open_wan(root)
    for name in ("Wan2.1_VAE.pth", "low_noise_model/diffusion_pytorch_model-00002", "google/umt5-xxl/tokenizer.json"):
        assert name in error.value.reason
    assert "high_noise_model" not in error.value.reason
    assert error.value.path == str(root)
    assert error.value.remedy == "finish the download"


def test_half_a_diffusers_download_names_all_that_is_missing(copy):
    root = copy("diffusers")
    shutil.rmtree(root / "transformer_2")
    (root / "text_encoder" / "model-00001-of-00002.safetensors").unlink()
    (root / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(MissingFileError) as error:
        open_wan(root)
    for name in ("transformer_2/", "text_encoder/model-00001-of-00002", "scheduler/scheduler_config.json"):
        assert name in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantised_expert_is_called_so(copy, layout):
    """Not another model, for the scales that no such model has."""
    root = copy(layout)
    part = root / {"native": "high_noise_model", "diffusers": "transformer"}[layout]
    shard = next(part.glob("*00001-of*.safetensors"))
    tensors = load_file(shard)
    weight = next(name for name in tensors if name.endswith(("ffn.0.weight", "ffn.net.2.weight")))
    scale = weight.replace("weight", "weight_scale_inv")
    save_file({**tensors, weight: tensors[weight].to(torch.float8_e4m3fn), scale: torch.ones(())}, shard)
    index = next(part.glob("*.index.json"))
    edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], scale: shard.name})
    with pytest.raises(CheckpointError) as error:
        open_wan(root)
    assert f"'{weight}' is right only with '{scale}'" in error.value.reason
    assert error.value.remedy.startswith("get the published")


def test_a_scale_that_cannot_be_applied_is_named(copy):
    root = copy("native")
    shard = next((root / "high_noise_model").glob("*00001-of*.safetensors"))
    tensors = load_file(shard)
    weight = next(name for name in tensors if name.endswith("ffn.0.weight"))
    scale = weight.replace("weight", "scale_weight")
    save_file({**tensors, weight: tensors[weight].to(torch.float8_e4m3fn), scale: torch.ones(7)}, shard)
    index = next((root / "high_noise_model").glob("*.index.json"))
    edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], scale: shard.name})
    with pytest.raises(CheckpointError, match=rf"tensor '{weight}' has the scale '{scale}' of shape \[7\]"):
        open_wan(root)


@pytest.mark.parametrize("form", ["fp8-scaled", "gguf"])
def test_experts_may_be_quantised_files(copy, tmp_path, form):
    """In the places of the published ones: what is loaded is their numbers."""
    root, made = copy("native"), synth(tmp_path / "made", form=form).directory
    for expert in ("high_noise", "low_noise"):
        for file in (root / f"{expert}_model").glob("diffusion*"):
            file.unlink()
        (quantised,) = made.glob(f"diffusion_models/*{expert}*")
        quantised.rename(root / f"{expert}_model" / quantised.name)
    checkpoint = open_wan(root)
    for name in ("transformer", "transformer_2"):
        component = checkpoint[name]
        assert component.facts.quantised
        tensors, report = modules.fetch(component, device="cpu", dtype=torch.bfloat16)
        module = built(component, dtype=torch.bfloat16)
        modules.check(module, component)
        modules.adopt(module, component, tensors)
        assert report.nbytes_device == sum(t.nbytes for t in tensors.values()) == component.nbytes("bfloat16")
        in_float, _ = modules.fetch(component, device="cpu", dtype=None)
        assert {t.dtype for t in in_float.values()} <= {torch.float32, torch.float16}


def test_a_truncated_shard(copy):
    root = copy("native")
    shard = root / "high_noise_model" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="00001-of-00002"):
        open_wan(root)


@pytest.mark.parametrize(
    ("layout", "file", "changes"),
    [
        ("native", "high_noise_model/config.json", {"num_layers": 5}),
        ("native", "high_noise_model/config.json", {"ffn_dim": 193}),
        ("native", "low_noise_model/config.json", {"in_dim": 36}),
        ("diffusers", "transformer/config.json", {"num_layers": 3}),
        ("diffusers", "transformer_2/config.json", {"num_attention_heads": 9}),
        ("diffusers", "text_encoder/config.json", {"d_ff": 65}),
        ("diffusers", "vae/config.json", {"base_dim": 8}),
    ],
)
def test_a_config_that_disagrees_with_the_weights(copy, layout, file, changes):
    root = copy(layout)
    edit_json(root / file, **changes)
    with pytest.raises(CheckpointError) as error:
        open_wan(root)
    assert error.value.path == str(root / file)
    assert error.value.reason.startswith("disagrees with the weights: ")


@pytest.mark.parametrize(
    ("layout", "file", "changes", "reason"),
    [
        ("native", "high_noise_model/config.json", {"model_type": "i2v"}, "only text-to-video"),
        ("native", "high_noise_model/config.json", {"_class_name": "FluxModel"}, "another model"),
        ("native", "high_noise_model/config.json", {"dim": "x"}, "lacks a number"),
        ("diffusers", "transformer/config.json", {"_class_name": "FluxModel"}, "another model"),
        ("diffusers", "model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "not a WanPipeline"),
        ("diffusers", "text_encoder/config.json", {"model_type": "bert"}, "not a umT5"),
    ],
)
def test_configs_of_other_models(copy, layout, file, changes, reason):
    root = copy(layout)
    edit_json(root / file, **changes)
    with pytest.raises(CheckpointError) as error:
        open_wan(root)
    assert error.value.path == str(root / file)
    assert reason in error.value.reason


def test_a_config_that_is_no_json(copy):
    root = copy("native")
    (root / "high_noise_model" / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as error:
        open_wan(root)
    assert error.value.path == str(root / "high_noise_model" / "config.json")
    assert error.value.reason.startswith("is not JSON")


def test_an_expert_of_another_model(copy, tiny_wan):
    root = copy("native")
    shutil.rmtree(root / "low_noise_model")
    shutil.copytree(tiny_wan("native", "ti2v-5B"), root / "low_noise_model")
    with pytest.raises(CheckpointError):
        open_wan(root)


def test_foreign_tensors(copy):
    root = copy("diffusers")
    file = root / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    (root / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    save_file({**load_file(file), "lora.alpha": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError) as error:
        open_wan(root)
    assert error.value.tensor == "lora.alpha"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_that_may_not_be_read(tiny_wan, open_dir, unprivileged, layout):
    root = open_dir / layout
    shutil.copytree(tiny_wan(layout), root)
    weights = [path for path in root.rglob("*") if path.suffix in (".pth", ".safetensors")]
    for path in (*weights, *(p for p in root.rglob("*") if p.is_dir()), root):
        mode = path.stat().st_mode
        path.chmod(0)
        with unprivileged(), pytest.raises(CheckpointError, match=f"{root}.* cannot be read: Permission denied$"):
            open_wan(root)
        path.chmod(mode)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_without_an_index_are_a_directory_s(copy, layout):
    root = copy(layout)
    indexes = [*root.rglob("*.index.json")]
    assert indexes
    for index in indexes:
        index.unlink()
    for component in open_wan(root).components:
        _, report = modules.fetch(component, device="cpu", dtype=None)
        assert not report.warnings
        assert report.n_tensors == len(component.facts.tensors)


def test_a_native_checkpoint_whose_files_somebody_has_saved_again(copy):
    """The text encoder and the VAE as safetensors, the experts in one file each."""
    root = copy()
    expected = open_wan(root)
    for source, target in (
        ("models_t5_umt5-xxl-enc-bf16.pth", "umt5-xxl-enc-bf16.safetensors"),
        ("Wan2.1_VAE.pth", "Wan2_1_VAE_fp32.safetensors"),
    ):
        save_file({name: t.clone().contiguous() for name, t in torch.load(root / source).items()}, root / target)
        (root / source).unlink()
    for expert in ("high_noise_model", "low_noise_model"):
        weights: dict = {}
        for path in (root / expert).glob("*.safetensors*"):
            weights |= load_file(path) if path.suffix == ".safetensors" else {}
            path.unlink()
        save_file(weights, root / expert / "wan2.2_t2v.safetensors")
    found = open_wan(root)
    for name in expected.names:
        assert set(found[name].facts.names) == set(expected[name].facts.names)
        assert found[name].config == expected[name].config
        assert (found[name].key_map is None) == (expected[name].key_map is None)


def test_ti2v_5b_in_one_file_each(copy):
    root = copy(task="ti2v-5B")
    expected = open_wan(root)
    weights = {name: t for path in root.glob("*.safetensors") for name, t in load_file(path).items()}
    for path in root.glob("diffusion_pytorch_model*"):
        path.unlink()
    save_file(weights, root / "wan2.2_ti2v_5B.safetensors")
    save_file({n: t.clone() for n, t in torch.load(root / "Wan2.2_VAE.pth").items()}, root / "wan2.2_vae.safetensors")
    (root / "Wan2.2_VAE.pth").unlink()
    found = open_wan(root)
    assert found.task == "ti2v-5B"
    for name in expected.names:
        assert set(found[name].facts.names) == set(expected[name].facts.names)
        assert found[name].config == expected[name].config


def test_a_repository_in_the_hub_s_cache(tiny_wan, tmp_path, monkeypatch):
    snapshots = tmp_path / "models--Wan-AI--Tiny" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / "abc").symlink_to(tiny_wan("diffusers"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert open_wan("Wan-AI/Tiny").directory == snapshots / "abc"
