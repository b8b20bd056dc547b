"""Synthetic checkpoints: the published layout to the byte, the same weights in both, and diffusers runs them."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from versions import TRANSFORMERS, needs_torch

from wan_pipeline.keymap import to_diffusers
from wan_pipeline.synth import plan_synth, synth

NATIVE_DIRS = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
DIFFUSERS_DIRS = {"high_noise": "transformer", "low_noise": "transformer_2"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """layout -> a tiny checkpoint; tests must not change it."""
    root = tmp_path_factory.mktemp("tiny")
    return {layout: synth(root / layout, layout=layout).directory for layout in ("native", "diffusers")}


def load_native(directory: Path, component: str) -> dict[str, torch.Tensor]:
    if component in NATIVE_DIRS:
        return load_dir(directory / NATIVE_DIRS[component])
    name = {"text_encoder": "models_t5_umt5-xxl-enc-bf16.pth", "vae": "Wan2.1_VAE.pth"}[component]
    return torch.load(directory / name, weights_only=True)


def load_dir(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# --- what the published checkpoints are known to be


def test_full_native_sizes_are_the_published_ones():
    plan = plan_synth(layout="native", size="full")
    for expert in NATIVE_DIRS.values():
        shards = [file for file in plan.weights if file.path.startswith(expert)]
        names = [f"{expert}/diffusion_pytorch_model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
        assert [file.path for file in shards] == names
        assert sum(file.nbytes for file in shards) == 57_154_077_376
        assert sum(len(file.tensors) for file in shards) == 1095
        assert sum(t.numel for file in shards for t in file.tensors) == 14_288_491_584
        assert {t.dtype for file in shards for t in file.tensors} == {"fp32"}
    (t5,) = [file for file in plan.weights if "t5" in file.path]
    assert sum(t.nbytes for t in t5.tensors) == 11_361_820_672
    assert abs(t5.nbytes - 11_361_920_418) < 100_000
    assert {t.dtype for t in t5.tensors} == {"bf16"}
    (vae,) = [file for file in plan.weights if file.path == "Wan2.1_VAE.pth"]
    assert (len(vae.tensors), sum(t.numel for t in vae.tensors)) == (194, 126_892_531)
    assert abs(vae.nbytes - 507_609_880) < 100_000


def test_full_diffusers_shards():
    plan = plan_synth(layout="diffusers", size="full")
    shards = {
        folder: [f for f in plan.weights if f.path.startswith(f"{folder}/")] for folder in DIFFUSERS_DIRS.values()
    }
    assert [len(files) for files in shards.values()] == [12, 12]
    text = [file for file in plan.weights if file.path.startswith("text_encoder/")]
    assert [Path(file.path).name for file in text] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sum(t.nbytes for file in text for t in file.tensors) == 11_361_820_672
    (vae,) = [file for file in plan.weights if file.path.startswith("vae/")]
    assert vae.path == "vae/diffusion_pytorch_model.safetensors"


def test_full_ti2v():
    plan = plan_synth(layout="native", size="full", task="ti2v-5B")
    shards = [file for file in plan.weights if "diffusion" in file.path]
    assert [f.path for f in shards] == [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sum(t.numel for file in shards for t in file.tensors) == 4_999_787_712
    assert "Wan2.2_VAE.pth" in {file.path for file in plan.weights}


def test_one_block_is_as_large_as_known():
    sizes = [
        sum(
            t.nbytes
            for f in plan_synth(size="full", blocks=n, components=["low_noise"], dtype="bf16").weights
            for t in f.tensors
        )
        for n in (1, 2)
    ]
    assert sizes[1] - sizes[0] == 702_788_608


def test_native_config_has_the_published_keys(tiny):
    config = json.loads((tiny["native"] / "high_noise_model/config.json").read_text())
    known = "_class_name dim eps ffn_dim freq_dim in_dim model_type num_heads num_layers out_dim text_len"
    assert sorted(config) == known.split()
    assert (config["_class_name"], config["model_type"]) == ("WanModel", "t2v")


# --- the files themselves


@pytest.mark.parametrize("component", ["text_encoder", "high_noise", "low_noise", "vae"])
def test_layouts_hold_the_same_weights(tiny, component):
    name = {"text_encoder": "text_encoder", "vae": "vae2.1"}.get(component, "dit")
    native = {to_diffusers(name, k): v for k, v in load_native(tiny["native"], component).items()}
    assert same(native, load_dir(tiny["diffusers"] / DIFFUSERS_DIRS.get(component, component)))


def test_experts_differ(tiny):
    high, low = (load_native(tiny["native"], expert) for expert in NATIVE_DIRS)
    assert not any(torch.equal(high[k], low[k]) for k in high)


def test_values_are_sensible(tiny):
    for component in ("text_encoder", "high_noise", "vae"):
        for name, tensor in load_native(tiny["native"], component).items():
            is_scale = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            near = 1.0 if is_scale else 0.0
            assert tensor.dtype == (torch.bfloat16 if component == "text_encoder" else torch.float32)
            assert (tensor.float() - near).abs().max() < 0.5, name
            assert tensor.unique().numel() > min(tensor.numel() // 20, 50), name


def test_sharded_index(tiny):
    indexes = sorted([*tiny["native"].rglob("*.index.json"), *tiny["diffusers"].rglob("*.index.json")])
    assert len(indexes) == 5
    for path in indexes:
        index = json.loads(path.read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) == 2
        assert files == sorted(file.name for file in path.parent.glob("*.safetensors"))
        tensors = {file: load_file(path.parent / file) for file in files}
        assert {k: file for file in files for k in tensors[file]} == index["weight_map"]
        assert index["metadata"]["total_size"] == sum(t.nbytes for part in tensors.values() for t in part.values())


def test_safetensors_as_the_library_writes_them(tiny, tmp_path):
    for file in tiny["diffusers"].rglob("*.safetensors"):
        save_file(load_file(file), tmp_path / "again", metadata={"format": "pt"})
        assert (tmp_path / "again").read_bytes() == file.read_bytes(), file


@needs_torch(2, 6, "files have other records")
@pytest.mark.parametrize("name", ["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"])
def test_pth_as_torch_writes_them(tiny, tmp_path, name):
    file = tiny["native"] / name
    state = torch.load(file, weights_only=True)
    assert same(state, torch.load(file, weights_only=True, mmap=True))
    torch.save(state, tmp_path / name)
    with zipfile.ZipFile(file) as ours, zipfile.ZipFile(tmp_path / name) as theirs:
        assert ours.testzip() is None
        assert [(e.filename, e.flag_bits) for e in ours.infolist()] == [
            (e.filename, e.flag_bits) for e in theirs.infolist()
        ]
        assert all(b"_rebuild_tensor_v2" in z.read(z.infolist()[0]) for z in (ours, theirs))
    assert len(file.read_bytes()) == pytest.approx((tmp_path / name).stat().st_size, abs=5000)


def test_pth_longer_than_4_gib(tmp_path):
    (t5,) = plan_synth(size="full", components=["text_encoder"]).weights
    path = tmp_path / "sparse.pth"
    with path.open("wb") as file:

        def holes(tensor):
            if threading.current_thread() is threading.main_thread():  # else only the checksum is wanted
                file.seek(tensor.nbytes - 2, 1)
            yield b"\x80\x3f"  # the last element is 1.0

        for piece in t5.stream(holes):
            file.write(piece)
    assert path.stat().st_size == t5.nbytes > 1 << 33
    state = torch.load(path, weights_only=True, mmap=True)
    assert {k: tuple(v.shape) for k, v in state.items()} == {t.name: t.shape for t in t5.tensors}
    assert all(v.flatten()[-1] == 1 for v in state.values())
    with zipfile.ZipFile(path) as archive:
        assert archive.infolist()[-3].header_offset > 1 << 33


def test_another_dtype_is_the_same_rounded(tiny, tmp_path):
    synth(tmp_path / "bf16", components=["high_noise", "vae"], dtype="bf16")
    rounded = {k: v.to(torch.bfloat16) for k, v in load_native(tiny["native"], "high_noise").items()}
    assert same(load_native(tmp_path / "bf16", "high_noise"), rounded)
    assert same(load_native(tmp_path / "bf16", "vae"), load_native(tiny["native"], "vae"))


def test_fewer_blocks_are_the_same_blocks(tiny, tmp_path):
    synth(tmp_path / "part", blocks=2, components=["low_noise"])
    whole = load_native(tiny["native"], "low_noise")
    part = load_native(tmp_path / "part", "low_noise")
    assert same(part, {k: v for k, v in whole.items() if not k.startswith(("blocks.2.", "blocks.3."))})
    assert json.loads((tmp_path / "part/low_noise_model/config.json").read_text())["num_layers"] == 2


def test_seeds_differ_and_repeat(tiny, tmp_path):
    for seed in (0, 1):
        synth(tmp_path / str(seed), components=["vae"], seed=seed)
    zero, one = (load_native(tmp_path / str(seed), "vae") for seed in (0, 1))
    assert same(zero, load_native(tiny["native"], "vae"))
    assert not any(torch.equal(zero[k], one[k]) for k in zero)


# --- diffusers and transformers take them


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_plain_diffusers_runs_it(tmp_path, task):
    pytest.importorskip("accelerate", reason="diffusers loads this transformer only with accelerate")
    from diffusers import WanPipeline

    synth(tmp_path / "ckpt", layout="diffusers", task=task)
    pipe = WanPipeline.from_pretrained(tmp_path / "ckpt")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.boundary_ratio == (0.875 if task == "t2v-A14B" else None)
    assert pipe.scheduler.config.flow_shift == 3.0
    assert pipe.text_encoder.dtype == (torch.bfloat16 if TRANSFORMERS >= (5, 0) else torch.float32)
    ran = count_calls(pipe)
    frames = pipe(
        "a cat boxing in the snow",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    assert 0.01 < frames.std() < 0.5
    assert ran == ({"transformer": 2, "transformer_2": 2} if task == "t2v-A14B" else {"transformer": 4})


def count_calls(pipe) -> dict[str, int]:
    ran: dict[str, int] = {}
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipe, name)) is not None:
            module.register_forward_hook(lambda *_, name=name: ran.update({name: ran.get(name, 0) + 1}))
    return ran


@pytest.mark.filterwarnings("default")
def test_native_weights_fit_the_modules(tiny):
    from wan_pipeline.synth.arch import ARCHS
    from wan_pipeline.synth.synth_tensors import component_tensors

    arch = ARCHS["t2v-A14B", "tiny"]
    for component, name in (("high_noise", "dit"), ("vae", "vae2.1"), ("text_encoder", "text_encoder")):
        shapes = {to_diffusers(name, k): tuple(v.shape) for k, v in load_native(tiny["native"], component).items()}
        assert shapes == {t.name: t.shape for t in component_tensors(arch, component, "fp32")}


@pytest.mark.filterwarnings("default")
def test_tokenizer(tiny):
    from transformers import AutoTokenizer, T5Tokenizer

    text = "a cat boxing, Zebra\n\u732b"
    ids = []
    for folder in (tiny["native"] / "google/umt5-xxl", tiny["diffusers"] / "tokenizer"):
        names = ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"]
        assert sorted(file.name for file in folder.iterdir()) == names
        for cls in (AutoTokenizer, *([T5Tokenizer] if TRANSFORMERS >= (5, 0) else [])):  # it had rules of its own
            tokenizer = cls.from_pretrained(folder)
            assert len(tokenizer) < 512
            assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
            ids.append(tokenizer(text).input_ids)
    assert all(found == ids[0] for found in ids)
    assert ids[0][-1] == 1
    assert "cat boxing" in tokenizer.decode(ids[0])


def test_sentencepiece_reads_the_tokenizer(tiny):
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import AutoTokenizer

    folder = tiny["native"] / "google/umt5-xxl"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert [*processor.encode("a cat boxing, Zebra"), 1] == AutoTokenizer.from_pretrained(folder)(
        "a cat boxing, Zebra"
    ).input_ids
