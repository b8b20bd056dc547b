"""Rival loaders as their users call them: what each is asked for, what it refuses, and what it gives on the CPU."""

import importlib.metadata
import itertools
import json
import os
import sys
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from wan_loader.bench import runner, sample
from wan_loader.bench.check import compare_tensors
from wan_loader.bench.contract import Loader, LoadTask, NotApplicableError, Outcome, installed_versions, missing_package
from wan_loader.bench.loaders import LOADERS
from wan_loader.bench.runner import LoaderSetup, Settings, has_turn, run_cases
from wan_loader.bench.storage import Place


def task_of(directory, **other):
    files = tuple(str(path) for path in sorted(Path(directory).glob("*.safetensors")))
    facts = {"format": "safetensors", "file_dtype": "float32", "device": "cpu", "directory": str(directory)}
    return LoadTask(files=files, **{**facts, **other})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model in diffusers' layout, its experts in fp32."""
    synth = pytest.importorskip("wan_pipeline.synth")
    directory = tmp_path_factory.mktemp("tiny") / "model"
    synth.synth(directory, layout="diffusers", size="tiny", components=["high_noise", "text_encoder"], dtype="fp32")
    return directory


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("name", "component", "file_dtype"),
    [
        ("diffusers", "transformer", "float32"),
        ("diffusers-parallel", "transformer", "float32"),
        ("transformers", "text_encoder", "bfloat16"),
    ],
)
def test_a_module_of_a_component_has_its_tensors(tiny, monkeypatch, name, component, file_dtype, dtype):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    task = task_of(tiny / component, dtype=dtype, file_dtype=file_dtype)
    sample._make_ready(LOADERS[name], task)
    outcome = LOADERS[name].load(task)
    compared, problems = compare_tensors(task, outcome)
    assert not problems
    assert compared > 20


@pytest.mark.parametrize(("name", "component"), [("diffusers", "text_encoder"), ("transformers", "transformer")])
def test_a_component_of_the_other_library_is_not_applicable(tiny, name, component):
    with pytest.raises(NotApplicableError, match=f"names no class of {name}"):
        LOADERS[name].prepare(task_of(tiny / component))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "no config.json"),
        ("[]", "not a component's"),
        ("{", "not a component's"),
        ('{"_class_name": 5}', "names no class"),
        ('{"_class_name": "os"}', "no model class os"),
    ],
)
def test_a_directory_that_names_no_model_is_not_applicable(checkpoint, config, words):
    pytest.importorskip("diffusers")
    if config is not None:
        (checkpoint / "config.json").write_text(config)
    with pytest.raises(NotApplicableError, match=words):
        LOADERS["diffusers"].prepare(task_of(checkpoint))


class PrefetchingFile:
    """What safetensors 0.9 opens, as far as it is used; `asked` are the devices that were asked for."""

    asked = ()

    def __init__(self, path, framework):
        assert framework == "pt"
        self._tensors = load_file(path)

    def prefetch(self, *, device):
        type(self).asked += (device,)
        return nullcontext(list(self._tensors.items()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_prefetched_files_are_kept_and_converted(checkpoint, monkeypatch, dtype):
    task, loader = task_of(checkpoint, dtype=dtype), LOADERS["safetensors-prefetch"]
    with monkeypatch.context() as patched:
        patched.setattr(safetensors, "safe_open", PrefetchingFile)
        patched.setattr(PrefetchingFile, "asked", ())
        loader.prepare(task)
        outcome = loader.load(task)
        asked = PrefetchingFile.asked
    assert asked == ("cpu",)
    assert compare_tensors(task, outcome) == (12, [])


def test_an_older_safetensors_is_not_applicable(checkpoint, monkeypatch):
    monkeypatch.setattr(safetensors, "safe_open", object)
    with pytest.raises(NotApplicableError, match=f"needs safetensors >= 0.9, and this is {safetensors.__version__}"):
        LOADERS["safetensors-prefetch"].prepare(task_of(checkpoint))


class Streamer:
    """Run:ai's streamer before 0.17: on the CPU it gives views of one buffer, which it fills again."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def stream_files(self, paths, device):
        self._tensors = load_file(paths[0])

    def get_tensors(self):
        for name, tensor in self._tensors.items():
            yield name, tensor
            tensor.zero_()


class OwningStreamer(Streamer):
    """The same from 0.17 on: tensors belong to the caller."""

    def stream_files(self, paths, device, owned=True):
        super().stream_files(paths, device)

    def get_tensors(self):
        return iter(self._tensors.items())


@pytest.mark.parametrize("streamer", [Streamer, OwningStreamer])
def test_streamed_tensors_are_copied_only_where_they_are_lent(checkpoint, monkeypatch, streamer):
    monkeypatch.setitem(sys.modules, "runai_model_streamer", types.SimpleNamespace(SafetensorsStreamer=streamer))
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copied.append(1) or clone(tensor))
    task = task_of(checkpoint)
    outcome = LOADERS["runai"].load(task)
    assert len(copied) == (12 if streamer is Streamer else 0)
    assert compare_tensors(task, outcome) == (12, [])


def test_a_loaders_variables_are_set_before_it_is_imported(checkpoint, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    seen = []
    loader = replace(LOADERS["diffusers-parallel"], modules=(), prepare=lambda _: seen.append(dict(os.environ)))
    sample._make_ready(loader, task_of(checkpoint))
    assert seen[0]["HF_ENABLE_PARALLEL_LOADING"] == "yes"


@pytest.mark.parametrize(("peak", "told"), [(1000, 1000), (600, 600), (599, None)])
def test_memory_that_torch_did_not_allocate_is_not_known(monkeypatch, peak, told):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    whole = torch.zeros(100)
    tensors = [whole, whole[:50], torch.zeros(50)]
    assert sample._memory("cuda:0", tensors)["device_peak_bytes"] == told


@pytest.mark.gpu
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_rivals_on_the_gpu(tiny, command, component):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = ("--device", "cuda", "--dtype", "bf16", "--repeat", 1, "--json")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    done = command("bench", tiny / component, *options, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout)["cases"]
    for result in case["results"]:
        assert result["status"] in ("ok", "not installed", "not applicable"), result
        assert result["status"] != "ok" or result["compared_tensors"] > 20


def test_a_missing_package_is_named(monkeypatch):
    def version(name):
        if name == "accelerate":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9"

    monkeypatch.setattr("wan_loader.bench.contract.version", version)
    loader = LOADERS["diffusers-parallel"]
    assert missing_package(loader) == "accelerate"
    assert installed_versions(loader) == {"diffusers": "9.9", "accelerate": None}
    assert missing_package(LOADERS["diffusers"]) is None


def test_packing_leaves_the_config_where_diffusers_looks_for_it(checkpoint, monkeypatch, tmp_path):
    packed = []
    fake = types.SimpleNamespace(pack_to_file=lambda tensors, path, dtype: packed.append((len(tensors), path, dtype)))
    monkeypatch.setitem(sys.modules, "flashpack", fake)
    loader, target = LOADERS["diffusers-flashpack"], tmp_path / "model.flashpack"
    assert loader.packed_name == target.name
    (checkpoint / "config.json").write_text('{"a": 1}')
    loader.convert(task_of(checkpoint, packed=str(target), dtype="bfloat16"))
    assert packed == [(12, str(target), torch.bfloat16)]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert loader.convert is LOADERS["flashpack"].convert


@pytest.fixture
def asked(monkeypatch):
    """Requests that a bench would have sent to processes; those for a name in `refused` are answered with no."""
    sent = []

    def ask(request, *, time_limit_s):
        sent.append((request["kind"], request.get("loader")))
        if request["kind"] == "convert":
            if request["loader"] == "picky":
                return {"status": "not applicable", "reason": "needs more"}
            Path(request["task"]["packed"]).write_bytes(b"x")
            return {"status": "ok", "seconds": 1.0}
        return {"status": "ok", "seconds": 1.0, "values": {}}

    monkeypatch.setattr(runner, "ask", ask)
    return sent


def settings_of(checkpoint, loaders, **other):
    entries = [LoaderSetup(loader.name, loader) for loader in loaders]
    common = {"paths": [str(checkpoint)], "places": [Place("here")], "caches": ["as-is"], "device": "cpu"}
    return Settings(entries=entries, **common, **other)


def loader_named(name, **other):
    return Loader(name, (), (), "", lambda task: Outcome({}), **other)


def test_loaders_of_one_format_share_the_converted_file(checkpoint, asked):
    def convert(task):
        return None

    loaders = [loader_named(n, convert=convert, packed_name="p") for n in ("picky", "first", "second")]
    loaders.append(loader_named("other", convert=lambda task: None))
    cases = []
    run_cases(settings_of(checkpoint, loaders, repeat=1), lambda line: None, cases)
    converted = [name for kind, name in asked if kind == "convert"]
    assert converted == ["picky", "first", "other"], "what one refuses may do for the next"
    picky, first, second, other = cases[0].results
    assert (picky.status, picky.reason) == ("not applicable", "needs more")
    assert first.packed == second.packed != other.packed
    assert Path(first.packed).name == "p"
    assert first.conversion_s == second.conversion_s == 1.0


@pytest.mark.parametrize(
    ("repeat", "rivals", "ours_n", "rival_n"), [(5, 3, 5, 3), (5, None, 5, 5), (2, 4, 2, 4), (1, 1, 1, 1)]
)
def test_rivals_may_have_fewer_samples(checkpoint, asked, repeat, rivals, ours_n, rival_n):
    loaders = [LOADERS["ours"], loader_named("rival")]
    cases = []
    run_cases(settings_of(checkpoint, loaders, repeat=repeat, rival_repeat=rivals), lambda line: None, cases)
    assert [len(result.samples) for result in cases[0].results] == [ours_n, rival_n]


@pytest.mark.parametrize(("total", "wanted"), [(5, 3), (5, 5), (7, 2), (3, 1)])
def test_turns_lie_evenly_and_begin_with_the_first_round(total, wanted):
    turns = [number for number in range(total) if has_turn(number, total, wanted)]
    assert len(turns) == wanted
    assert turns[0] == 0
    gaps = {after - before for before, after in itertools.pairwise(turns)}
    assert len(gaps) <= 1 or max(gaps) - min(gaps) == 1
