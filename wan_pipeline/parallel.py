"""One pipeline on several processes, one GPU each: weights divided with FSDP2, attention with Ulysses.

torchrun starts the processes, torch.distributed and diffusers do the dividing; here is what belongs together: which
flags fit each other, the device of each process, which weights it reads, and what happens when one of them fails.

    degrees     the networks that are divided, and by how much: pure, checked before torch is imported
    connect     this process joins the others
    fetch       the weights that it keeps, every byte of the checkpoint read once in all
    divide      a network on meta gets the hooks of FSDP2 and Ulysses

Everything is loaded before the first network runs, so that the exchanges of a load meet no other collective. Only
process 0 has the VAE and decodes; the others wait for it without a time limit, but notice if it fails.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from wan_loader import OptionError, WanLoaderError, load_into
from wan_loader.arguments import check_flag
from wan_loader.cli import printable
from wan_loader.distributed import end_now, join, rows, use_device, world_size
from wan_pipeline.model_family import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from wan_loader import CancelToken, LoadReport, Observer
    from wan_loader.distributed import Joined, Liveness
    from wan_pipeline.wan_checkpoint import Component, WanCheckpoint

__all__ = ["Degrees", "DistributedRun", "connect", "divide", "fetch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """The networks that are divided over the processes, and by how much."""

    dit_fsdp: bool = False
    """Divide the experts' weights."""
    t5_fsdp: bool = False
    """Divide the text encoder's weights."""
    ulysses_size: int = 1
    """The number of processes that attention is divided over."""

    def check(self, world: int, *, t5_cpu: bool = False) -> None:
        """Raise `OptionError` unless the flags fit each other and the number of processes."""
        check_flag(self.dit_fsdp, "dit_fsdp")
        check_flag(self.t5_fsdp, "t5_fsdp")
        if t5_cpu and self.t5_fsdp:
            raise OptionError.because("--t5_cpu and --t5_fsdp contradict each other", "leave one of them out")
        if self.ulysses_size not in (1, world):
            reason = f"--ulysses_size {self.ulysses_size}"
            raise OptionError.because(reason, f"it must be the number of processes, {world}")
        if world == 1 and (self.dit_fsdp or self.t5_fsdp):
            reason = "--dit_fsdp and --t5_fsdp need several processes"
            raise OptionError.because(reason, "start with torchrun --nproc_per_node N")

    def check_model(self, checkpoint: WanCheckpoint, size: tuple[int, int], frame_num: int) -> None:
        """Raise `OptionError` unless attention of this model and a video of this size can be divided."""
        if (n := self.ulysses_size) == 1:
            return
        heads = checkpoint.experts[0].config["num_attention_heads"]
        if heads % n:
            raise OptionError.because(f"--ulysses_size {n}", f"it must divide the {heads} attention heads")
        frames_per, pixels_per = checkpoint.vae_scale
        tokens = ((frame_num - 1) // frames_per + 1) * (size[0] // pixels_per // 2) * (size[1] // pixels_per // 2)
        if tokens % n:
            raise OptionError.because(
                f"--ulysses_size {n} must divide the {tokens} tokens of {frame_num} frames of {size[0]}*{size[1]}",
                "use another size or frame_num, or fewer processes",
            )

    def resolved(self, preset: str, world: int, *, t5_cpu: bool) -> Degrees:
        """Return the degrees with the defaults of a preset: everything is divided where nothing was asked for."""
        if world == 1 or self != Degrees():
            return self
        if preset not in ("auto", "multi-gpu") and not preset.endswith(".toml"):
            raise OptionError.because(
                f"preset {preset} is for one process, and there are {world}",
                "use --preset multi-gpu, or say what to divide with --dit_fsdp, --t5_fsdp, --ulysses_size",
            )
        return replace(self, dit_fsdp=True, t5_fsdp=not t5_cpu, ulysses_size=world)

    def shards(self, name: str) -> bool:
        """Return True if the weights of a network are divided."""
        return self.dit_fsdp if name in EXPERTS else self.t5_fsdp and name == "text_encoder"


@dataclass(slots=True)
class DistributedRun:
    """One process among the others of a distributed run."""

    degrees: Degrees
    joined: Joined
    mesh: DeviceMesh
    # a number for each meeting: in the store of the processes, a name stands for one of them only
    _calls: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))

    @property
    def rank(self) -> int:
        """The number of the process."""
        return self.liveness.rank

    @property
    def device(self) -> torch.device:
        """The device on which the process keeps its weights."""
        return self.joined.device

    @property
    def liveness(self) -> Liveness:
        """The watch over the other processes."""
        return self.joined.liveness

    def keeps(self, name: str) -> bool:
        """Return True if this process needs a network: only the first decodes."""
        return name != "vae" or self.rank == 0

    def loads_together(self, name: str, text_encoder: str) -> bool:
        """Return True if all processes load a network together; one on the CPU is mapped, and its pages are shared."""
        return name != "vae" and not (name == "text_encoder" and text_encoder == "cpu")

    def together(self, what: str, fact: str = "") -> list[str]:
        """Wait for all processes, however long they take.

        Args:
            what: A name for the occasion; all processes must have come to the same one.
            fact: What this process tells the others.

        Returns:
            What each of them said.
        """
        return self.liveness.agree(f"{what} {next(self._calls)}", fact)

    def exit_on_failure(self) -> None:
        """End this process soon after another one has failed, even if it hangs in a collective then."""
        # a collective that waits for a process that is gone cannot be stopped
        self.liveness.on_failure = _end_now

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn connections that break in the body because another process is gone into `DistributedError`."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, WanLoaderError) or not _is_connection(error):
                raise
            raise self.liveness.explained(error) from error

    def close(self, error: BaseException | None = None) -> None:
        """Leave the run, with the others; with an error, they are told, and nobody waits."""
        self.joined.leave(error)


def _is_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    # gloo and NCCL raise plain RuntimeErrors, too: only their words tell
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection"))


def _end_now(problem: str) -> None:
    from wan_loader.cli import say

    say(f"error: {printable(problem)}")
    end_now(1)


def connect(degrees: Degrees, device: str | torch.device) -> DistributedRun:
    """Join the other processes; raises as `join` does.

    Args:
        degrees: The networks that are divided.
        device: The device as it was asked for; each process takes the GPU of its rank.
    """
    from torch.distributed.device_mesh import init_device_mesh

    joined = join(device)
    try:
        return DistributedRun(degrees, joined, init_device_mesh(joined.device.type, (world_size(),)))
    except BaseException as error:
        # the others are told: they would wait for this process
        joined.leave(error)
        raise


def fetch(
    run: DistributedRun,
    component: Component,
    *,
    dtype: torch.dtype | None,
    cancel: CancelToken | None = None,
    observer: Observer | None = None,
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Load what this process keeps of a network's weights, together with the others; else as `modules.fetch`."""
    import torch
    import torch.distributed as dist

    use_device(run.device)
    # `load_into` fills a module: this one is made of nothing but the names in the file
    tree = torch.nn.Module()
    for facts in component.facts.tensors:
        *path, leaf = facts.name.split(".")
        owner = tree
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        empty = _empty_shard(run, facts.shape) if run.degrees.shards(component.name) else _empty(facts.shape)
        owner.register_parameter(leaf, torch.nn.Parameter(empty, requires_grad=False))
    report = load_into(
        tree,
        component.facts,
        device=run.device,
        dtype=dtype,
        keep_fp32=component.kept_parts,
        group=dist.group.WORLD,
        cancel=cancel,
        observer=observer,
    )
    return dict(tree.named_parameters()), report


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.empty(shape, device="meta")


def _empty_shard(run: DistributedRun, shape: tuple[int, ...]) -> torch.Tensor:
    """Make what `fully_shard` makes of a parameter on meta: rows of it as a DTensor."""
    from torch.distributed.tensor import DTensor, Shard

    whole = _empty(shape)
    first, last = rows(shape[0], run.mesh.size(), run.rank)
    shard: torch.Tensor = DTensor.from_local(
        whole[first:last], run.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return shard


def divide(run: DistributedRun, name: str, module: Any) -> None:
    """Give a network on meta the hooks of Ulysses and of FSDP2, block by block."""
    if name in EXPERTS and run.degrees.ulysses_size > 1:
        import diffusers

        config = _of_library(diffusers, "ContextParallelConfig", "diffusers 0.36")
        with _counted_devices(run.device), _quiet_diffusers():
            module.enable_parallelism(config=config(ulysses_degree=run.degrees.ulysses_size))
    if run.degrees.shards(name):
        from torch.distributed import fsdp

        fully_shard = _of_library(fsdp, "fully_shard", "torch 2.6")
        module.requires_grad_(False)
        for block in module.blocks if name in EXPERTS else module.encoder.block:
            fully_shard(block, mesh=run.mesh)
        fully_shard(module, mesh=run.mesh)


def _of_library(module: Any, name: str, since: str) -> Any:
    """Return what a library has in newer versions; `OptionError` where it is too old."""
    if (found := getattr(module, name, None)) is None:
        raise OptionError.because(f"{module.__name__} has no {name}", f"install {since} or later")
    return found


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Leave out the notice that its parallelism is experimental."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _counted_devices(device: torch.device) -> Iterator[None]:
    """Count the CPU as one accelerator on a machine with none: diffusers counts them to find its own."""
    import torch

    if device.type != "cpu" or torch.accelerator.device_count():
        yield
        return
    original = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = original
