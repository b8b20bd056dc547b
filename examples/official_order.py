"""The official program's order of work, by a script that knows nothing of wan-loader.

    wan-loader run examples/official_order.py --ckpt_dir Wan2.2-T2V-A14B-Diffusers

It builds all networks on the CPU first, casts them there, and moves each to the GPU when its turn comes, and back.
Under `wan-loader run` the casts wait, what moves is fetched from its files, and what moves back waits for its file
again. The networks are those of transformers and diffusers, so the checkpoint is in the diffusers layout; the official
program has classes of its own (`benchmarks/official_order.py` measures with such).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel


def main() -> None:
    """Go to the first step of the second expert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2v-A14B", choices=["t2v-A14B"])
    parser.add_argument("--ckpt_dir", type=Path, required=True)
    parser.add_argument("--prompt", default="two cats boxing on a stage")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    begin = time.perf_counter()
    text_encoder = UMT5EncoderModel.from_pretrained(args.ckpt_dir / "text_encoder", dtype=torch.bfloat16).eval()
    vae = AutoencoderKLWan.from_pretrained(args.ckpt_dir / "vae").eval().to(args.device)
    low, high = (
        WanTransformer3DModel.from_pretrained(args.ckpt_dir / name).eval().to(torch.bfloat16)
        for name in ("transformer_2", "transformer")
    )

    text_encoder.to(args.device)
    with torch.no_grad():
        words = torch.tensor([[ord(letter) % 100 for letter in args.prompt]], device=args.device)
        context = text_encoder(words).last_hidden_state
    text_encoder.cpu()

    for expert in (high, low):  # the real program makes its steps here
        expert.to(args.device)
        latents = torch.zeros(1, vae.config.z_dim, 1, 8, 8, dtype=torch.bfloat16, device=args.device)
        with torch.no_grad():
            noise = expert(latents, torch.tensor([500], device=args.device), context).sample
        expert.cpu()
    print(f"{tuple(noise.shape)} after {time.perf_counter() - begin:.2f} s, imports not counted")


if __name__ == "__main__":
    main()
