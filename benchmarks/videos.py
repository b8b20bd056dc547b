"""Raw videos side by side: how far they are from one another, and how far that is in yardsticks.

A video here is an npz of `frames` (floats from 0 to 1), final `latents` in the units of the noise they began as, and
`text`, the embeddings of the prompts. `frames` differ in levels of 255. `latents` differ by a distance over that by
which the model moved them from the noise: where it is short, latents are alike whatever the model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: What is within so many times a yardstick is as close as that.
TOLERANCE = 2.0


def compare(path: Path, reference: Path, seed: int = 0) -> dict:
    """A video beside another one of the same noise."""
    video, one = np.load(path), np.load(reference)
    frames, difference = video["frames"], np.abs(video["frames"].astype(np.float64) - one["frames"]) * 255
    moved, apart = (
        distance(one["latents"], noise(one["latents"].shape, seed)),
        distance(video["latents"], one["latents"]),
    )
    rms = float(np.sqrt((difference**2).mean()))
    return {
        "finite": bool(np.isfinite(frames).all() and np.isfinite(video["latents"]).all()),
        "std_levels": float(frames.std()) * 255,
        "moved_of_noise": moved / distance(noise(one["latents"].shape, seed)),
        "identical": all(np.array_equal(video[name], one[name]) for name in ("frames", "latents", "text")),
        "mean_levels": float(difference.mean()),
        "max_levels": float(difference.max()),
        "psnr_db": 20 * float(np.log10(255 / rms)) if rms else None,
        "latents": apart / moved,
        "latents_of_themselves": apart / distance(one["latents"]),
        "text": distance(video["text"], one["text"]) / distance(one["text"]),
    }


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """What the pipeline begins with."""
    import torch

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def distance(a: np.ndarray, b: np.ndarray | float = 0.0) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b))


def judge(video: dict, yardsticks: dict[str, dict]) -> dict[str, dict]:
    """How many times each yardstick a video is away, and whether that is within the tolerance in frames and latents."""
    found = {}
    for name, yardstick in yardsticks.items():
        pairs = {key: (video[key], yardstick[key]) for key in ("mean_levels", "latents")}
        times = {key: apart / unit if unit else None for key, (apart, unit) in pairs.items()}
        found[name] = times | {
            "within": video["finite"] and all(apart <= TOLERANCE * unit for apart, unit in pairs.values())
        }
    return found


def verdicts(videos: dict[str, dict], judged: Iterable[str], controls: Iterable[str]) -> list[str]:
    """What the comparison says, and whether it can say anything. controls: videos that really are others."""
    if "one" not in videos:
        return ["no video of one process to compare with"]
    one = videos["one"]
    lines = [
        f"one: standard deviation of the frames {one['std_levels']:.1f} of 255 levels; "
        f"the experts move the latents by {one['moved_of_noise']:.0%} of the noise"
    ]
    if not one["finite"] or one["std_levels"] < 1:
        lines.append("THE COMPARISON SAYS NOTHING: its frames are constant or no numbers")
    for name in (name for name in judged if name in videos):
        lines += [f"{name}: {finding}" for finding in findings(videos[name])]
    for name in (name for name in controls if name in videos):
        for yardstick, unit in videos[name]["yardsticks"].items():
            noticed = "would NOT be noticed" if unit["within"] else "would be noticed"
            lines.append(f"a difference like that of {name} {noticed} beside {yardstick}")
    return lines


def findings(video: dict) -> list[str]:
    if not video["finite"]:
        return ["NOT FINITE"]
    if video["identical"]:
        return ["identical to one, bit for bit"]
    return [
        f"{'within' if unit['within'] else 'NOT WITHIN'} {TOLERANCE:g} x the difference of {yardstick}"
        for yardstick, unit in video["yardsticks"].items()
    ] or ["no yardstick to compare with"]
