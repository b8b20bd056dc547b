"""Presets: what the files say, and the steps that they mean. No device is needed."""

import pytest

from wan_loader.errors import OptionError
from wan_pipeline.presets import PRESETS, load_preset, residency_steps

NAMES = ["text_encoder", "transformer", "transformer_2", "vae"]


def test_phases():
    text, high, low, vae = NAMES
    assert [p.resident for p in residency_steps(load_preset("fastest"), NAMES)] == [tuple(NAMES)] * 4
    for name in ("min-memory", "streamed"):
        assert [p.resident for p in residency_steps(load_preset(name), NAMES)] == [(n,) for n in NAMES]
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


def test_flags_lie_on_top():
    assert load_preset("fastest").adapted(offload_model=True).residency == "next"
    for name, kept in (("min-memory", "one"), ("streamed", "streamed")):
        assert load_preset(name).adapted(offload_model=True).residency == kept
        assert load_preset(name).adapted(offload_model=False).residency == "everything"
    assert load_preset("balanced").adapted(t5_cpu=True).text_encoder == "cpu"
    assert load_preset("balanced").adapted(dtype="fp32").dtype == "fp32"
    limited = load_preset("balanced").adapted(device_memory=12_345_678_901)
    assert (round(limited.device_memory_gb * 1e9), limited.whole_process) == (12_345_678_901, True)
    assert not load_preset("balanced").whole_process


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
