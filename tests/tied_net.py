"""A small network with one parameter in two places, as programs get it: its tensors are views of a mapped file."""

import safetensors.torch
import torch

WIDTH = 64


class Net(torch.nn.Module):
    """Parameters, floating and integer buffers, and one parameter in two places."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.second = torch.nn.Linear(WIDTH, WIDTH)
        self.tied = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("scale", torch.randn(WIDTH))
        self.register_buffer("counts", torch.arange(WIDTH))

    def forward(self, x):
        return self.tied(torch.relu(self.second(self.first(x) * self.scale)))

    @classmethod
    def mapped(cls, path):
        """Return one whose tensors lie in a file that `save_model` has written."""
        net = cls()
        net.load_state_dict(safetensors.torch.load_file(path), assign=True, strict=False)
        net.tied.weight = net.first.weight
        return net
