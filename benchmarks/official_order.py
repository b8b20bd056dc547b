"""The order of work of the official WAN program, with the same calls on modules of the same shapes, written here.

    python benchmarks/official_order.py CKPT [--device cuda:0] [--switch]

CKPT is a checkpoint in the diffusers layout. The official program reads its text encoder and its VAE from `.pth` files;
`make_files` writes them into CKPT/official, once. Then, one after the other:

    text encoder   built on the CPU in fp32, where each layer initialises its weights, and then the model all of them
                   again; cast to bf16; `load_state_dict(torch.load(...))`, which copies
    VAE            built on meta, `load_state_dict(torch.load(...), assign=True)`, then moved
    experts        `from_pretrained` without a dtype, low noise before high noise; cast to bf16 on the CPU
    first prompt   text encoder to the device, encode, and back; the high-noise expert to the device
    the switch     the high-noise expert back, the low-noise expert to the device
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

__all__ = ["Program", "Sizes", "TextEncoder", "import_all", "make_files", "start"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The shape of a text encoder; as they stand here, umT5-xxl's: 242 tensors, 5.7e9 weights."""

    n_words: int = 256384
    dim: int = 4096
    dim_attention: int = 4096
    dim_ffn: int = 10240
    n_heads: int = 64
    n_layers: int = 24
    n_buckets: int = 32

    @classmethod
    def of(cls, directory):
        """Take them from the config of transformers' own text encoder."""
        config = json.loads((Path(directory) / "config.json").read_text())
        return cls(
            n_words=config["vocab_size"],
            dim=config["d_model"],
            dim_attention=config["d_kv"] * config["num_heads"],
            dim_ffn=config["d_ff"],
            n_heads=config["num_heads"],
            n_layers=config["num_layers"],
            n_buckets=config["relative_attention_num_buckets"],
        )


class Norm(nn.Module):
    """Root mean square, scaled."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class Attention(nn.Module):
    """Without a bias and without a scale, as in T5."""

    def __init__(self, sizes):
        super().__init__()
        self.n_heads = sizes.n_heads
        self.q, self.k, self.v = (nn.Linear(sizes.dim, sizes.dim_attention, bias=False) for _ in range(3))
        self.o = nn.Linear(sizes.dim_attention, sizes.dim, bias=False)

    def forward(self, x, bias):
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Gated."""

    def __init__(self, sizes):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(sizes.dim, sizes.dim_ffn, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(sizes.dim, sizes.dim_ffn, bias=False)
        self.fc2 = nn.Linear(sizes.dim_ffn, sizes.dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    """Each with a table of its own for the distances between words."""

    def __init__(self, sizes):
        super().__init__()
        self.norm1, self.norm2 = Norm(sizes.dim), Norm(sizes.dim)
        self.attn, self.ffn = Attention(sizes), FeedForward(sizes)
        self.pos_embedding = nn.Embedding(sizes.n_buckets, sizes.n_heads)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        distances = (places[None, :] - places[:, None]).clamp(-(self.pos_embedding.num_embeddings // 2))
        bias = self.pos_embedding(distances % self.pos_embedding.num_embeddings).permute(2, 0, 1)[None]
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    """An encoder in the manner of T5, initialised like one."""

    def __init__(self, sizes):
        super().__init__()
        self.token_embedding = nn.Embedding(sizes.n_words, sizes.dim)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(sizes) for _ in range(sizes.n_layers)])
        self.norm = Norm(sizes.dim)
        self.apply(init_weights)

    def forward(self, words):
        x = self.dropout(self.token_embedding(words))
        for block in self.blocks:
            x = block(x)
        return self.dropout(self.norm(x))


def init_weights(module):
    """Initialise a module's weights once more, with deviations that depend on its shape."""
    if isinstance(module, Norm):
        nn.init.ones_(module.weight)
    elif isinstance(module, TextEncoder):
        nn.init.normal_(module.token_embedding.weight, std=1.0)
    elif isinstance(module, FeedForward):
        for layer in (module.gate[0], module.fc1, module.fc2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    elif isinstance(module, Attention):
        nn.init.normal_(module.q.weight, std=(module.q.in_features * module.q.out_features) ** -0.5)
        for layer in (module.k, module.v, module.o):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    elif isinstance(module, Block):
        nn.init.normal_(module.pos_embedding.weight, std=(2 * module.pos_embedding.weight.numel()) ** -0.5)


class Program:
    """Loads all networks when it is made; then `encode` once, and `take` an expert for the steps.

    Args:
        directory: A checkpoint in the diffusers layout, with the files that `make_files` makes.
        device: Where the networks work.
        offload: Whether a network goes back to the CPU when it is done, as it does by default on one GPU.
    """

    def __init__(self, directory, device, *, offload=True):
        self.directory, self.device, self.offload = Path(directory), torch.device(device), offload
        self.text_encoder = load_text_encoder(self.directory)
        self.vae = load_vae(self.directory, self.device)
        self.low, self.high = (load_expert(self.directory / name) for name in ("transformer_2", "transformer"))
        self._at_work = None

    def encode(self, n_words=16):
        self.text_encoder.to(self.device)
        with torch.no_grad():
            encoded = self.text_encoder(torch.arange(n_words, device=self.device)[None])
        if self.offload:
            self.text_encoder.cpu()
        return encoded

    def take(self, expert):
        if self.offload and self._at_work is not None:
            self._at_work.to("cpu")
        expert.to(self.device)
        self._at_work = expert
        return expert

    @property
    def networks(self):
        return {"text_encoder": self.text_encoder, "vae": self.vae, "low": self.low, "high": self.high}


def build_text_encoder(sizes):
    with torch.device("cpu"):
        model = TextEncoder(sizes)
    return model.to(dtype=torch.bfloat16, device=torch.device("cpu"))


def load_text_encoder(directory):
    model = build_text_encoder(Sizes.of(directory / "text_encoder")).eval().requires_grad_(False)
    model.load_state_dict(torch.load(directory / "official" / "text_encoder.pth", map_location="cpu"))
    return model.to(torch.device("cpu"))


def load_vae(directory, device):
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(directory / "vae"))
    model.load_state_dict(torch.load(directory / "official" / "vae.pth", map_location="cpu"), assign=True)
    return model.eval().requires_grad_(False).to(device)


def load_expert(directory):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(directory).eval().requires_grad_(False).to(torch.bfloat16)


def make_files(directory):
    """Write the two `.pth` files, unless they are there: a VAE as in the checkpoint, a text encoder of noise."""
    from safetensors.torch import load_file

    official = Path(directory) / "official"
    official.mkdir(exist_ok=True)
    if not (vae := official / "vae.pth").exists():
        (file,) = (Path(directory) / "vae").glob("*.safetensors")
        torch.save(load_file(file), vae)
    if not (text_encoder := official / "text_encoder.pth").exists():
        with torch.device("meta"):
            model = TextEncoder(Sizes.of(Path(directory) / "text_encoder"))
        noise = {name: torch.empty(tensor.shape, dtype=torch.int16) for name, tensor in model.state_dict().items()}
        for tensor in noise.values():
            tensor.random_(0, 0x3C00)  # from 0 to 0.008 as bf16, and fast to make
        torch.save({name: tensor.view(torch.bfloat16) for name, tensor in noise.items()}, text_encoder)


def import_all():
    """Import what the program needs, so that it is not timed."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401


def start(directory, device, *, offload=True, switch=False):
    """Run the program up to its first step, or to the first one of the second expert; returns the networks."""
    program = Program(directory, device, offload=offload)
    program.encode()
    program.take(program.high)
    if switch:
        program.take(program.low)
    return program.networks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--switch", action="store_true", help="go on to the second expert")
    args = parser.parse_args()
    make_files(args.ckpt)
    import_all()
    torch.zeros(1, device=args.device)
    begin = time.perf_counter()
    start(args.ckpt, args.device, switch=args.switch)
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    print(f"{time.perf_counter() - begin:.2f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
