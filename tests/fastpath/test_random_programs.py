"""Random programs that load, cast, edit, copy, tie and move weights end with the same state with and without us."""

import copy
import io
import random

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from wan_loader.fastpath import Accelerator  # noqa: E402

AWAY = torch.device("cpu", 0)
N_PROGRAMS = 60


class Net(torch.nn.Module):
    """A few parameters, one of them in two places, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(24, 24)
        self.second = torch.nn.Linear(24, 24)
        self.tied = torch.nn.Linear(24, 24, bias=False)
        self.register_buffer("scale", torch.randn(24))
        self.tie()

    def tie(self):
        self.tied.weight = self.first.weight


NAMES = ["first.weight", "first.bias", "second.weight", "second.bias", "scale"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors.torch.save_model(Net(), str(path))
    return path


class Program:
    """A module and tensors that the program has kept, and the steps that it may take with them."""

    def __init__(self, path, seed):
        self.random = random.Random(seed)
        self.net = Net()
        self.net.load_state_dict(safetensors.torch.load_file(path), assign=True, strict=False)
        self.net.tie()
        self.kept = []

    def run(self):
        steps = [name for name in dir(self) if name.startswith("step_")]
        with torch.no_grad():
            for _ in range(self.random.randrange(2, 16)):
                self.name = self.random.choice(NAMES)
                self.number = self.random.randrange(1, 9)
                getattr(self, self.random.choice(steps))()
        return self.state()

    def state(self):
        """All that can be seen: values, what they are, and who shares memory with whom."""
        tensors = [*self.net.state_dict().values(), *self.net.parameters(), *self.kept]
        addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        return [
            (
                tensor.dtype,
                tensor.device,
                type(tensor),
                tensor.requires_grad,
                addresses.index(address),
                tensor.detach().cpu().contiguous().view(torch.uint8).tolist(),
            )
            for tensor, address in zip(tensors, addresses, strict=True)
        ]

    @property
    def tensor(self):
        owner, _, key = self.name.rpartition(".")
        return getattr(self.net.get_submodule(owner), key)

    def keep(self, tensor):
        self.kept.append(tensor)

    def step_cast(self):
        self.net.to(self.random.choice([torch.bfloat16, torch.float16, torch.float32]))

    def step_bfloat16(self):
        self.net.bfloat16()

    def step_move(self):
        self.net.to(AWAY)

    def step_move_and_cast(self):
        self.net.to(AWAY, torch.bfloat16)

    def step_move_back(self):
        """Copy as well, as a move from a real device does: aliases of what was there stay behind."""
        self.net.to("cpu")._apply(torch.clone)

    def step_round_trip(self):
        self.net.to(AWAY)
        self.step_move_back()

    def step_fill(self):
        self.tensor.fill_(self.number)

    def step_edit_data(self):
        self.tensor.data[0] = self.number

    def step_replace_data(self):
        self.tensor.data = torch.full_like(self.tensor, self.number)

    def step_alias(self):
        self.keep(
            self.random.choice([lambda t: t, lambda t: t.detach(), lambda t: t.data, lambda t: t[...]])(self.tensor)
        )

    def step_state_dict(self):
        self.keep(self.net.state_dict()[self.name])

    def step_converted(self):
        self.keep(self.tensor.to(torch.bfloat16))

    def step_given(self):
        other = torch.empty(0, dtype=self.tensor.dtype, device=self.tensor.device)
        other.data = self.tensor
        self.keep(other)

    def step_edit_kept(self):
        if self.kept:
            self.random.choice(self.kept).add_(self.number)

    def step_copy_kept(self):
        if self.kept and (kept := self.random.choice(self.kept)).shape == self.tensor.shape:
            self.tensor.copy_(kept)

    def step_give_kept(self):
        if self.kept and (kept := self.random.choice(self.kept)).shape == self.tensor.shape:
            self.tensor.data = kept

    def step_copy_net(self):
        self.net = copy.deepcopy(self.net)

    def step_save(self):
        torch.save(self.net.state_dict(), io.BytesIO())

    def step_load(self):
        state = {self.name: self.net.state_dict()[self.name]}
        self.net.load_state_dict(state, strict=False, assign=self.random.random() < 0.5 and self.name != "scale")
        self.net.tie()

    def step_new_parameter(self):
        if self.name != "scale":
            owner, _, key = self.name.rpartition(".")
            parameter = torch.nn.Parameter(self.tensor.detach(), requires_grad=self.random.random() < 0.5)
            setattr(self.net.get_submodule(owner), key, parameter)
            self.net.tie()

    def step_requires_grad(self):
        if self.name != "scale":
            self.tensor.requires_grad_(self.random.random() < 0.5)

    def step_look(self):
        with torch.inference_mode():
            self.tensor.sum()


def test_they_end_the_same(path):
    accelerator, n_plans = Accelerator((str(AWAY),), io="buffered", min_nbytes=0), 0
    for seed in range(N_PROGRAMS):
        expected = Program(path, seed).run()
        with accelerator:
            found = Program(path, seed).run()
        assert found == expected, f"program {seed}"
        n_plans = accelerator.tally.total.n_plans
    assert n_plans > N_PROGRAMS // 5
    assert accelerator.tally.spared["casts on the CPU"] > N_PROGRAMS // 10
    assert accelerator.tally.spared["copies back to the CPU"] > N_PROGRAMS // 10
