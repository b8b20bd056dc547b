"""What fits where and how, and the numbers when it does not. No device is needed."""

import re

import pytest

from wan_loader.errors import DeviceMemoryError, HostMemoryError
from wan_loader.sizes import parse_size
from wan_pipeline.memory_plan import (
    CONTEXT_BYTES,
    LIBRARY_BYTES,
    WORKSPACE_BYTES,
    Blocks,
    Limits,
    Needs,
    allocator_nbytes,
    choose,
    plan_memory,
)
from wan_pipeline.presets import PRESETS, load_preset, residency_steps

GB = 10**9
# WAN2.2-T2V-A14B in bf16, the VAE's decoder in fp32
SIZES = {
    "text_encoder": 11_361_820_672,
    "transformer": 28_635_351_168,
    "transformer_2": 28_635_351_168,
    "vae": 294 * 10**6,
}
# 81 frames of 1280*720, and of 832*480
WORK = {"text_encoder": GB // 2, "transformer": 10 * GB, "transformer_2": 10 * GB, "vae": 24 * GB}
SMALLER = {"text_encoder": GB // 2, "transformer": 4_300_000_000, "transformer_2": 4_300_000_000, "vae": 10_400_000_000}
NAMES = list(SIZES)
EXPERT = Blocks(count=40, nbytes=703_000_000, nbytes_file=703_000_000, rest_nbytes=530_000_000)
BLOCKS = {
    "text_encoder": Blocks(count=24, nbytes=386_000_000, nbytes_file=386_000_000, rest_nbytes=2_110_000_000),
    "transformer": EXPERT,
    "transformer_2": EXPERT,
}
BESIDE = CONTEXT_BYTES + LIBRARY_BYTES + WORKSPACE_BYTES


def limits(device_gb, host_gb=64, world_size=1, **more):
    nbytes = None if device_gb is None else int(device_gb * GB)
    return Limits(device="cuda:0", device_nbytes=nbytes, host_nbytes=host_gb * GB, world_size=world_size, **more)


def needs(work=WORK, sizes=SIZES, tiled=5 * GB, host_nbytes=0):
    return Needs(sizes=sizes, workspace=work, blocks=BLOCKS, tiled_workspace={"vae": tiled}, host_nbytes=host_nbytes)


def chosen(limit_gb, *, work=SMALLER, free_gb=80, cache_gb=64, **flags):
    limit = None if limit_gb is None else round(limit_gb * GB)
    return choose(needs(work), limits(free_gb, cache_nbytes=cache_gb * GB), device_memory=limit, **flags)


def bytes_at_peak(plan, sizes, work, *, tiled=5 * GB):
    """Add up every step by hand."""
    total = 0
    for step in plan.steps:
        held = [
            plan.streams[n].blocks.needed(plan.streams[n].n_streamed, plan.streams[n].buffers)
            if n in plan.streams
            else sizes[n]
            for n in step.resident
            if n != "text_encoder" or plan.preset.text_encoder == "device"
        ]
        total = max(total, sum(held) + (tiled if step.uses in plan.tiled else work[step.uses]))
    return total


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_holds_its_own_contract(name):
    preset = load_preset(name)
    work = SMALLER if name == "streamed" else WORK
    plan = plan_memory(preset, needs(work), limits(preset.device_memory_gb))
    assert bytes_at_peak(plan, SIZES, work) <= preset.device_memory_gb * GB - BESIDE * preset.whole_process
    assert plan.reason.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("free_gb", "name"), [(84, "fastest"), (70, "balanced"), (50, "balanced"), (40, "min-memory"), (24, "streamed")]
)
def test_auto_takes_the_fastest_that_fits_and_says_why(free_gb, name):
    plan = choose(needs(), limits(free_gb))
    assert plan.preset.name == name
    assert plan.reason.startswith(f"{name}: ")
    allowed = (
        free_gb - (LIBRARY_BYTES + WORKSPACE_BYTES) / GB
        if name == "streamed"
        else min(free_gb, plan.preset.device_memory_gb)
    )
    assert f"{allowed:.1f} GB allowed on cuda:0" in plan.reason


@pytest.mark.parametrize(
    ("limit_gb", "name"), [(80, "fastest"), (60, "balanced"), (35, "min-memory"), (24, "streamed"), (12, "streamed")]
)
def test_a_limit_is_of_the_whole_process(limit_gb, name):
    plan = chosen(limit_gb, free_gb=140)
    assert plan.preset.name == name
    assert bytes_at_peak(plan, SIZES, SMALLER) <= limit_gb * GB - BESIDE
    assert allocator_nbytes(plan.preset) == limit_gb * GB - BESIDE + WORKSPACE_BYTES
    assert allocator_nbytes(load_preset(name)) == (11 * GB if name == "streamed" else None)


def test_twelve_gigabytes():
    plan = chosen(12)
    assert not plan.tiled
    assert [step.resident for step in plan.steps] == [(name,) for name in NAMES]
    text, high, low = (plan.streams[name] for name in NAMES[:3])
    assert high == low
    # as many blocks stay as fit, and not one more
    for one, work in ((text, GB // 2), (high, SMALLER["transformer"])):
        budget = 12 * GB - BESIDE - work
        assert one.device_nbytes == budget
        assert one.buffers == 3
        assert one.blocks.needed(one.n_streamed, 3) <= budget < one.blocks.needed(one.n_streamed - 1, 3)
    assert "12.0 GB, as 1.1 GB are left to the driver and its libraries" in plan.reason
    assert f"{high.n_streamed} of 40 blocks of the high-noise expert and of the low-noise expert" in plan.reason
    assert "preset min-memory needs 3" in plan.reason


def test_the_vae_works_by_tiles_only_where_it_must():
    assert not chosen(26, work=WORK).tiled
    plan = chosen(20, work=WORK)
    assert plan.tiled == {"vae"}
    assert plan.reason.count("the VAE works by tiles, which changes its pictures slightly") == 1
    # a preset that was named does as it always did
    with pytest.raises(DeviceMemoryError, match="while the VAE runs"):
        plan_memory(load_preset("min-memory"), needs(sizes=dict.fromkeys(NAMES, GB)), limits(20))


def test_what_other_tensors_of_the_process_hold_counts():
    alone = choose(needs(SMALLER), limits(80), device_memory=12 * GB)
    beside = choose(needs(SMALLER), limits(80, held_nbytes=GB), device_memory=12 * GB)
    assert beside.streams["transformer"].device_nbytes == alone.streams["transformer"].device_nbytes - GB


def test_fewer_buffers_before_an_error():
    work = SMALLER["transformer"]
    found = {}
    for budget in range(1_200_000_000, 3 * GB, 50_000_000):
        small = {**SMALLER, "vae": GB, "text_encoder": 0}
        needed = Needs(sizes={**SIZES, "text_encoder": GB}, workspace=small, blocks=BLOCKS)
        try:
            plan = choose(needed, limits(80), device_memory=budget + work + BESIDE)
        except DeviceMemoryError:
            assert budget < EXPERT.needed(40, 1)
        else:
            one = plan.streams["transformer"]
            assert one.blocks.needed(one.n_streamed, one.buffers) <= budget
            found.setdefault(one.buffers, one.n_streamed)
    assert sorted(found) == [1, 2, 3]


@pytest.mark.parametrize("work", [WORK, SMALLER], ids=["720p", "480p"])
@pytest.mark.parametrize("flags", [{}, {"t5_cpu": True}, {"offload_model": True}, {"offload_model": False}])
@pytest.mark.parametrize("preset", ["auto", "streamed", "fastest"])
def test_the_error_of_a_limit_names_the_smallest_that_would_do(work, flags, preset):
    def plan(limit):
        if preset == "auto":
            return chosen(limit / GB, work=work, free_gb=140, **flags)
        return plan_memory(load_preset(preset).adapted(device_memory=limit, **flags), needs(work), limits(140))

    with pytest.raises(DeviceMemoryError) as error:
        plan(2 * GB)
    assert "900 MB are allowed of 2.0 GB, as 1.1 GB are left to the driver" in error.value.reason
    least = parse_size(re.search(r"allow ([\d.]+GB) or more", error.value.remedy)[1])
    assert bytes_at_peak(plan(least), SIZES, work) + BESIDE <= least
    with pytest.raises(DeviceMemoryError):
        plan(least - 100_000_001)


def test_a_small_network_is_not_streamed_where_that_takes_more():
    small = Blocks(count=2, nbytes=1000, nbytes_file=2000, rest_nbytes=17_000_000)
    needed = Needs(
        sizes={"text_encoder": 3000, "transformer": 1, "vae": 1}, workspace={}, blocks={"text_encoder": small}
    )
    with pytest.raises(DeviceMemoryError, match="allow 3000B or more"):
        choose(needed, limits(None), device_memory=2000)


def test_what_host_memory_costs_is_said_before_it_begins():
    assert "read" not in chosen(12, cache_gb=64).reason
    plan = chosen(12, cache_gb=10)
    expert = plan.streams["transformer"]
    n_read = expert.n_streamed - 14  # of 703 MB
    assert expert.n_read == n_read > 0
    nbytes = f"{n_read * 0.703:.1f} GB"
    experts = "high-noise expert and of the low-noise expert"
    assert f"; {n_read} of 40 blocks of the {experts} are read from the disk whenever it runs: {nbytes}" in plan.reason
    assert plan.streams["text_encoder"].n_read == 0


def test_what_cannot_fit_is_an_error_with_the_numbers():
    with pytest.raises(
        DeviceMemoryError, match=r"fastest needs 7\d\.\d GB .*text encoder 11\.4 GB .* 40\.0 GB are free"
    ) as error:
        plan_memory(load_preset("fastest"), needs(), limits(40))
    assert "--preset streamed" in error.value.remedy
    with pytest.raises(DeviceMemoryError) as error:
        choose(needs(), limits(8))
    assert "streamed needs 11." in error.value.reason
    assert "8.0 GB are free on cuda:0" in error.value.reason
    assert "fewer frames" in error.value.remedy


def test_the_choice_says_what_did_not_fit():
    reason = choose(needs(), limits(45)).reason
    assert "; preset fastest needs " in reason
    assert reason.endswith("45.0 GB are free on cuda:0")


def test_the_contract_binds_on_larger_devices_too():
    with pytest.raises(DeviceMemoryError, match=r"its contract is 40\.0 GB and 140\.0 GB are free"):
        plan_memory(load_preset("min-memory"), needs(sizes={**SIZES, "transformer": 39 * GB}), limits(140))


def test_the_host_is_checked():
    with pytest.raises(HostMemoryError) as error:
        plan_memory(load_preset("fastest"), needs(host_nbytes=30 * GB), limits(None, host_gb=16))
    assert error.value.reason == "preset fastest needs 30.0 GB of host memory, 16.0 GB are available here"


def test_a_cpu_has_no_contract_but_a_limit():
    plan = choose(needs(), limits(None))
    assert plan.preset.name == "fastest"
    assert "no memory of its own" in plan.reason
    plan = choose(needs(SMALLER), limits(None), device_memory=12 * GB)
    assert plan.preset.name == "streamed"
    # there is no driver to leave room for, and no page to rely upon
    assert plan.streams["transformer"].device_nbytes == 12 * GB - SMALLER["transformer"]
    assert plan.streams["transformer"].n_read == 0


def test_several_processes_share_the_weights():
    plan = choose(needs(), limits(60, world_size=4))
    assert plan.preset.name == "multi-gpu"
    with pytest.raises(DeviceMemoryError):
        choose(needs(), limits(60, world_size=1), offload_model=False)


def test_the_low_noise_expert_gives_way_to_the_vae_where_both_find_no_room():
    fastest, (text, high, _, vae) = load_preset("fastest"), NAMES
    plain = residency_steps(fastest, NAMES)
    *others, decode = plan_memory(fastest, needs(), limits(84)).steps
    assert others == list(plain[:-1])
    assert (decode.uses, decode.resident) == (vae, (text, high, vae))
    assert plan_memory(fastest, needs({**WORK, "vae": 10 * GB}), limits(84)).steps == plain
    assert plan_memory(fastest, needs(), limits(None)).steps == plain
    for name in ("balanced", "min-memory"):
        assert plan_memory(load_preset(name), needs(), limits(84)).steps == residency_steps(load_preset(name), NAMES)


def test_what_is_handed_out_cannot_give_way():
    handed_out = limits(84, may_drop=False)
    with pytest.raises(DeviceMemoryError, match=r"fastest needs 9\d\.\d GB while the VAE runs"):
        plan_memory(load_preset("fastest"), needs(), handed_out)
    assert choose(needs(), handed_out).preset.name == "balanced"


def test_a_text_encoder_on_the_cpu_takes_nothing_on_the_device():
    on_cpu, there = (
        plan_memory(load_preset("balanced").adapted(t5_cpu=flag), needs(), limits(80)) for flag in (True, False)
    )
    assert "text encoder 11.4 GB" not in on_cpu.reason
    assert on_cpu.reason != there.reason
    assert "text_encoder" not in chosen(12, t5_cpu=True).streams
