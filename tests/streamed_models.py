"""A small model of repeated blocks, and its checkpoint, for tests of streaming."""

import torch
from safetensors.torch import save_file
from torch import nn

import wan_loader


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.randn(1, width))
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x, *, by):
        return x + self.down(torch.relu(self.up(self.norm(x) * self.scale + by))) * self.shift


class Model(nn.Module):
    def __init__(self, n_blocks=7, width=32):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(n_blocks))
        self.last = nn.Linear(width, width)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, by=x.mean())
        return self.last(x)


def save_model(directory, n_blocks=7, dtype=None):
    """Write the checkpoint of a model whose weights are random; return its path."""
    torch.manual_seed(n_blocks)
    path = directory / "model.safetensors"
    state = Model(n_blocks).state_dict()
    save_file({name: tensor if dtype is None else tensor.to(dtype) for name, tensor in state.items()}, path)
    return path


def empty_model(n_blocks=7):
    with wan_loader.empty_weights():
        return Model(n_blocks)


def resident_model(path, n_blocks=7, device="cpu", dtype=None):
    model = empty_model(n_blocks)
    wan_loader.load_into(model, path, device=device, dtype=dtype)
    return model


def inputs(device="cpu", dtype=torch.float32):
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)
