"""Checkpoints of random weights in the exact layout, names, shapes and dtypes of WAN2.2.

The published checkpoints are 126 GB and not always at hand; what a start-up costs depends on their layout, not on
their values. `synth` makes one in either layout, whole ("full") or so small that a pipeline built from it runs on a
CPU within a second ("tiny"). The same seed gives the same weights in both layouts.

    synth("ckpt", layout="diffusers", size="tiny")                       # 4 MB, plain diffusers runs it
    synth("ckpt", size="full", blocks=4, components=["high_noise"])      # 6 GB of one expert
    plan_synth(layout="native", size="full").nbytes                      # 126 GB, nothing written
    synth("comfy", form="fp8-scaled")                                    # a file a network, as ComfyUI has them

It does not make weights that generate anything but noise, and its tokenizer knows a few hundred pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from wan_loader import OptionError
from wan_pipeline.synth.arch import ARCHS, DType, Form, Layout, Size, SynthName, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from wan_pipeline.synth.arch import Arch
    from wan_pipeline.synth.checkpoint_files import SynthPlan

__all__ = ["DType", "Form", "Layout", "Size", "SynthName", "SynthReport", "Task", "plan_synth", "synth"]


@dataclass(frozen=True, slots=True)
class SynthReport:
    """A report of what was written."""

    directory: Path
    files: tuple[Path, ...]
    nbytes: int


def plan_synth(
    *,
    layout: Layout = "native",
    size: Size = "tiny",
    task: Task = "t2v-A14B",
    blocks: int | None = None,
    components: Sequence[SynthName] | None = None,
    dtype: DType | None = None,
    form: Form = "published",
) -> SynthPlan:
    """Plan the files that `synth` would write, with tensors and exact sizes. Takes seconds: it imports diffusers."""
    arch = _arch(layout, size, task, blocks, dtype, form)
    return _plan(arch, layout, components, dtype, form)


def synth(
    directory: str | os.PathLike[str],
    *,
    layout: Layout = "native",
    size: Size = "tiny",
    task: Task = "t2v-A14B",
    blocks: int | None = None,
    components: Sequence[SynthName] | None = None,
    dtype: DType | None = None,
    form: Form = "published",
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SynthReport:
    """Write a checkpoint of random weights.

    Memory: about 100 MB on top of the imports, whatever the size. Files appear under their names only when all are
    complete.

    Args:
        directory: The directory to fill; it is made if it is missing.
        layout: The arrangement of the files, one of the two published ones.
        size: "full" as published, or "tiny".
        task: The model.
        blocks: Keep the first blocks of each expert only.
        components: Write some parts only.
        dtype: The dtype of the experts' files, published as fp32; the text encoder is always bf16, the VAE fp32. In
            other forms, that of the text encoder as well: fp16 if it is not said; the VAE is bf16.
        form: "published"; or ComfyUI's folders with one file a network, the tokenizer in that of the text encoder:
            "comfy" (plain), "fp8-scaled", or "gguf" (the experts as Q8_0).
        seed: The same seed gives the same weights.
        force: Allow a directory that is not empty: files of the same names are replaced, others stay.
        progress: Called with (done, total) bytes in this thread.

    Raises:
        OptionError: The settings make no sense.
        OutputError: The directory is not empty, is too small, or cannot be written.
    """
    from wan_pipeline.synth.fill import Pool
    from wan_pipeline.synth.write import check_target, write_plan

    arch = _arch(layout, size, task, blocks, dtype, form)
    if not 0 <= seed < 1 << 63:
        raise OptionError.because(f"--seed {seed}", "it must be from 0 to 2**63 - 1")
    target = Path(directory)
    plan = _plan(arch, layout, components, dtype, form)
    check_target(target, plan.nbytes, force=force)
    pool = Pool(arch, seed, {tensor.dtype for file in plan.weights for tensor in file.tensors})
    files = write_plan(plan, target, pool.data, progress)
    return SynthReport(target, files, plan.nbytes)


def _arch(layout: Layout, size: Size, task: Task, blocks: int | None, dtype: DType | None, form: Form) -> Arch:
    choices = (("layout", layout, Layout), ("size", size, Size), ("task", task, Task), ("form", form, Form))
    for option, value, choice in (*choices, ("dtype", dtype or "fp32", DType)):
        if value not in get_args(choice):
            raise OptionError.because(f"--{option} {value}", f"it must be one of {', '.join(get_args(choice))}")
    if form != "published" and layout != "native":
        raise OptionError.because(f"--form {form} --layout {layout}", "leave out --layout: ComfyUI has one of its own")
    return ARCHS[task, size].with_blocks(blocks)


def _plan(
    arch: Arch, layout: Layout, components: Sequence[SynthName] | None, dtype: DType | None, form: Form
) -> SynthPlan:
    from wan_pipeline.synth.checkpoint_files import plan_files

    wanted = arch.components if components is None else tuple(components)
    if unknown := sorted({*wanted} - {*arch.components}):
        raise OptionError.because(f"{arch.task} has no {', '.join(unknown)}", f"use {', '.join(arch.components)}")
    if not wanted:
        raise OptionError.because("no component is wanted", f"{arch.task} has {', '.join(arch.components)}")
    dtypes: dict[SynthName, DType] = {"text_encoder": "bf16", "vae": "fp32"}
    if form != "published":
        dtypes = {"text_encoder": dtype or "fp16", "vae": "bf16"}
    dtypes |= dict.fromkeys(arch.experts, dtype or ("fp32" if form == "published" else "fp16"))
    return plan_files(arch, layout, [c for c in arch.components if c in wanted], dtypes, form)
