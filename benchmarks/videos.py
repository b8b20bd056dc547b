"""Raw videos side by side: how far they are from one another, and how far that is in yardsticks.

A video here is an npz of `frames` (floats from 0 to 1), final `latents` in the units of the noise they began as, and
`text`, the embeddings of the prompts. `frames` differ in levels of 255. `latents` differ by a distance over that by
which the model moved them from the noise: where it is short, latents are alike whatever the model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: What is within so many times a yardstick is as close as that.
TOLERANCE = 2.0


def compare(path: Path, reference: Path, seed: int = 0) -> dict:
    """Compare a video with another one of the same noise."""
    video, one = np.load(path), np.load(reference)
    difference = np.abs(video["frames"].astype(np.float64) - one["frames"]) * 255
    rms = float(np.sqrt((difference**2).mean()))
    begun = noise(one["latents"].shape, seed)
    moved, apart = distance(one["latents"], begun), distance(video["latents"], one["latents"])
    return {
        "identical": all(np.array_equal(video[name], one[name]) for name in ("frames", "latents", "text")),
        "std_levels": float(video["frames"].std()) * 255,
        "moved_of_noise": distance(video["latents"], begun) / distance(begun),
        "mean_levels": float(difference.mean()),
        "max_levels": float(difference.max()),
        "psnr_db": 20 * float(np.log10(255 / rms)) if rms else None,
        "latents": apart / moved,
        "latents_of_themselves": apart / distance(one["latents"]),
        "text": distance(video["text"], one["text"]) / distance(one["text"]),
    }


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return the noise that the pipeline begins with."""
    import torch

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def distance(a: np.ndarray, b: np.ndarray | float = 0.0) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b))


def judge(video: dict, yardsticks: dict[str, dict]) -> dict[str, dict]:
    """Count how many times each yardstick a video is away, and judge by the tolerance in frames and latents."""
    found = {}
    for name, yardstick in yardsticks.items():
        pairs = {key: (video[key], yardstick[key]) for key in ("mean_levels", "latents")}
        times = {key: apart / unit if unit else None for key, (apart, unit) in pairs.items()}
        found[name] = times | {"within": all(apart <= TOLERANCE * unit for apart, unit in pairs.values())}
    return found


def verdicts(videos: dict[str, dict], controls: Sequence[str]) -> list[str]:
    """Return what the comparison says, and whether it can say anything. controls: videos that really are others."""
    lines = []
    if (one := videos.get("one")) is not None:
        lines.append(
            f"one: standard deviation of the frames {one['std_levels']:.1f} of 255 levels; "
            f"the experts move the latents by {one['moved_of_noise']:.0%} of the noise"
        )
        lines += ["THE COMPARISON SAYS NOTHING: its frames are constant"] if one["std_levels"] < 1 else []
    for name, video in videos.items():
        if video["identical"] and name != video["beside"]:
            lines.append(f"{name}: identical to {video['beside']}, bit for bit")
        elif name in controls:
            lines += [
                f"{name}: {line}" for line in verdict(video, "would be noticed, beyond", "would go UNNOTICED, within")
            ]
        else:
            others = {c: videos[c] for c in controls if c in videos and videos[c]["beside"] == video["beside"]}
            lines += [f"{name}: {line}" for line in verdict(video, "NOT within", "within", others)]
    return lines or ["no video of one process to compare with"]


def verdict(video: dict, beyond: str, within: str, controls: dict[str, dict] | None = None) -> list[str]:
    lines = [
        f"{within if unit['within'] else beyond} {TOLERANCE:g} x the difference of {yardstick}"
        for yardstick, unit in video["yardsticks"].items()
    ]
    if lines and controls and video["latents"]:
        farther = (f"{other['latents'] / video['latents']:.3g} x ({name})" for name, other in controls.items())
        lines.append(f"in latents, videos that are meant to differ are farther: {', '.join(farther)}")
    return lines
