"""`part=` and `--part`: one dict of a nested checkpoint, in every public call and in the commands that take one."""

import json
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")

from loader_cases import same_dicts  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.cli.app import app  # noqa: E402
from wan_loader.formats.inventory import checkpoints_in  # noqa: E402
from wan_loader.verify import verify  # noqa: E402

MODEL = {"weight": torch.randn(3, 3), "bias": torch.randn(3)}
EMA = {"weight": torch.randn(3, 3), "bias": torch.randn(3)}
PARTS = {"state_dict": MODEL, "ema.model": EMA}
SPLIT = [{"ema": {"model": {name: EMA[name]}}} for name in EMA]


@pytest.fixture(params=["zip", "legacy"])
def nested(request, tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = {"state_dict": OrderedDict(MODEL), "ema": {"model": EMA, "decay": 0.99}, "epoch": 3}
    torch.save(state, path, _use_new_zipfile_serialization=request.param == "zip")
    return path


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_loaded_as_a_checkpoint(nested, device, part):
    same_dicts(wan_loader.load_file(nested, device, part=part), PARTS[part])
    loaded = wan_loader.load(nested, device, part=part, dtype="bf16")
    same_dicts(loaded.tensors, {name: tensor.bfloat16() for name, tensor in PARTS[part].items()})
    assert loaded.report.settings["part"] == part
    assert verify(nested, loaded.tensors, part=part) == 2
    module = torch.nn.Linear(3, 3)
    wan_loader.load_into(module, nested, device=device, part=part)
    same_dicts(module.state_dict(), PARTS[part])
    with wan_loader.prewarm(nested, part=part) as warming:
        assert warming.wait(10)
    (found,) = checkpoints_in(nested, part)
    assert [file.path for file in found.files] == [str(nested)]


def test_a_part_of_several_files(tmp_path):
    paths = [tmp_path / f"{i}.pth" for i in range(2)]
    for path, state in zip(paths, SPLIT, strict=True):
        torch.save(state, path)
    same_dicts(wan_loader.load_file(paths, part="ema.model"), EMA)


def test_the_other_part_is_another_entry_of_the_cache(nested, tmp_path):
    """Names, dtypes and shapes are the same, and so is the file."""
    cached = wan_loader.open_checkpoint(nested, part="state_dict").format != "torch-pickle"
    for state in ("building", "hit"):
        for part, expected in PARTS.items():
            loaded = wan_loader.load(nested, part=part, dtype="fp64", cache=True, cache_dir=tmp_path / "cache")
            same_dicts(loaded.tensors, {name: tensor.double() for name, tensor in expected.items()})
            assert loaded.report.cache.state == (state if cached else "source")
            assert loaded.report.settings["part"] == part
            if loaded.build is not None:
                loaded.build.wait()


def test_without_a_part_the_error_says_how_to_name_one(nested):
    module = torch.nn.Linear(3, 3)
    for call in (wan_loader.load_file, wan_loader.prewarm, lambda p: wan_loader.load_into(module, p, device="cpu")):
        with pytest.raises(wan_loader.CheckpointError, match="part='state_dict' or --part state_dict"):
            call(nested)
    with pytest.raises(wan_loader.OptionError, match="part is of type list: pass the keys"):
        wan_loader.load_file(nested, part=["state_dict"])


def test_a_dict_that_carries_notes_is_flat(tmp_path):
    """As `Module.state_dict` gives it."""
    state = torch.nn.Linear(3, 3).state_dict()
    assert state._metadata
    torch.save(state, tmp_path / "model.pth")
    same_dicts(wan_loader.load_file(tmp_path / "model.pth"), state)


def run(*words):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exception is None, done.exception
    return done


@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["load", "--device", "cpu", "--verify"],
        ["profile", "--device", "cpu", "--no-ceilings"],
        ["estimate", "--dtype", "bf16"],
    ],
    ids=lambda words: words[0],
)
def test_commands_take_a_part(nested, words):
    document = json.loads(run(*words, nested, "--part", "ema.model", "--json").stdout)
    nbytes = document["nbytes_file"] if words[0] in ("load", "profile") else document["nbytes"]
    assert nbytes == 48
    done = CliRunner().invoke(app, [*words, str(nested)])
    assert isinstance(done.exception, wan_loader.CheckpointError)
    assert "--part state_dict" in str(done.exception)


def test_an_entry_of_the_cache_says_its_part(tmp_path):
    torch.save({"model": MODEL}, tmp_path / "checkpoint.pth")
    options = ["--cache-dir", tmp_path / "cache"]
    run("cache", "build", tmp_path / "checkpoint.pth", "--part", "model", "--dtype", "fp16", *options)
    entries = json.loads(run("cache", "list", "--json", *options).stdout)["entries"]
    assert [entry["source"] for entry in entries] == [f"{tmp_path / 'checkpoint.pth'}, part model"]
    loaded = wan_loader.load(
        tmp_path / "checkpoint.pth", part="model", dtype="fp16", cache=True, cache_dir=tmp_path / "cache"
    )
    assert loaded.report.cache.state == "hit"
    same_dicts(loaded.tensors, {name: tensor.half() for name, tensor in MODEL.items()})
