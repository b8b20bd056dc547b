"""What a pipeline is about to load is read meanwhile, and nothing else, and never in the way."""

import ast
import importlib.util
import json
import sys
import threading
import types
from pathlib import Path

import pytest

from wan_loader.engine.activity import loading
from wan_loader.fastpath.libraries.read_ahead import ReadAhead, files_to_load
from wan_loader.fastpath.patches import Patches
from wan_loader.fastpath.tally import Tally
from wan_loader.system import machine
from wan_loader.warming import prewarm

MODULE = "diffusers.pipelines.pipeline_utils"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0",
    "boundary_ratio": 0.875,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
FILES = {
    "image_encoder": ["model.safetensors"],
    "scheduler": ["scheduler_config.json"],
    "text_encoder": ["config.json", "model.safetensors", "model.fp16.safetensors"],
    "transformer": [*SHARDS, "diffusion_pytorch_model.safetensors.index.json"],
    "vae": ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"],
}
NBYTES = 40_000


@pytest.fixture
def model(tmp_path):
    """A pipeline's directory, without what makes sense."""
    for folder, names in FILES.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(b"x" * NBYTES)
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    return tmp_path


def listed(model, given=(), variant=None):
    return [str(Path(file).relative_to(model)) for file in files_to_load(str(model), given, variant)]


def test_components_come_in_their_order_without_what_is_given(model):
    transformer = [f"transformer/{shard}" for shard in SHARDS]
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert listed(model) == ["text_encoder/model.safetensors", *transformer, vae]
    assert listed(model, given={"text_encoder", "torch_dtype"}) == [*transformer, vae]


def test_a_variant_is_taken_where_there_is_one(model):
    (model / "transformer" / "diffusion_pytorch_model.fp16-00001-of-00001.safetensors").touch()
    assert listed(model, variant="fp16") == [
        "text_encoder/model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_component_with_several_sets_of_files_is_left(model):
    (model / "transformer" / "diffusion_pytorch_model.safetensors").touch()
    assert listed(model, given={"vae"}) == ["text_encoder/model.safetensors"]


def test_a_component_that_is_not_there_is_left(model):
    kind = INDEX["vae"]
    index = {f"../{model.name}/vae": kind, "other": kind, "vae": kind, "list": ["a", 1], "number": 3}
    (model / "model_index.json").write_text(json.dumps(index))
    assert listed(model) == ["vae/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, "\xff"])
def test_an_index_that_is_none_is_a_value_error(model, text):
    (model / "model_index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises((ValueError, RecursionError)):
        files_to_load(str(model), (), None)


class Calls:
    """A library that has pipelines, and what was read ahead when each was asked for."""

    def __init__(self):
        self.module = types.ModuleType(MODULE)
        exec(
            "class DiffusionPipeline:\n"
            "    @classmethod\n"
            "    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):\n"
            "        return cls, pretrained_model_name_or_path, kwargs\n"
            "class WanPipeline(DiffusionPipeline):\n"
            "    pass\n",
            vars(self.module),
        )
        self.seam, self.patches = ReadAhead(), Patches(Tally())

    def __call__(self, *args, **kwargs):
        """Call, and wait for what that has begun."""
        result = self.module.WanPipeline.from_pretrained(*args, **kwargs)
        for thread in threading.enumerate():
            if thread.name == "read ahead":
                thread.join(10)
        if self.seam.running is not None:
            assert self.seam.running.wait(10)
        assert result[0] is self.module.WanPipeline
        return self.seam.running and self.seam.running.nbytes_read


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()
    monkeypatch.setitem(sys.modules, MODULE, calls.module)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    calls.seam.install(calls.patches)
    yield calls
    calls.patches.undo()


@pytest.fixture
def cold(model, evict):
    for file in files_to_load(str(model), (), None):
        evict(file)
    return model


def test_the_files_are_read(calls, cold, resident):
    files = files_to_load(str(cold), {"vae"}, None)
    assert calls(str(cold), vae=None, torch_dtype="bf16") == len(files) * NBYTES
    assert all(resident(file) == NBYTES for file in files)
    assert resident(cold / "vae" / "diffusion_pytorch_model.safetensors") == 0


@pytest.mark.parametrize("call", [lambda c, m: c(m), lambda c, m: c(pretrained_model_name_or_path=m)])
def test_the_path_may_be_given_in_any_way(calls, cold, call):
    assert call(calls, cold) == 4 * NBYTES


def test_nothing_is_read_of_what_is_there(calls, model):
    assert calls(model) is None


def test_nothing_is_read_where_that_is_not_known(calls, cold, monkeypatch):
    monkeypatch.setattr("wan_loader.system.page_cache.cached", lambda *_: None)
    assert calls(cold) is None


@pytest.mark.parametrize(
    "arguments", [{"revision": "x"}, {"cache_dir": "x"}, {"use_safetensors": False}, {"variant": 3}], ids=str
)
def test_other_files_than_those_here_may_be_meant(calls, cold, arguments):
    assert calls(cold, **arguments) is None


@pytest.mark.parametrize("path", [3, None, "no/such/model", "/nowhere", b"bytes"])
def test_a_path_that_makes_no_sense_is_the_call_s_own_matter(calls, path):
    assert calls(path) is None


def test_one_process_of_a_machine_reads_for_all(calls, cold, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert calls(cold) is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert calls(cold) == 4 * NBYTES


def test_it_takes_no_memory_that_is_not_there(calls, cold, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 0)
    assert calls(cold) == 0
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    calls.seam.running = None
    assert calls(cold) is None


def test_a_load_has_the_disk_to_itself(calls, cold):
    with loading():
        assert calls(cold) == 0


def test_it_ends_with_the_fast_path(calls, cold, monkeypatch):
    plain = prewarm.fill

    def fill(*arguments):
        calls.patches.undo()
        return plain(*arguments)

    monkeypatch.setattr(prewarm, "fill", fill)
    monkeypatch.setattr("wan_loader.fastpath.libraries.read_ahead._MAX_THREADS", 1)
    assert calls(cold) == NBYTES


def test_without_a_thread_more_the_call_goes_on(calls, cold, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert calls(cold) is None


def test_diffusers_has_the_function_that_is_known_here():
    found = importlib.util.find_spec("diffusers")
    if found is None:
        pytest.skip("diffusers is not installed")
    tree = ast.parse((Path(found.origin).parent / "pipelines" / "pipeline_utils.py").read_text())
    (owner,) = (node for node in tree.body if getattr(node, "name", None) == "DiffusionPipeline")
    (method,) = (node for node in owner.body if getattr(node, "name", None) == "from_pretrained")
    assert "classmethod" in [getattr(word, "id", None) for word in method.decorator_list]
    assert [argument.arg for argument in method.args.args] == ["cls", "pretrained_model_name_or_path"]
    assert method.args.kwarg.arg == "kwargs"
