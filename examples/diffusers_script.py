"""A script with diffusers that starts fast: the `with` line is new, and all else is what it was.

    python examples/diffusers_script.py Wan2.2-T2V-A14B-Diffusers --prompt "two cats boxing on a stage"

The directory, or repository in the hub's cache, is in the diffusers layout (`wan-loader synth DIR --layout diffusers`).
"""

from __future__ import annotations

import argparse

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import wan_loader


def main() -> None:
    """Load, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="video.mp4")
    args = parser.parse_args()

    with wan_loader.accelerate() as fast:
        pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(args.device)
    print(fast.tally.summary())

    video = pipe(
        args.prompt, width=args.width, height=args.height, num_frames=args.frames, num_inference_steps=args.steps
    )
    export_to_video(video.frames[0], args.output, fps=16)
    print(args.output)


if __name__ == "__main__":
    main()
