"""How a pipeline fits into memory: sizes and limits in, a frozen plan out, before anything is loaded. Pure.

From the sizes of the networks, the working memory of a step and what a preset lets lie on the device together follows
the peak: a preset that cannot fit is an error with the numbers, and `choose` takes the fastest that fits and says why.
Where networks are streamed, as many of their blocks stay on the device as fit; the VAE works by tiles where it must.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from wan_loader import DeviceMemoryError, HostMemoryError
from wan_loader.sizes import format_bytes
from wan_pipeline.families import TITLES
from wan_pipeline.presets import PRESETS, load_preset, residency_steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wan_pipeline.presets import Preset, ResidencyStep

__all__ = ["CONTEXT_BYTES", "HOST_PROCESS_BYTES", "LIBRARY_BYTES", "Blocks", "Limits", "MemoryPlan", "Needs"]
__all__ += ["WORKSPACE_BYTES", "Streaming", "allocator_nbytes", "choose", "plan_memory"]

#: What the driver counts beside the memory that torch's allocator holds: the context, which is there before the first
#: tensor is, ...
CONTEXT_BYTES = 600_000_000
#: ... and what comes with the first calls: kernels of torch, cuBLAS, cuDNN and attention, their handles, and the tables
#: of registered host pages (8 bytes for each page of 4 kB).
LIBRARY_BYTES = 400_000_000
#: Of the allocator's memory, what is neither weights nor work: cuBLAS's workspaces (32 MiB each on sm90), roundings.
WORKSPACE_BYTES = 100_000_000
#: Host memory of the process beside the page cache and the pinned ring: Python, the libraries, the driver's own.
HOST_PROCESS_BYTES = 3_000_000_000
#: Blocks on the device at a time, of those that are streamed: with fewer, copies hide less behind computation.
_BUFFERS = (3, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The repeated blocks of a network, which can be streamed. Amounts are bytes."""

    count: int
    nbytes: int
    """The largest of them, on the device."""
    nbytes_file: int
    """The largest of them, in its files."""
    rest_nbytes: int
    """All else of the network on the device, and what conversions on the way take."""

    def needed(self, n_streamed: int, buffers: int) -> int:
        """Return the bytes on the device if so many blocks are streamed through so many buffers."""
        return self.rest_nbytes + (self.count - n_streamed + min(buffers, n_streamed)) * self.nbytes

    def fewest(self, budget: int, buffers: int) -> int | None:
        """Return how many blocks must be streamed for the network to fit; None if all are too few."""
        fitting = (n for n in range(self.count + 1) if self.needed(n, buffers) <= budget)
        return next(fitting, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How the blocks of one network are streamed."""

    blocks: Blocks
    n_streamed: int
    buffers: int
    device_nbytes: int
    """Bytes that its weights may take on the device."""
    cache_nbytes: int | None
    """Bytes of the page cache that it may rely upon; None where nothing is copied out of that to a device."""

    @property
    def needed_nbytes(self) -> int:
        """The bytes that its weights take on the device."""
        return self.blocks.needed(self.n_streamed, self.buffers)

    @property
    def n_read(self) -> int:
        """The blocks that find no room there either: they are read whenever the network runs."""
        if self.cache_nbytes is None:
            return 0
        return max(0, self.n_streamed - self.cache_nbytes // self.blocks.nbytes_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The memory that a checkpoint needs, in bytes, by network in the order of first use."""

    sizes: Mapping[str, int]
    workspace: Mapping[str, int]
    """For running each."""
    blocks: Mapping[str, Blocks] = field(default_factory=dict)
    """The networks that can be streamed."""
    tiled_workspace: Mapping[str, int] = field(default_factory=dict)
    """For running those that can work by tiles, if they do."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """What those take on the device that are kept there: they do so all the time, whatever runs."""
    host_nbytes: int = 0
    """What a load takes on the host beyond the page cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The memory that the machine allows, in bytes."""

    device: str
    """The device's name, for messages."""
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)
    """The networks' names in messages."""
    device_nbytes: int | None
    """Free bytes on the device, with those that kept networks take; None if it is the CPU, which has no memory of its
    own."""
    held_nbytes: int = 0
    """Bytes that other tensors of this process hold on the device."""
    process_nbytes: int = 0
    """Of a limit of host memory that counts for the weights, too, what the rest of the process takes."""
    host_nbytes: int
    """Bytes that this process may still take on the host."""
    cache_nbytes: int | None = None
    """Bytes of the page cache that may be relied upon; None where nothing is copied out of that to a device."""
    world_size: int = 1
    may_drop: bool = True
    """True if a network can be dropped for another to run; False where the networks are handed out."""

    @property
    def beside_nbytes(self) -> int:
        """What the process holds beside the pipeline: on the device, as the driver counts it, or in host memory."""
        own = CONTEXT_BYTES + LIBRARY_BYTES + WORKSPACE_BYTES
        return self.process_nbytes if self.device_nbytes is None else own + self.held_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a pipeline fits."""

    preset: Preset
    reason: str
    """Why, with the numbers."""
    steps: tuple[ResidencyStep, ...]
    streams: Mapping[str, Streaming] = field(default_factory=dict)
    """The networks that are streamed."""
    tiled: frozenset[str] = frozenset()
    """Those that work by tiles, which changes their results slightly."""


def allocator_nbytes(preset: Preset) -> int | None:
    """Return the bytes that torch's allocator may hold for the process to keep to a preset; None if that is no limit.

    Args:
        preset: The preset, whose number may be of the whole process.
    """
    if not preset.whole_process:
        return None
    return max(0, round(preset.device_memory_gb * 1e9) - CONTEXT_BYTES - LIBRARY_BYTES)


def choose(
    needs: Needs,
    limits: Limits,
    *,
    t5_cpu: bool = False,
    offload_model: bool | None = None,
    dtype: str | None = None,
    device_memory: int | None = None,
) -> MemoryPlan:
    """Return the fastest preset that fits, and why it was taken; raise the error of the smallest if none does.

    Args:
        needs: What the checkpoint needs.
        limits: The memory that the machine allows.
        t5_cpu: As for `Preset.adapted`, and so are the others.
        offload_model: False keeps everything on the device: then nothing is streamed.
        dtype: The experts' dtype.
        device_memory: The limit that was asked for; None leaves the presets theirs, and what is streamed all that is
            free.
    """
    names = ("multi-gpu",) if limits.world_size > 1 else PRESETS[:3] if offload_model is False else PRESETS[:4]
    too_large: list[str] = []
    for name in names:
        limit = device_memory
        if name == "streamed" and limit is None and limits.device_nbytes is not None:
            # no number binds: what is free does
            limit = limits.device_nbytes + limits.beside_nbytes
        preset = load_preset(name).adapted(t5_cpu=t5_cpu, offload_model=offload_model, dtype=dtype, device_memory=limit)
        try:
            plan = plan_memory(preset, needs, limits)
        except DeviceMemoryError as error:
            if name == names[-1]:
                raise
            too_large.append(str(error.reason))
        else:
            return replace(plan, reason="; ".join([plan.reason, *too_large]))
    raise AssertionError("unreachable: the last preset fits or raises")


def plan_memory(preset: Preset, needs: Needs, limits: Limits) -> MemoryPlan:
    """Return how a preset fits, and why in one sentence.

    Args:
        preset: The preset.
        needs: What the checkpoint needs.
        limits: The memory that the machine allows.

    Raises:
        DeviceMemoryError: It does not fit on the device; the message has the numbers, and the smallest limit that would
            do.
        HostMemoryError: It does not fit into host memory.
    """
    if needs.host_nbytes > limits.host_nbytes:
        have = _gb(limits.host_nbytes)
        reason = f"preset {preset.name} needs {_gb(needs.host_nbytes)} of host memory, {have} are available here"
        raise HostMemoryError.because(reason, "allow more memory")
    allowed = _allowed(preset, limits)
    if allowed is None:
        why = f"{preset.name}: {limits.device} has no memory of its own, weights are mapped where they need no cast"
        return MemoryPlan(preset=preset, reason=why, steps=residency_steps(preset, list(needs.sizes)))
    plan = _place(preset, needs, limits, allowed)
    needed, where = _peak(plan, needs, limits)
    if needed > allowed:
        raise _too_little(plan, needs, limits, allowed)
    said = [f"{preset.name}: {where}, {_gb(allowed)} allowed on {limits.device}{_beside(preset, limits, allowed)}"]
    return replace(plan, reason="; ".join([*said, *_costs(plan, limits)]))


def _allowed(preset: Preset, limits: Limits) -> int | None:
    """Return the bytes that weights and work may take on the device; None if that has no memory of its own."""
    number = round(preset.device_memory_gb * 1e9)
    if limits.device_nbytes is None:
        return number - limits.beside_nbytes if preset.whole_process else None
    if not preset.whole_process:
        return min(number, limits.device_nbytes)
    # of what is free now, the libraries will take their part
    return min(number - limits.beside_nbytes, limits.device_nbytes - LIBRARY_BYTES - WORKSPACE_BYTES)


def _place(preset: Preset, needs: Needs, limits: Limits, allowed: int) -> MemoryPlan:
    """Say which networks are streamed or work by tiles, and the steps that there are then."""
    streams: dict[str, Streaming] = {}
    tiled: set[str] = set()
    for name, nbytes in needs.sizes.items() if preset.residency == "streamed" else ():
        work = needs.workspace.get(name, 0)
        if nbytes + work <= allowed or not _on_device(preset, name):
            continue
        blocks = needs.blocks.get(name)
        # of a small network, buffers and what conversions take may be more than all of it
        if blocks is not None and blocks.needed(blocks.count, _BUFFERS[-1]) < nbytes:
            streams[name] = _stream(blocks, allowed - work, limits.cache_nbytes)
        elif needs.tiled_workspace.get(name, work) < work:
            tiled.add(name)
    plan = MemoryPlan(preset=preset, reason="", steps=(), streams=streams, tiled=frozenset(tiled))
    return replace(plan, steps=_fitted_steps(plan, needs, limits, allowed))


def _stream(blocks: Blocks, budget: int, cache_nbytes: int | None) -> Streaming:
    """Stream as few blocks as fit a budget; all of them, through one buffer, if nothing does."""
    for buffers in _BUFFERS:
        if (n_streamed := blocks.fewest(budget, buffers)) is not None:
            break
    else:
        n_streamed, buffers, budget = blocks.count, _BUFFERS[-1], blocks.needed(blocks.count, _BUFFERS[-1])
    return Streaming(
        blocks=blocks, n_streamed=n_streamed, buffers=buffers, device_nbytes=budget, cache_nbytes=cache_nbytes
    )


def _fitted_steps(plan: MemoryPlan, needs: Needs, limits: Limits, allowed: int) -> tuple[ResidencyStep, ...]:
    """List the steps: where all networks stay, and the VAE's work finds no room beside them, one gives way.

    It is the one that another generation would need last, the low-noise expert: it is fetched again behind the others.
    """
    names = list(needs.sizes)
    *others, decode = residency_steps(plan.preset, names)
    may_drop = plan.preset.residency == "everything" and limits.may_drop
    if may_drop and _needed(plan, decode, needs, limits)[0] > allowed:
        # the last but one of the order of first use: the VAE is the last
        decode = replace(decode, resident=tuple(n for n in decode.resident if n != names[-2]))
    return (*others, decode)


def _on_device(preset: Preset, name: str) -> bool:
    return not (name == "text_encoder" and preset.text_encoder == "cpu")


def _needed(plan: MemoryPlan, step: ResidencyStep, needs: Needs, limits: Limits) -> tuple[int, str]:
    """Return the bytes on the device in a step, and a sentence that adds them up."""
    share = limits.world_size if plan.preset.sharded else 1
    held = {
        # only the weights of experts and text encoder are divided
        name: _weights(plan, name, needs) // (1 if name == "vae" else share)
        for name in needs.sizes
        if name in needs.kept or (name in step.resident and _on_device(plan.preset, name))
    }
    work = (needs.tiled_workspace if step.uses in plan.tiled else needs.workspace).get(step.uses, 0)
    total = sum(held.values()) + work
    said = (f"{'kept ' if name in needs.kept else ''}{limits.titles[name]} {_gb(n)}" for name, n in held.items())
    parts = [*said, f"{_gb(work)} to work in"]
    return total, f"{_gb(total)} while the {limits.titles[step.uses]} runs ({' + '.join(parts)})"


def _weights(plan: MemoryPlan, name: str, needs: Needs) -> int:
    if name in plan.streams:
        return plan.streams[name].needed_nbytes
    return needs.kept.get(name, needs.sizes[name])


def _peak(plan: MemoryPlan, needs: Needs, limits: Limits) -> tuple[int, str]:
    """Return the bytes on the device in the step that needs most, and a sentence that adds them up."""
    return max(_needed(plan, step, needs, limits) for step in plan.steps)


def _too_little(plan: MemoryPlan, needs: Needs, limits: Limits, allowed: int) -> DeviceMemoryError:
    """Return the error of a plan that does not fit, with the smallest limit that would do."""
    preset = plan.preset
    least = _peak(_place(preset, needs, limits, 0), needs, limits)[0] + limits.beside_nbytes
    contract = f"its contract is {_gb(allowed)}"
    if preset.whole_process:
        contract = f"{_gb(allowed)} are allowed{_beside(preset, limits, allowed)}"
    free = None if limits.device_nbytes is None else f"{_gb(limits.device_nbytes)} are free on {limits.device}"
    what = " and ".join(filter(None, (None if allowed == limits.device_nbytes else contract, free)))
    remedy = "use a smaller size, or fewer frames"
    if preset.residency != "streamed":
        remedy = "use a smaller preset (--preset streamed), a smaller size, or fewer frames"
    if preset.whole_process and _limit_binds(preset, limits, allowed):
        remedy = f"allow {_enough(least)} or more, or {remedy}"
    if needs.kept:
        remedy = f"drop what is kept (`wan-loader standby keep drop`), or {remedy}"
    return DeviceMemoryError.because(f"preset {preset.name} needs {_peak(plan, needs, limits)[1]}; {what}", remedy)


def _limit_binds(preset: Preset, limits: Limits, allowed: int) -> bool:
    """Return whether the number of a preset is what keeps it from more, and not what is free."""
    return allowed == round(preset.device_memory_gb * 1e9) - limits.beside_nbytes


def _beside(preset: Preset, limits: Limits, allowed: int) -> str:
    """Say what is left to others, of the limit or of what is free."""
    if not preset.whole_process or not limits.beside_nbytes:
        return ""
    whole, others = round(preset.device_memory_gb * 1e9), "libraries and loads"
    if limits.device_nbytes is not None:
        others = "the driver and its libraries"
        whole = whole if _limit_binds(preset, limits, allowed) else limits.device_nbytes
    return f" of {_gb(whole)}, as {_gb(whole - allowed)} are left to {others}"


def _costs(plan: MemoryPlan, limits: Limits) -> list[str]:
    """Say what the limits cost: blocks that come each time, those that are read each time, tiles."""
    said = [
        f"{one.n_streamed} of {one.blocks.count} blocks of the {titles} are streamed"
        for one, titles in _alike(plan.streams, limits)
    ]
    for one, titles in _alike(plan.streams, limits):
        if one.n_read:
            nbytes = _gb(one.n_read * one.blocks.nbytes_file)
            said.append(
                f"{one.n_read} of {one.blocks.count} blocks of the {titles} are read from the disk whenever it runs: "
                f"{nbytes}, and a step with guidance runs an expert twice"
            )
    said += [f"the {limits.titles[name]} works by tiles, which changes its pictures slightly" for name in plan.tiled]
    return said


def _alike(streams: Mapping[str, Streaming], limits: Limits) -> Sequence[tuple[Streaming, str]]:
    """Put networks together that are streamed alike, with their names."""
    names: dict[Streaming, list[str]] = {}
    for name, one in streams.items():
        names.setdefault(one, []).append(limits.titles[name])
    return [(one, " and of the ".join(titles)) for one, titles in names.items()]


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 999_500_000 else format_bytes(nbytes)


def _enough(nbytes: int) -> str:
    """Write a size as a limit that is no smaller."""
    if nbytes < 1_000_000_000:
        return f"{nbytes}B"
    return f"{math.ceil(nbytes / 1e8) / 10:.1f}GB"
