"""Presets: what the files say, what fits where, and the numbers when it does not. No device is needed."""

import pytest

from wan_loader.errors import DeviceMemoryError, HostMemoryError, OptionError
from wan_pipeline.presets import PRESETS, Limits, check_fit, choose, fitted_steps, load_preset, peak, residency_steps

GB = 10**9
# WAN2.2-T2V-A14B in bf16, the VAE's decoder in fp32
SIZES = {
    "text_encoder": 11_361_820_672,
    "transformer": 28_635_351_168,
    "transformer_2": 28_635_351_168,
    "vae": 294 * 10**6,
}
# 81 frames of 1280*720
WORK = {"text_encoder": GB // 2, "transformer": 10 * GB, "transformer_2": 10 * GB, "vae": 24 * GB}
NAMES = list(SIZES)


def limits(device_gb, host_gb=64, world_size=1):
    nbytes = None if device_gb is None else int(device_gb * GB)
    return Limits(device="cuda:0", device_nbytes=nbytes, host_nbytes=host_gb * GB, world_size=world_size)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_holds_its_own_contract(name):
    preset = load_preset(name)
    nbytes, _ = peak(preset, SIZES, WORK, limits(preset.device_memory_gb))
    assert nbytes <= preset.device_memory_gb * GB
    assert check_fit(preset, SIZES, WORK, 0, limits(preset.device_memory_gb)).startswith(name)


@pytest.mark.parametrize(("free_gb", "name"), [(84, "fastest"), (70, "balanced"), (50, "balanced"), (40, "min-memory")])
def test_auto_takes_the_fastest_that_fits_and_says_why(free_gb, name):
    preset, why = choose(SIZES, WORK, 0, limits(free_gb))
    assert preset.name == name
    assert why.startswith(f"{name}: ")
    assert f"{free_gb}.0 GB" in why or f"{preset.device_memory_gb}.0 GB" in why


def test_what_cannot_fit_is_an_error_with_the_numbers():
    with pytest.raises(
        DeviceMemoryError, match=r"fastest needs 7\d\.\d GB .*text encoder 11\.4 GB .* 40\.0 GB are free"
    ):
        check_fit(load_preset("fastest"), SIZES, WORK, 0, limits(40))
    with pytest.raises(DeviceMemoryError) as error:
        choose(SIZES, WORK, 0, limits(24))
    assert "min-memory needs 38.6 GB" in error.value.reason
    assert "24.0 GB are free on cuda:0" in error.value.reason
    assert "fewer frames" in error.value.remedy


def test_the_choice_says_what_did_not_fit():
    reason = choose(SIZES, WORK, 0, limits(45))[1]
    assert "; preset fastest needs " in reason
    assert reason.endswith("45.0 GB are free on cuda:0")


def test_the_contract_binds_on_larger_devices_too():
    with pytest.raises(DeviceMemoryError, match=r"its contract is 40\.0 GB and 140\.0 GB are free"):
        check_fit(load_preset("min-memory"), {**SIZES, "transformer": 39 * GB}, WORK, 0, limits(140))


def test_the_host_is_checked():
    with pytest.raises(HostMemoryError) as error:
        check_fit(load_preset("fastest"), SIZES, WORK, 30 * GB, limits(None, host_gb=16))
    assert error.value.reason == "preset fastest needs 30.0 GB of host memory, 16.0 GB are available here"


def test_a_cpu_has_no_contract():
    preset, why = choose(SIZES, WORK, 0, limits(None))
    assert preset.name == "fastest"
    assert "no memory of its own" in why


def test_several_processes_share_the_weights():
    preset, _ = choose(SIZES, WORK, 0, limits(60, world_size=4))
    assert preset.name == "multi-gpu"
    work = dict.fromkeys(NAMES, 7 * GB)
    several, one = (peak(preset, SIZES, work, limits(200, world_size=n))[0] for n in (4, 1))
    assert several < one / 2


def test_phases():
    text, high, low, vae = NAMES
    assert [p.resident for p in residency_steps(load_preset("fastest"), NAMES)] == [tuple(NAMES)] * 4
    assert [p.resident for p in residency_steps(load_preset("min-memory"), NAMES)] == [(n,) for n in NAMES]
    assert [p.resident for p in residency_steps(load_preset("balanced"), NAMES)] == [
        (text, high),
        (high, vae),
        (low, vae),
        (vae,),
    ]
    assert [p.resident for p in residency_steps(load_preset("balanced"), [text, high, vae])] == [
        (text, high),
        (high, vae),
        (vae,),
    ]
    for name in PRESETS:
        assert [p.uses for p in residency_steps(load_preset(name), NAMES)] == NAMES
        assert all(p.uses in p.resident for p in residency_steps(load_preset(name), NAMES))


def test_the_low_noise_expert_gives_way_to_the_vae_where_both_find_no_room():
    fastest, (text, high, _, vae) = load_preset("fastest"), NAMES
    plain = residency_steps(fastest, NAMES)
    *others, decode = fitted_steps(fastest, SIZES, WORK, limits(84))
    assert others == list(plain[:-1])
    assert (decode.uses, decode.resident) == (vae, (text, high, vae))
    assert fitted_steps(fastest, SIZES, {**WORK, "vae": 10 * GB}, limits(84)) == plain
    assert fitted_steps(fastest, SIZES, WORK, limits(None)) == plain
    for name in ("balanced", "min-memory"):
        assert fitted_steps(load_preset(name), SIZES, WORK, limits(20)) == residency_steps(load_preset(name), NAMES)


def test_what_is_handed_out_cannot_give_way():
    handed_out = Limits(device="cuda:0", device_nbytes=84 * GB, host_nbytes=64 * GB, may_drop=False)
    with pytest.raises(DeviceMemoryError, match=r"fastest needs 9\d\.\d GB while the VAE runs"):
        check_fit(load_preset("fastest"), SIZES, WORK, 0, handed_out)
    assert choose(SIZES, WORK, 0, handed_out)[0].name == "balanced"


def test_flags_lie_on_top():
    assert load_preset("fastest").adapted(offload_model=True).residency == "next"
    assert load_preset("min-memory").adapted(offload_model=True).residency == "one"
    assert load_preset("min-memory").adapted(offload_model=False).residency == "everything"
    on_cpu = load_preset("balanced").adapted(t5_cpu=True)
    assert on_cpu.text_encoder == "cpu"
    assert peak(on_cpu, SIZES, WORK, limits(80))[0] < peak(load_preset("balanced"), SIZES, WORK, limits(80))[0]
    assert load_preset("balanced").adapted(dtype="fp32").dtype == "fp32"


def test_presets_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('description = "mine"\ndevice_memory_gb = 24\nresidency = "one"\n')
    assert load_preset(str(path)).name == "mine"
    start = 'description = "x"\ndevice_memory_gb = 1\n'
    for text, match in (
        (start + 'residency = "two"', "residency is 'two'"),
        (start + 'colour = "red"', "unknown settings: colour"),
        (start + "residency = ", "is no preset"),
        ('residency = "one"', "is no preset"),
        ('description = "x"\nresidency = "one"\ndevice_memory_gb = 0', "must be positive"),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match=match):
            load_preset(str(path))
    with pytest.raises(OptionError) as error:
        load_preset("slow")
    assert error.value.reason == "no preset is called 'slow'"
    assert error.value.remedy.startswith("use auto, fastest, ")
    with pytest.raises(OptionError) as error:
        load_preset(str(tmp_path / "none.toml"))
    assert error.value.path == str(tmp_path / "none.toml")
    assert error.value.reason == "cannot be read: No such file or directory"
