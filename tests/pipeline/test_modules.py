"""Networks of diffusers and transformers: built empty, filled, and then the same as if they had loaded themselves."""

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

import wan_loader
import wan_pipeline
from wan_pipeline.wan_checkpoint import open_wan

CLASSES = {
    "transformer": (WanTransformer3DModel, "dit"),
    "vae": (AutoencoderKLWan, "vae2.1"),
    "text_encoder": (UMT5EncoderModel, "text_encoder"),
}


def empty(component):
    made, _ = CLASSES[component.name]
    config = dict(component.config)
    with wan_loader.empty_weights():
        return made(made.config_class(**config)) if component.name == "text_encoder" else made(**config)


def output(name, module):
    device, generator = module.device, torch.Generator().manual_seed(0)
    with torch.no_grad():
        if name == "text_encoder":
            return module.eval()(torch.arange(1, 6, device=device)[None])[0]
        if name == "vae":
            return module.decode(torch.randn(1, 16, 1, 4, 4, generator=generator).to(device)).sample
        latents = torch.randn(1, module.config.in_channels, 1, 4, 4, generator=generator).to(device)
        text = torch.randn(1, 3, module.config.text_dim, generator=generator).to(device)
        return module(latents, torch.tensor([500], device=device), text).sample


@pytest.mark.parametrize("name", list(CLASSES))
def test_filled_from_either_layout_it_computes_what_the_library_does(tiny_wan, device, name):
    native, theirs = open_wan(tiny_wan())[name], tiny_wan("diffusers") / name
    expected = CLASSES[name][0].from_pretrained(theirs, torch_dtype=torch.float32).to(device)
    for path, key_map in ((theirs, None), (native.source, wan_pipeline.key_map(CLASSES[name][1]))):
        module = empty(native)
        assert all(p.is_meta for p in module.parameters())
        report = wan_loader.load_into(module, path, device=device, key_map=key_map, dtype="fp32")
        assert not report.warnings
        assert torch.equal(output(name, module), output(name, expected))


@pytest.mark.parametrize("name", list(CLASSES))
def test_native_names_in_the_other_class(tiny_wan, name):
    native = open_wan(tiny_wan())[name]
    with pytest.raises(wan_loader.KeyMismatchError, match=r"wan_pipeline\.key_map") as caught:
        wan_loader.load_into(empty(native), native.source, device="cpu")
    assert str(caught.value).count("\n") < 25
    assert len(caught.value.missing) == len(caught.value.unexpected) > 20


def test_on_meta_altogether_it_is_refused(tiny_wan):
    component = open_wan(tiny_wan("diffusers"))["transformer"]
    with torch.device("meta"):
        module = WanTransformer3DModel(**component.config)
    with pytest.raises(wan_loader.KeyMismatchError, match=r"rope\.freqs_cos \(buffer\)"):
        wan_loader.load_into(module, component.source, device="cpu")
    report = wan_loader.load_into(module, component.source, device="cpu", allow_meta=["rope"])
    assert "rope.freqs_cos, rope.freqs_sin" in report.warnings[0]
