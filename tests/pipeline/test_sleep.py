"""A pipeline that gives its memory back and takes it again, and makes the same videos."""

import numpy as np
import pytest

pytest.importorskip("diffusers")

import torch

import wan_pipeline
from wan_loader import OptionError
from wan_pipeline import residency

SMALL = {"size": (32, 32), "frame_num": 5, "steps": 3}
NAMES = ("text_encoder", "transformer", "transformer_2", "vae")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def start(request, tiny_wan):
    """preset -> a started pipeline, closed at the end."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = []

    def starting(preset):
        limits = {"size": SMALL["size"], "frame_num": SMALL["frame_num"]}
        made.append(wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), preset=preset, device=request.param, **limits))
        return made[-1]

    yield starting
    for pipe in made:
        pipe.close()


def weights(pipe):
    networks = (pipe.pipe.text_encoder, pipe.pipe.transformer, pipe.pipe.transformer_2, pipe.pipe.vae)
    return [p for network in networks for p in network.parameters()]


@pytest.mark.parametrize("preset", ["fastest", "min-memory"])
def test_it_sleeps_and_makes_the_same_video(start, preset):
    pipe = start(preset)
    before = pipe("two cats", **SMALL).frames_THWC
    nbytes = sum(p.nbytes for p in weights(pipe) if not p.is_meta)
    on_cuda = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    slept = pipe.sleep()
    assert pipe.asleep
    assert all(p.is_meta for p in weights(pipe))
    assert slept.networks == (NAMES if preset == "fastest" else ("vae",))
    assert slept.nbytes == nbytes > 0
    if pipe.pipe.transformer.__dict__["_hf_hook"].execution_device.type == "cuda":
        assert on_cuda - torch.cuda.memory_allocated() >= nbytes
        # tensors that stay, such as rotary tables, may share a block of the allocator with weights
        assert slept.device_nbytes > 0
        assert slept.device_nbytes_after == torch.cuda.memory_reserved()
    else:
        assert slept.device_nbytes == 0
    assert pipe.sleep().networks == ()

    woken = pipe.wake()
    assert not pipe.asleep
    assert woken.networks == (NAMES if preset == "fastest" else ("text_encoder",))
    assert woken.nbytes > 0 < woken.gbps
    assert pipe.wake().networks == ()
    loads = len(pipe.report()["pipeline"]["loads"])
    np.testing.assert_array_equal(pipe("two cats", **SMALL).frames_THWC, before)
    assert len(pipe.report()["pipeline"]["loads"]) == loads + (0 if preset == "fastest" else 3)


def test_using_it_wakes_it_and_a_sleep_ends_what_is_on_its_way(start):
    pipe = start("fastest")
    slept = pipe.sleep()
    assert slept.networks == NAMES
    assert np.isfinite(pipe("two cats", **SMALL).frames_THWC).all()
    assert not pipe.asleep
    pipe.close()
    assert pipe.asleep
    for use in (pipe.wake, lambda: pipe("two cats", **SMALL)):
        with pytest.raises(OptionError, match="was closed"):
            use()


def test_a_wake_that_fails_can_be_tried_again(start, monkeypatch):
    pipe = start("fastest")
    pipe.wait()
    pipe.sleep()
    fetch = residency.modules.fetch

    def full(component, **settings):
        raise MemoryError("others have it")

    monkeypatch.setattr(residency.modules, "fetch", full)
    with pytest.raises(MemoryError, match="others have it"):
        pipe.wake()
    monkeypatch.setattr(residency.modules, "fetch", fetch)
    pipe.sleep()
    assert pipe.wake().networks == NAMES


def test_one_of_several_processes_does_not_sleep(start, monkeypatch):
    pipe = start("fastest")
    with monkeypatch.context() as patched:
        patched.setattr(wan_pipeline.WanT2V, "run", property(lambda self: object()))
        with pytest.raises(OptionError, match="several processes"):
            pipe.sleep()
    pipe.wait()
    assert not pipe.asleep
