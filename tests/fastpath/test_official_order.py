"""The official program's order of work, plain and with the fast path: the same weights, objects and random numbers."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from loader_cases import bits  # noqa: E402
from programs import ROOT  # noqa: E402

from wan_loader.fastpath import Accelerator  # noqa: E402
from wan_loader.fastpath.deferral.deferred import is_deferred, settle_all  # noqa: E402

INITIALISATIONS = "initialisations on the CPU"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("diffusers", minversion="0.36", reason="wan_pipeline asks for a newer diffusers")
    from wan_pipeline.synth import synth

    return synth(tmp_path_factory.mktemp("wan") / "tiny", layout="diffusers", task="t2v-A14B").directory


@pytest.fixture
def official(monkeypatch, checkpoint):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import official_order

    official_order.make_files(checkpoint)
    return official_order


@pytest.fixture
def accelerator(device):
    return Accelerator(kinds=(f"{device}:0",), io="buffered", min_nbytes=0)


def run(official, checkpoint, device, *, steps):
    """Return the program, the encoded prompt, and what torch draws next."""
    torch.manual_seed(7)
    program = official.Program(checkpoint, device)
    encoded = program.encode()
    if steps:
        program.take(program.high)
        program.take(program.low)
    return program, encoded, torch.rand(3)


def parameters(program):
    return {f"{n}.{k}": p for n, network in program.networks.items() for k, p in network.named_parameters()}


def test_the_whole_program(official, checkpoint, device, accelerator):
    device = f"{device}:0"
    plain, encoded, drawn = run(official, checkpoint, device, steps=True)
    with accelerator:
        program, *found = run(official, checkpoint, device, steps=True)
        left = dict(accelerator.tally.left)  # what waits is settled afterwards
    assert torch.equal(found[0], encoded)
    assert torch.equal(found[1], drawn)
    expected = parameters(plain)
    for name, parameter in parameters(program).items():
        assert type(parameter) is type(expected[name]), name
        assert (parameter.dtype, parameter.device) == (expected[name].dtype, expected[name].device)
        assert parameter.requires_grad == expected[name].requires_grad
        assert torch.equal(bits(parameter), bits(expected[name]))
    tally = accelerator.tally
    text_encoder = list(plain.text_encoder.parameters())
    assert tally.spared[INITIALISATIONS] == sum(2 * (p.numel() >= 624) for p in text_encoder if p.dim() == 2)
    assert tally.spared["copies by load_state_dict"] == len(text_encoder)
    assert tally.spared["copies of files into memory"] == 2
    assert {name: served.n_plans for name, served in tally.components.items()} == {
        "TextEncoder": 1,
        "AutoencoderKLWan": 1,
        "WanTransformer3DModel": 2,
    }
    assert tally.components["TextEncoder"].nbytes == sum(p.nbytes for p in text_encoder)
    came_back = [*text_encoder, *plain.high.parameters()]
    assert tally.spared["copies back to the CPU"] == len(came_back)
    assert tally.spared_nbytes["copies back to the CPU"] == sum(p.nbytes for p in came_back)
    assert not any("on the CPU" in reason for reason in left), "neither a cast nor an initialisation"


def test_a_dict_of_before_sees_what_is_loaded(official, checkpoint, accelerator):
    """It has the memory that is loaded into."""
    file = torch.load(checkpoint / "official" / "text_encoder.pth")
    with accelerator:
        model = official.build_text_encoder(official.Sizes.of(checkpoint / "text_encoder"))
        before = model.state_dict()
        model.load_state_dict(torch.load(checkpoint / "official" / "text_encoder.pth", map_location="cpu"))
    assert before.keys() == file.keys()
    for name, tensor in before.items():
        assert torch.equal(bits(tensor), bits(file[name])), name
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr()
    assert accelerator.tally.spared["copies by load_state_dict"] == 0


def test_a_text_encoder_that_is_never_loaded(official, checkpoint, accelerator):
    """Its values are what they would have been, once somebody looks."""
    sizes = official.Sizes.of(checkpoint / "text_encoder")
    torch.manual_seed(7)
    expected = dict(official.build_text_encoder(sizes).named_parameters()) | {"next": torch.rand(3)}
    torch.manual_seed(7)
    with accelerator:
        model = official.build_text_encoder(sizes)
        found = dict(model.named_parameters()) | {"next": torch.rand(3)}
        assert any(map(is_deferred, found.values()))
    for name, tensor in found.items():
        assert torch.equal(bits(tensor), bits(expected[name])), name
    settle_all()
    assert {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}
