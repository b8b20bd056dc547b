"""One process of parallel_pipeline.py: loads the pipeline, makes videos, leaves what it cost beside the raw frames.

Started with one argument, a JSON object: ckpt, device, start (arguments of `WanT2V.from_checkpoint`), size, frame_num,
steps, videos (names), and result, which begins the names of what is written: RESULT.RANK.json, and RESULT.VIDEO.npz of
process 0.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import traceback
from pathlib import Path

from pipeline_start import sync

# the made-up tokenizer knows few words: long prompts fill the text that the experts see
PROMPT = """Two cats in boxing gloves stand on a small stage under a row of warm lamps. The left one is grey and heavy,
the right one is red and quick on its feet. They circle each other, jab, duck and roll, while a crowd of mice on wooden
benches cheers and throws paper flowers. The camera moves slowly around the ring, low above the floor, and dust glows
in the light of the lamps."""
OTHER_PROMPT = """A steam train crosses a long stone bridge in deep snow. Far below, a river runs black between white
banks and bare birches. Morning fog lifts from the valley, the first sun turns the smoke of the engine to gold. Inside
the last coach a child wipes the window with a sleeve and waves to a fox, which sits still on a rock until the train
has gone."""


def main() -> None:
    """Make the videos. Ends at once with an error: what is left may hang in a collective."""
    from wan_loader.cli.torchrun import fail_together
    from wan_loader.distributed.processes import end_now
    from wan_loader.errors import WanLoaderError

    spec = json.loads(sys.argv[1])
    try:
        found = make_videos(spec)
        Path(f"{spec['result']}.{found['rank']}.json").write_text(json.dumps(found))
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, WanLoaderError):
            fail_together(error)
        end_now(1)


def make_videos(spec: dict) -> dict:
    from wan_pipeline import WanT2V

    video = {"size": tuple(spec["size"]), "frame_num": spec["frame_num"]}
    with WanT2V.from_checkpoint(spec["ckpt"], device=spec["device"], **video, **spec["start"]) as pipe:
        if pipe.run is not None:
            pipe.run.exit_on_failure()
        calls = count_calls(pipe.pipe, "transformer", "transformer_2")
        videos = {name: make_video(pipe, name, video, spec) for name in spec["videos"]}
        report = pipe.report()
        rank = 0 if pipe.run is None else pipe.run.rank
    if not all(calls.values()):
        raise AssertionError(f"an expert has not run: {calls}")
    loads = report["pipeline"]["loads"]
    return {
        "rank": rank,
        "preset": report["settings"]["preset"],
        "loading_s": sum(x["seconds"] for x in loads),
        "nbytes_read": sum(x["nbytes_read"] for x in loads),
        "nbytes_kept": sum(x["nbytes_device"] for x in loads),
        "device_peak_bytes": report["memory"]["device_peak_bytes"],
        "loads": loads,
        "calls": calls,
        "videos": videos,
    }


def count_calls(pipe, *names: str) -> dict[str, int]:
    """Count how often each network has run, from now on."""
    calls = dict.fromkeys(names, 0)

    def counting(name: str):
        def hook(module, args) -> None:
            calls[name] += 1

        return hook

    for name in names:
        getattr(pipe, name).register_forward_pre_hook(counting(name))
    return calls


def make_video(pipe, name: str, settings: dict, spec: dict) -> dict:
    """Make one video; steps are timed with the device synchronised after each."""
    import numpy as np

    before, kind = pipe.report()["pipeline"], name.removeprefix("fp32 ")
    precise, prompt = spec["start"].get("dtype") == "fp32", OTHER_PROMPT if kind == "other prompt" else PROMPT
    with (
        other_attention(spec["device"], precise) if kind == "other attention" else contextlib.nullcontext(),
        exchanged(pipe.pipe.transformer.blocks) if kind == "exchanged blocks" else contextlib.nullcontext(),
        kept(pipe.pipe, "encode_prompt", lambda args, embeds: [e.float().cpu().numpy() for e in embeds]) as text,
        kept(pipe.pipe.vae, "decode", lambda args, frames: unscaled(args[0], pipe.pipe.vae.config)) as latents,
    ):
        made = pipe(prompt, steps=spec["steps"], progress=lambda phase, done, total: sync(spec["device"]), **settings)
    if latents:  # process 0 alone decodes
        if not np.isfinite(made.frames_THWC).all() or not np.isfinite(latents[0]).all():
            raise AssertionError(f"{name}: frames or latents are no numbers")
        np.savez(f"{spec['result']}.{name}.npz", frames=made.frames_THWC, latents=latents[0], text=text[0])
    after = pipe.report()["pipeline"]
    stages = {x["name"]: x["seconds"] for x in after["stages"][len(before["stages"]) :]}
    steps = after["steps_s"][len(before["steps_s"]) :]
    return {
        "denoise_s": stages["denoise"],
        "later_steps_s": [b - a for a, b in itertools.pairwise(steps)],
        "decode_s": stages.get("decode"),
    }


@contextlib.contextmanager
def kept(owner, name: str, what):
    """List what a method is called with and returns, as `what` makes of it."""
    method, found = getattr(owner, name), []

    def keeping(*args, **options):
        result = method(*args, **options)
        found.append(what(args, result))
        return result

    setattr(owner, name, keeping)
    yield found
    setattr(owner, name, method)


def unscaled(latents, config):
    """Return what the VAE is given, in the units of the noise."""
    import torch

    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents) for values in (config.latents_mean, config.latents_std)
    )
    return ((latents - mean) / std).cpu().numpy()


def other_attention(device: str, precise: bool):
    """Choose a kernel that the device does not itself take for the experts; a GPU has the efficient one in fp32."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    efficient = device == "cuda" and not precise
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if efficient else SDPBackend.MATH)


@contextlib.contextmanager
def exchanged(blocks):
    """Put the first block in the place of the last, and the last in that of the first."""
    blocks[0], blocks[-1] = blocks[-1], blocks[0]
    yield
    blocks[0], blocks[-1] = blocks[-1], blocks[0]


if __name__ == "__main__":
    main()
