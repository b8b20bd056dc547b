"""The pipeline and weights that are kept: nothing is read, nothing is written, and what sleeps lets go."""

import json

import pytest
from keepers import user_count, wait_until
from programs import check_error

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch

import wan_pipeline
from wan_loader import OptionError
from wan_loader.cli import main as loader_main
from wan_loader.keeper import client
from wan_loader.verify import same_bits
from wan_pipeline import startup
from wan_pipeline.commands.networks import networks_of
from wan_pipeline.start_options import StartOptions

SMALL = {"size": (32, 32), "frame_num": 5, "steps": 3, "seed": 3}
NAMES = ("text_encoder", "transformer", "transformer_2", "vae")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def standby_keep(tmp_path_factory, monkeypatch, call_main, capfd):
    """Call `wan-loader standby keep`, with a keeper of the test's own, which ends with it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        import subprocess

        code = call_main(loader_main, "standby", "keep", *words)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(words, code, out, err)

    yield call
    client.stop()


def generate(root, device, **settings):
    with wan_pipeline.WanT2V.from_checkpoint(root, device=device, **settings) as pipe:
        frames = pipe("a cat", **SMALL).frames_THWC
        return frames, pipe.report()


def networks(pipe):
    return {name: getattr(pipe.pipe, name) for name in NAMES}


@pytest.mark.parametrize(("layout", "preset"), [("native", "min-memory"), ("diffusers", "fastest")])
def test_a_kept_pipeline_reads_nothing_and_makes_the_same_video(tiny_wan, standby_keep, device, layout, preset):
    root = tiny_wan(layout)
    expected, _ = generate(root, device, preset=preset)
    done = standby_keep(root, "--device", device)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept on ") == len(NAMES)
    frames, report = generate(root, device, preset=preset, keep=True)
    assert (frames == expected).all()
    assert {x["name"] for x in report["pipeline"]["loads"]} == set(NAMES)
    assert all(x["kept"]["state"] == "attached" for x in report["pipeline"]["loads"])
    assert (report["nbytes_file"], report["io"]["mode"], report["warnings"]) == (0, "kept", [])
    wait_until(lambda: user_count() == 0)
    assert "every checksum is right" in standby_keep("verify", root, "--device", device).stdout


def test_networks_that_go_are_let_go_and_nothing_is_written(tiny_wan, standby_keep, device):
    root = tiny_wan()
    standby_keep(root, "--device", device)
    with wan_pipeline.WanT2V.from_checkpoint(root, device=device, preset="fastest", keep=True) as pipe:
        pipe.wait()
        assert user_count() == len(NAMES)
        before = {
            name: {key: p.detach().clone() for key, p in net.named_parameters()} for name, net in networks(pipe).items()
        }
        pipe("a cat", **SMALL)
        for name, network in networks(pipe).items():
            assert all(same_bits(p, before[name][key]) for key, p in network.named_parameters()), name
        assert pipe.sleep().networks == NAMES
        wait_until(lambda: user_count() == 0)
        assert pipe.wake().nbytes == 0
        assert user_count() == len(NAMES)
    wait_until(lambda: user_count() == 0)
    with wan_pipeline.WanT2V.from_checkpoint(root, device=device, preset="min-memory", keep=True) as pipe:
        pipe("a cat", **SMALL)
        wait_until(lambda: user_count() == 1)  # the VAE, which ran last


def test_what_is_not_kept_is_loaded_and_said(tiny_wan, standby_keep):
    root = tiny_wan("diffusers")
    standby_keep(root / "vae", "--device", "cpu", "--dtype", "fp32")
    _, report = generate(root, "cpu", preset="fastest", keep=True)
    states = {x["name"]: x["kept"] for x in report["pipeline"]["loads"]}
    assert states["text_encoder"] == {"state": "source", "reason": "it is not kept"}
    assert report["warnings"] == ["not attached to kept weights: it is not kept"]
    assert states["vae"]["state"] == "attached"
    _, report = generate(root, "cpu", preset="fastest")
    assert all("kept" not in x for x in report["pipeline"]["loads"])


def test_the_commands_of_a_whole_model(tiny_wan, standby_keep, tmp_path):
    root, words = tiny_wan(), ("--device", "cpu", "--dtype", "fp16")
    kept = json.loads(standby_keep(root, *words, "--json").stdout)
    assert (kept["command"], kept["target"]) == ("standby keep", str(root))
    assert len(kept["networks"]) == len(NAMES)
    dtypes = [item["dtype"] for item in json.loads(standby_keep("status", "--json").stdout)["items"]]
    assert sum(dtype.startswith("float16") for dtype in dtypes) == 2
    assert json.loads(standby_keep("verify", root, *words, "--json").stdout)["damaged"] == []
    check_error(standby_keep("verify", root, "--device", "cpu"), "it is kept as float16")
    check_error(standby_keep(root, *words, "--keep-fp32", "norm"), "--keep-fp32")
    other = tmp_path / "other.safetensors"
    torch.save({"w": torch.ones(3)}, other.with_suffix(".pth"))
    standby_keep(other.with_suffix(".pth"), "--device", "cpu")
    assert len(json.loads(standby_keep("drop", root, "--json").stdout)["dropped"]) == len(NAMES)
    assert [item["label"] for item in client.status()["items"]] == [str(other.with_suffix(".pth"))]
    check_error(standby_keep("drop", root), "nothing of it is kept")
    largest = max(one["load"]["nbytes_device"] for one in kept["networks"])
    done = standby_keep(root, *words, "--max-gpu", f"{int(largest * 1.2)}B", "--json")
    check_error(done, "had to go for", "--max-gpu")


def test_the_command_says_what_was_attached(tiny_wan, standby_keep, call_main, capfd):
    from wan_pipeline.commands.app import main

    root = tiny_wan()
    standby_keep(root, "--device", "cpu")
    words = ("load", "--ckpt_dir", root, "--device", "cpu", "--preset", "fastest", "--keep")
    assert call_main(main, *words) == 0
    out, err = capfd.readouterr()
    assert out.count("kept, attached\n") == len(NAMES)
    assert "transformer_2: kept" in err
    client.drop()
    assert call_main(main, *words) == 0
    out, err = capfd.readouterr()
    assert "kept" not in out
    assert "vae: loaded, as it is not kept" in err


def test_what_keeps_not(tiny_wan, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="converted cache"):
        StartOptions(keep=True, cache=True)
    with pytest.raises(OptionError, match="keep is"):
        StartOptions(keep="copy")
    monkeypatch.setattr(startup, "world_size", lambda: 2)
    with pytest.raises(OptionError, match="2 processes divide them"):
        wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cpu", keep=True)
    assert networks_of(str(tmp_path), None) is None
