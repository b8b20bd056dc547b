"""Errors about names: what they say fits on a screen, and what they advise works."""

import re

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import wan_loader  # noqa: E402


def layers(count, wrap=""):
    """Layers that differ in size, under a name or not."""
    with wan_loader.empty_weights():
        module = nn.Sequential(*(nn.Linear(2, 2 + i % 3) for i in range(count)))
    return nn.ModuleDict({wrap: module}) if wrap else module


def file(tmp_path, module, rename, **others):
    state = {rename(name): torch.rand(tensor.shape) for name, tensor in module.state_dict().items()}
    torch.save(state | others, tmp_path / "x.pth")
    return tmp_path / "x.pth", state


def error_of(module, path, **options):
    with pytest.raises(wan_loader.KeyMismatchError) as caught:
        wan_loader.load_into(module, path, device="cpu", **options)
    text = str(caught.value)
    assert text.count("\n") < 25
    assert len(text) < 4000
    return caught.value, text


@pytest.mark.parametrize(
    ("wrap", "rename", "others"),
    [
        ("", lambda name: f"model.diffusion_model.{name}", {}),
        ("", lambda name: f"model.diffusion_model.{name}", {f"vae.{i}.weight": torch.ones(3) for i in range(40)}),
        ("net", lambda name: name.removeprefix("net."), {}),
        ("net", lambda name: f"module._orig_mod.{name.removeprefix('net.')}", {}),
        ("net", lambda name: f"net.inner.{name.removeprefix('net.')}", {"ema": torch.ones(1)}),
    ],
)
def test_a_prefix_is_recognised_and_the_advice_loads(tmp_path, wrap, rename, others):
    module = layers(150, wrap)
    path, state = file(tmp_path, module, rename, **others)
    error, text = error_of(module, path)
    assert "prefix" in text
    assert sorted(error.missing) == sorted(module.state_dict())
    assert sorted(error.unexpected) == sorted([*state, *others])
    key_map = eval(re.search(r"key_map=(lambda .*)", text)[1])
    wan_loader.load_into(module, path, device="cpu", key_map=key_map)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[rename(name)])


def test_other_names_of_the_same_shapes(tmp_path):
    module = layers(30)
    path, _ = file(tmp_path, module, lambda name: "blocks_" + name.replace(".weight", "_w").replace(".bias", "_b"))
    _, text = error_of(module, path)
    assert "prefix" not in text
    assert "another library's names for the same model" in text
    assert "key_map=" in text


def test_another_model(tmp_path):
    path, _ = file(tmp_path, nn.Linear(7, 3), lambda name: f"fc.{name}")
    error, text = error_of(layers(30), path)
    assert "prefix" not in text
    assert "these are another" not in text
    assert error.unexpected == ("fc.weight", "fc.bias")
    assert "60 missing" in text


def test_shapes_of_all_are_in_the_fields(tmp_path):
    module = layers(30)
    wider = nn.Sequential(*(nn.Linear(3, 2 + i % 3) for i in range(30)))
    path, _ = file(tmp_path, wider, str)
    error, text = error_of(module, path, strict=False)
    assert len(error.misshaped) == 30
    assert error.misshaped["1.weight"] == ((3, 3), (3, 2))
    assert (error.missing, error.unexpected) == ((), ())
    assert "30 of another shape" in text
    assert "these are another" not in text
    assert "0.weight: [2, 3] in the file, [2, 2] in the module" in text


def test_names_of_any_length_and_kind(tmp_path):
    others = {"a\nb" * 50_000 + str(i): torch.ones(1) for i in range(9)}
    path, _ = file(tmp_path, layers(1), str, **others)
    error, text = error_of(layers(1), path)
    assert set(error.unexpected) == set(others)
    assert "a\\nb" in text


def test_names_that_a_key_map_made(tmp_path):
    path, _ = file(tmp_path, layers(2), str)
    error, text = error_of(layers(2), path, key_map=lambda name: f"model.{name}")
    assert error.unexpected == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert "0.weight (as model.0.weight)" in text
    assert "prefix" not in text


def test_names_asked_for(tmp_path):
    path, _ = file(tmp_path, layers(2), str)
    wanted = [f"{i}.weight" for i in range(2000)]
    with pytest.raises(wan_loader.KeyMismatchError) as caught:
        wan_loader.load_file(path, names=wanted)
    assert caught.value.missing == tuple(wanted[2:])
    assert len(str(caught.value)) < 1000
    assert "and 1978 more" in str(caught.value)
