"""What lies where when, and that fetching can be stopped: tiny networks, loads slowed down or broken on purpose."""

import threading
import time
from dataclasses import replace

import pytest

pytest.importorskip("diffusers")

import torch
from networks import built

from wan_pipeline import modules, residency
from wan_pipeline.presets import ResidencyStep, load_preset, residency_steps
from wan_pipeline.residency import BackgroundFetch, FetchCancelledError, ModuleResidency, Placement
from wan_pipeline.wan_checkpoint import open_wan

NAMES = ["text_encoder", "transformer", "transformer_2", "vae"]


@pytest.fixture
def make(tiny_wan):
    """preset name -> a residency of a tiny checkpoint on the CPU, closed at the end."""
    made = []

    def build(preset, *, provide=True):
        checkpoint = open_wan(tiny_wan())
        parts = [Placement(c, torch.device("cpu"), None) for c in checkpoint.components]
        keeper = ModuleResidency(
            parts, residency_steps(load_preset(preset), NAMES), warm_ahead=load_preset(preset).warm_ahead
        )
        made.append(keeper)
        keeper.built = {c.name: built(c, None) for c in checkpoint.components}
        if provide:
            for name, module in keeper.built.items():
                keeper.provide(name, module)
        return keeper

    yield build
    for keeper in made:
        keeper.close()


@pytest.fixture
def gate(monkeypatch):
    """Loads wait until it is set, and ask their token meanwhile, as a real load does block by block."""
    go = threading.Event()
    fetch = modules.fetch

    def slow(component, *, cancel, **settings):
        while not go.wait(0.005):
            cancel.check()
        return fetch(component, cancel=cancel, **settings)

    monkeypatch.setattr(residency.modules, "fetch", slow)
    return go


def loaded(keeper):
    return [n for n, m in keeper.built.items() if not any(p.is_meta for p in m.parameters())]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("fastest", [set(NAMES)] * 4),
        ("balanced", [{"text_encoder", "transformer"}, {"transformer", "vae"}, {"transformer_2", "vae"}, {"vae"}]),
        ("min-memory", [{n} for n in NAMES]),
    ],
)
def test_each_phase_holds_what_its_preset_allows(make, preset, expected):
    keeper = make(preset)
    keeper.start()
    for _ in range(2):
        for name, wanted in zip(NAMES, expected, strict=True):
            keeper.use(name)
            keeper.wait_all()
            assert set(loaded(keeper)) == set(keeper.resident()) == wanted
            keeper.use(name)  # costs nothing
    n_loads = 1 if preset == "fastest" else 2
    assert sorted(n for n, *_ in keeper.log.loads) == sorted(NAMES * n_loads)
    assert [n for n, *_ in keeper.log.waits] == NAMES * 2


def test_an_expert_that_gave_way_to_the_vae_comes_back_behind_the_others(make):
    keeper = make("fastest")
    kept = [n for n in NAMES if n != "transformer_2"]
    keeper._steps["vae"] = ResidencyStep("vae", tuple(kept))
    keeper.start()
    for name in NAMES:
        keeper.use(name)
    assert loaded(keeper) == kept
    keeper.use("text_encoder")
    keeper.wait_all()
    assert loaded(keeper) == NAMES
    keeper.use("transformer")
    keeper.use("transformer_2")
    assert [n for n, *_ in keeper.log.loads] == [*NAMES, "transformer_2"]


def test_loading_begins_before_there_are_modules(make):
    keeper = make("fastest", provide=False)
    keeper.start()
    keeper.wait_all()
    assert loaded(keeper) == []
    for name, module in keeper.built.items():
        keeper.provide(name, module)
    assert loaded(keeper) == NAMES


def test_the_next_expert_loads_behind_the_running_one(make, gate):
    keeper = make("fastest")
    keeper.start()
    gate.set()
    keeper.use("transformer")
    keeper.wait_all()
    start = len(keeper.log.loads)
    keeper.use("transformer_2")
    assert len(keeper.log.loads) == start
    _, begun, ended = keeper.log.waits[-1]
    assert ended - begun < 50_000_000


def test_a_prefetch_can_be_cancelled_and_fetched_again(make, gate):
    keeper = make("fastest")
    keeper.start()
    keeper.cancel("transformer_2")
    assert "transformer_2" not in loaded(keeper)
    gate.set()
    keeper.use("transformer_2")
    assert "transformer_2" in loaded(keeper)


def test_close_ends_everything_at_once(make, gate):
    keeper = make("fastest")
    keeper.start()
    keeper.close()
    assert loaded(keeper) == []
    for thread in [t for t in threading.enumerate() if t.name.startswith("fetch")]:
        thread.join(1)
        assert not thread.is_alive()


def test_a_failed_load_is_raised_to_whoever_needs_it_and_may_be_tried_again(make, monkeypatch):
    keeper = make("min-memory")
    fetch = modules.fetch

    def broken(component, **settings):
        raise OSError("the disk is gone")

    monkeypatch.setattr(residency.modules, "fetch", broken)
    keeper.start()
    with pytest.raises(OSError, match="the disk is gone"):
        keeper.use("text_encoder")
    monkeypatch.setattr(residency.modules, "fetch", fetch)
    keeper.use("text_encoder")
    assert loaded(keeper) == ["text_encoder"]


def test_fetches_run_one_after_the_other():
    order, go = [], threading.Event()
    first = BackgroundFetch("a", lambda stop: (go.wait(10), order.append("a")))
    second = BackgroundFetch("b", lambda stop: order.append("b"), first)
    third = BackgroundFetch("c", lambda stop: order.append("c"), second)
    third.stop()
    go.set()
    second.wait()
    assert order == ["a", "b"]
    with pytest.raises(FetchCancelledError):
        third.wait()


def streaming(component):
    from wan_pipeline.fitting import measure_blocks
    from wan_pipeline.memory_plan import Streaming

    blocks = measure_blocks(component, None)
    budget = blocks.needed(blocks.count, 1)
    return Streaming(blocks=blocks, n_streamed=blocks.count, buffers=1, device_nbytes=budget, cache_nbytes=None)


@pytest.fixture
def streamed(make):
    """A residency that streams both experts and the text encoder."""
    keeper = make("streamed", provide=False)
    for name in NAMES[:3]:
        one = keeper._placements[name]
        keeper._placements[name] = replace(one, streaming=streaming(one.component))
    return keeper


def test_a_streamed_network_waits_for_its_module_and_is_let_go_like_any_other(streamed):
    streamed.start()
    time.sleep(0.05)
    assert streamed.resident() == ()
    for name, module in streamed.built.items():
        streamed.provide(name, module)
    for _ in range(2):
        for name in NAMES:
            streamed.use(name)
            assert streamed.resident() == (name,)
            held = [n for n, one in streamed._streamed.items() if not one.closed]
            assert held == ([name] if name != "vae" else [])
            assert loaded(streamed) == [name]
    assert sorted(streamed.streams()) == sorted(NAMES[:3])
    assert all(report.n_fetched for report in streamed.streams().values())


def test_all_can_be_dropped_and_comes_back(streamed):
    for name, module in streamed.built.items():
        streamed.provide(name, module)
    streamed.start()
    assert streamed.drop_all() == ("text_encoder",)
    assert streamed.is_empty
    streamed.use("transformer")
    (one,) = streamed._streamed.values()
    assert streamed.weights_nbytes > 0
    assert streamed.drop_all() == ("transformer",)
    assert one.closed
    assert streamed.weights_nbytes == 0
    assert loaded(streamed) == []
    streamed.use("transformer")
    assert loaded(streamed) == ["transformer"]


@pytest.mark.parametrize("cache_nbytes", [10**9, 0, None])
def test_the_pages_of_a_streamed_network_are_read_at_once_where_they_fit(make, monkeypatch, cache_nbytes):
    keeper, read = make("streamed"), []
    one = keeper._placements["text_encoder"]
    order = replace(streaming(one.component), cache_nbytes=cache_nbytes)
    keeper._placements["text_encoder"] = replace(one, streaming=order)
    prewarm = residency.prewarm_files
    monkeypatch.setattr(residency, "prewarm_files", lambda files, **o: read.extend(files) or prewarm(files, **o))
    keeper._warm_ahead = False
    keeper.start()
    keeper.use("text_encoder")
    assert read == (list(one.component.files) if cache_nbytes else [])
    assert keeper.resident() == ("text_encoder",)


def test_what_the_page_cache_cannot_hold_is_read_from_the_disk(make):
    keeper = make("streamed")
    one = keeper._placements["transformer"]
    order = streaming(one.component)
    order = replace(order, cache_nbytes=order.blocks.nbytes_file)
    keeper._placements["transformer"] = replace(one, streaming=order)
    keeper.start()
    keeper.use("transformer")
    report = keeper.streams()["transformer"]
    assert report.n_direct == order.n_read == order.n_streamed - 1


def test_what_waits_for_its_module_ends_when_told(streamed):
    streamed.start()
    streamed.close()
    with pytest.raises(FetchCancelledError):
        streamed._last.wait()
    streamed.close()


def test_a_streamed_network_that_is_closed_runs_no_more(streamed):
    for name, module in streamed.built.items():
        streamed.provide(name, module)
    streamed.start()
    streamed.use("transformer")
    handle = streamed._streamed["transformer"]
    streamed.close()
    assert handle.closed
    assert loaded(streamed) == []
