"""The pipeline and the converted cache: one entry for the whole checkpoint, which diffusers opens as well."""

import json
import os
import shutil

import pytest
from programs import PIPELINE, run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from versions import as_dtype

import wan_pipeline
from wan_loader.cache.store import Store
from wan_loader.verify import same_bits
from wan_pipeline.pipeline_cache import PipelineCache, outline_wan
from wan_pipeline.wan_checkpoint import open_wan

SMALL = {"size": (32, 32), "frame_num": 5, "steps": 3, "seed": 3}


def generate(root, cache_dir, **settings):
    with wan_pipeline.WanT2V.from_checkpoint(root, device="cpu", cache=True, cache_dir=cache_dir, **settings) as pipe:
        frames = pipe("a cat", **SMALL).frames_THWC
        report = pipe.report()
    if pipe.build is not None:
        pipe.build.wait()
        assert pipe.build.failure is None
    return frames, report


@pytest.mark.parametrize(("layout", "preset"), [("native", "min-memory"), ("diffusers", "fastest")])
def test_second_start_reads_the_entry_and_gives_the_same_video(tiny_wan, tmp_path, layout, preset):
    first, report = generate(tiny_wan(layout), tmp_path / "cache", preset=preset)
    assert report["cache"]["state"] == "building"
    second, again = generate(tiny_wan(layout), tmp_path / "cache", preset=preset)
    assert again["cache"]["state"] == "hit"
    assert again["target"] == str(tiny_wan(layout))
    assert (first == second).all()
    experts = [x["nbytes"] for x in report["pipeline"]["loads"] if x["name"].startswith("transformer")]
    cached = [x["nbytes"] for x in again["pipeline"]["loads"] if x["name"].startswith("transformer")]
    assert sum(cached) < 0.6 * sum(experts)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_entry_is_a_diffusers_checkpoint_with_equal_weights(tiny_wan, tmp_path, layout):
    from diffusers import WanPipeline

    generate(tiny_wan(layout), tmp_path / "cache")
    (entry,) = Store(tmp_path / "cache").listed()
    ours = WanPipeline.from_pretrained(entry.path, **as_dtype(torch.bfloat16))
    theirs = WanPipeline.from_pretrained(tiny_wan("diffusers"), **as_dtype(torch.bfloat16))
    for name in ("text_encoder", "transformer", "transformer_2", "vae"):
        a, b = getattr(ours, name).state_dict(), getattr(theirs, name).state_dict()
        assert a.keys() == b.keys()
        assert all(same_bits(a[key], b[key]) for key in a), name
    prompt = "Katzen, 猫"
    assert ours.tokenizer(prompt).input_ids == theirs.tokenizer(prompt).input_ids
    assert ours.scheduler.config.flow_shift == theirs.scheduler.config.flow_shift


def test_tensors_lie_in_the_order_of_first_use(tiny_wan):
    outline = outline_wan(open_wan(tiny_wan("native")), "bfloat16")
    names = [t.name for t in outline.files[1].tensors]
    blocks = [name.split(".")[1] for name in names if name.startswith("blocks.")]
    assert names.index("patch_embedding.weight") < names.index("blocks.0.attn1.to_q.weight")
    assert blocks == sorted(blocks, key=int)


def test_a_start_that_is_given_up_leaves_no_entry(tiny_wan, tmp_path):
    with wan_pipeline.WanT2V.from_checkpoint(
        tiny_wan("native"), device="cpu", preset="min-memory", cache=True, cache_dir=tmp_path
    ):
        pass
    assert Store(tmp_path).listed() == []
    assert list((tmp_path / "building").iterdir()) == []


def test_fp32_is_not_cached(tiny_wan, tmp_path):
    _, report = generate(tiny_wan("native"), tmp_path, dtype="fp32")
    assert report["cache"]["state"] == "source"
    assert "nothing is converted" in report["cache"]["reason"]


def test_damaged_entry_is_set_aside_and_the_source_is_loaded(tiny_wan, tmp_path):
    first, _ = generate(tiny_wan("native"), tmp_path)
    (entry,) = Store(tmp_path).listed()
    config = entry.path / "transformer" / "config.json"
    config.chmod(0o600)
    config.write_text("{")
    again, report = generate(tiny_wan("native"), tmp_path)
    assert report["cache"]["state"] == "building"
    assert "transformer/config.json" in report["cache"]["reason"]
    assert "set aside in" in report["cache"]["reason"]
    assert (first == again).all()
    assert generate(tiny_wan("native"), tmp_path)[1]["cache"]["state"] == "hit"
    weights = entry.path / "transformer" / "diffusion_pytorch_model.safetensors"
    times, content = weights.stat(), weights.read_bytes()
    weights.chmod(0o600)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    cache = PipelineCache(open_wan(tiny_wan("native")), "bfloat16", tmp_path)
    assert cache.report.state == "building"
    assert "do not match their checksum" in cache.report.reason
    cache.close()


def test_unusable_cache_does_not_keep_the_pipeline_from_starting(tiny_wan, tmp_path):
    tmp_path.chmod(0o777)
    _, report = generate(tiny_wan("native"), tmp_path)
    assert report["cache"]["state"] == "source"
    assert "written by others" in report["cache"]["reason"]


def test_a_directory_beside_the_tokenizer_is_left_out(tiny_wan, tmp_path):
    root = tmp_path / "wan"
    shutil.copytree(tiny_wan("native"), root)
    before = outline_wan(open_wan(root), "bfloat16").small_files
    (root / "google/umt5-xxl/.cache").mkdir()
    assert outline_wan(open_wan(root), "bfloat16").small_files == before


def test_command_builds_and_then_reads(tiny_wan, tmp_path):
    cache = tmp_path / "cache"
    done = run(
        "-m", "wan_loader", "cache", "build", tiny_wan("native"), "--cache-dir", cache, "--json", modules=PIPELINE
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "built"
    load = ["-m", "wan_pipeline", "load", "--ckpt_dir", tiny_wan("native"), "--json"]
    done = run(*load, "--cache", "--cache_dir", cache, modules=PIPELINE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cache"]["state"] == "hit"
    done = run(*load, "--cache_dir", cache, modules=PIPELINE)
    assert done.returncode == 1
    assert "needs --cache" in done.stderr


@pytest.mark.gpu
def test_entry_written_from_the_gpu(tiny_wan, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    root = tiny_wan("native")
    with wan_pipeline.WanT2V.from_checkpoint(root, device="cuda", cache=True, cache_dir=tmp_path) as pipe:
        pipe.wait()
        pipe.build.wait()
    assert pipe.build.failure is None
    test = Store(tmp_path).listed()[0].path
    from diffusers import WanTransformer3DModel

    ours = WanTransformer3DModel.from_pretrained(test / "transformer", **as_dtype(torch.bfloat16)).state_dict()
    theirs = WanTransformer3DModel.from_pretrained(tiny_wan("diffusers") / "transformer", **as_dtype(torch.bfloat16))
    assert all(same_bits(ours[name], tensor) for name, tensor in theirs.state_dict().items())
