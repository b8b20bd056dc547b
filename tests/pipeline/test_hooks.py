"""What `attach` does to a pipeline's networks, `detach` takes back, and nothing else."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from wan_pipeline.hooks import attach, detach  # noqa: E402


class Network(nn.Linear):
    device = torch.device("cpu")

    def encode(self, x):
        return ("encoded", x)

    def decode(self, x):
        return ("decoded", x)


class Uses(list):
    """Stands for the residency: what was used."""

    use = list.append


@pytest.fixture
def pipe():
    return SimpleNamespace(text_encoder=Network(2, 2), transformer=Network(2, 2), transformer_2=None, vae=Network(2, 2))


def run(pipe):
    pipe.text_encoder(torch.ones(2))
    pipe.transformer(torch.ones(2))
    return pipe.vae.encode(1), pipe.vae.decode(2)


def test_networks_are_as_before(pipe):
    before = {name: dict(vars(module)) for name, module in vars(pipe).items() if module is not None}
    uses = Uses()
    attach(pipe, uses, torch.device("cpu"))
    assert pipe.transformer._hf_hook.execution_device == torch.device("cpu")
    expected = (("encoded", 1), ("decoded", 2))
    assert run(pipe) == expected
    assert uses == ["text_encoder", "transformer", "vae", "vae"]
    detach(pipe)
    assert run(pipe) == expected
    assert len(uses) == 4
    assert {name: vars(module) for name, module in vars(pipe).items() if module is not None} == before
    detach(pipe)  # nothing is attached any more


def test_what_others_did_stays(pipe):
    uses, seen = Uses(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append("before"))
    pipe.transformer._hf_hook = theirs = object()
    attach(pipe, uses, torch.device("cpu"))
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append("after"))
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append("kwargs"), with_kwargs=True)
    pipe.text_encoder._hf_hook = another = object()
    ours = pipe.vae.decode
    pipe.vae.decode = lambda x: ("wrapped", ours(x))
    detach(pipe)
    assert run(pipe) == (("encoded", 1), ("wrapped", ("decoded", 2)))
    assert seen == ["before", "after", "kwargs"]
    assert uses == []
    assert pipe.transformer._hf_hook is theirs
    assert pipe.text_encoder._hf_hook is another
