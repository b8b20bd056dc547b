"""ComfyUI's order of work, a stand-in of it: layers that do not initialise, a dict that is copied, parts that move."""

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from wan_loader.fastpath import Accelerator  # noqa: E402

PREFIX = "model.diffusion_model."
WIDTH = 64


class Linear(torch.nn.Linear):
    def reset_parameters(self):
        return None


class Norm(torch.nn.LayerNorm):
    def reset_parameters(self):
        return None


class Block(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = Norm(WIDTH, **options)
        self.up, self.down = Linear(WIDTH, 4 * WIDTH, **options), Linear(4 * WIDTH, WIDTH, **options)
        self.modulation = torch.nn.Parameter(torch.empty(1, 6, WIDTH, **options))


def make_model(**options):
    return torch.nn.ModuleDict({str(number): Block(**options) for number in range(2)})


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(1)
    model = make_model(dtype=torch.float16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    state = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def start(path, dtype, device):
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        state = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = make_model(dtype=dtype)
    model.load_state_dict(state, strict=False)
    for part in model.modules():
        if isinstance(part, (Linear, Norm)):
            part.to(device)
    return model.to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_the_same(path, dtype, device):
    target = "cpu:0" if device == "cpu" else device
    expected = start(path, dtype, target).state_dict()
    with Accelerator(kinds=(device,), min_nbytes=0, io="buffered"):
        found = start(path, dtype, target).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (type(tensor), tensor.dtype, tensor.device) == (torch.Tensor, dtype, expected[name].device)
        assert torch.equal(tensor, expected[name])
