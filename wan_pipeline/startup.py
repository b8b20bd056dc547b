"""The start: everything that happens from the directory to the first denoising step, in its order.

    headers read and checked      milliseconds, no torch
    files read ahead              in the background, while torch, transformers and diffusers are imported
    preset chosen                 from sizes and limits; one that cannot fit ends here
    networks built on meta        each is fetched as soon as it is built and its turn comes

The result is a plain `diffusers.WanPipeline` whose networks `ModuleResidency` makes ready when they are about
to run.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from wan_loader import OptionError, Recorder, prewarm_files, span, start_device
from wan_loader.distributed import local_rank, use_device, warms, world_size
from wan_pipeline import modules, parallel, presets
from wan_pipeline.device_limit import DeviceLimit
from wan_pipeline.fitting import make_memory_plan, network_dtype
from wan_pipeline.hooks import attach
from wan_pipeline.memory_plan import allocator_nbytes
from wan_pipeline.prompt_tokenizer import load_tokenizer
from wan_pipeline.residency import BackgroundFetch, ModuleResidency, Placement
from wan_pipeline.short_imports import short_imports
from wan_pipeline.wan_checkpoint import open_wan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from wan_loader import CancelToken, Prewarm, StrPath
    from wan_pipeline.lean.import_times import Import
    from wan_pipeline.memory_plan import MemoryPlan
    from wan_pipeline.pipeline_cache import PipelineCache
    from wan_pipeline.presets import Preset
    from wan_pipeline.start_options import StartOptions
    from wan_pipeline.wan_checkpoint import WanCheckpoint

__all__ = ["Started", "begin"]

#: Readers that warm the page cache: enough for a disk, few enough for the imports that run meanwhile.
_WARMERS = 4


@dataclass(slots=True)
class Started:
    """A pipeline whose first networks are on their way."""

    pipe: Any
    checkpoint: WanCheckpoint
    residency: ModuleResidency
    plan: MemoryPlan
    options: StartOptions
    limit: DeviceLimit
    device: torch.device
    recorder: Recorder
    cache: PipelineCache | None = None
    run: parallel.DistributedRun | None = None
    """The process among others, where there are several."""
    imports: list[Import] = field(default_factory=list)
    """The modules that were imported."""

    @property
    def preset(self) -> Preset:
        """The preset in use."""
        return self.plan.preset

    @property
    def directory(self) -> Path:
        """The directory that was asked for, wherever the weights came from."""
        return (self.checkpoint if self.cache is None else self.cache.source).directory

    def close(self) -> None:
        """Stop what is under way and free everything; a cache entry that is being written is completed."""
        self.residency.close()
        self.limit.close()
        if self.cache is not None:
            self.cache.close()


@dataclass(frozen=True, slots=True)
class _StartContext:
    """Values that each step of a start works with."""

    checkpoint: WanCheckpoint
    options: StartOptions
    recorder: Recorder
    warming: Prewarm
    cache: PipelineCache | None


def begin(directory: StrPath | WanCheckpoint | None, options: StartOptions) -> Started:
    """Start. Raises everything that can be found wrong before a weight is loaded.

    Args:
        directory: The checkpoint's directory, or what `open_wan` made of it; None if the options name all files.
        options: The options of the start.

    Returns:
        The pipeline, whose first networks are on their way.
    """
    recorder = Recorder()
    with span(recorder, "header"):
        checkpoint = open_wan(directory, **options.files.named)
        options = _checked_degrees(checkpoint, options)
    # after the headers: a wrong checkpoint is told of without the libraries, too
    if missing := [name for name in ("torch", "transformers", "diffusers") if find_spec(name) is None]:
        raise OptionError.because(f"{', '.join(missing)} not installed", "pip install 'wan-loader[pipeline]'")
    with span(recorder, "header"):
        cache = _open_cache(checkpoint, options)
    if cache is not None:
        checkpoint = cache.checkpoint
    # of the processes of one machine, one warms the page cache for all
    files = [f for c in checkpoint.components for f in c.files] if warms() else []
    warming = prewarm_files(files, threads=_WARMERS)
    try:
        lean = not (options.full_imports or options.like_diffusers)
        with short_imports(lean=lean) as imports:
            started = _begin(_StartContext(checkpoint, options, recorder, warming, cache))
        started.imports = imports
        return started
    except BaseException:
        warming.stop()
        if cache is not None:
            cache.close()
        raise


def _open_cache(checkpoint: WanCheckpoint, options: StartOptions) -> PipelineCache | None:
    """Open what the cache holds of the experts in the dtype that they will have; None if it is not wanted."""
    from wan_loader.dtypes import dtype_name

    if not options.cache:
        return None
    from wan_pipeline.pipeline_cache import PipelineCache

    some = presets.load_preset("fastest" if options.preset == "auto" else options.preset)
    dtype = dtype_name(options.dtype or ("fp32" if options.like_diffusers else some.dtype))
    assert dtype is not None
    return PipelineCache(checkpoint, dtype, options.cache_dir)


def _begin(context: _StartContext) -> Started:
    recorder = context.recorder
    device_started = _start_device(context.options.device, recorder)
    with span(recorder, "import"):
        import torch  # noqa: F401
    found: list[Started] = []

    def fetch(stop: CancelToken) -> None:
        device_started.wait()  # torch would wait for the driver with the interpreter's lock
        found.append(_start_fetching(context))

    # the CUDA context, and then the weights, take their time while the libraries are imported
    first = BackgroundFetch("start", fetch)
    try:
        with span(recorder, "import"):
            from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401
        with span(recorder, "init"):  # while the driver starts the device
            tokenizer = load_tokenizer(context.checkpoint.tokenizer, quick=not context.options.like_diffusers)
            texts = _build(context, "transformers")
        first.wait()
        started = found[0]
        # the current device is each thread's own: that of the fetching thread is set already
        use_device(started.device)
        with span(
            recorder, "init"
        ):  # one whose blocks are streamed is fetched once it is built: behind the next import
            built = _settle(started, texts)
        with span(recorder, "import"):
            from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel  # noqa: F401
        with span(recorder, "init"):
            built |= _settle(started, _build(context, "diffusers"))
            started.pipe = _pipeline(context.checkpoint, tokenizer, built)
            attach(started.pipe, started.residency, started.device)
        # collectives of a load must not meet those of a network
        if started.run is not None:
            started.residency.wait_all()
    except BaseException as error:
        first.cancel()
        for started in found:
            if started.run is not None:  # before its loads are cancelled, which others wait for
                started.run.liveness.fail(error)
            started.residency.close()
            started.limit.close()
            if started.run is not None:
                started.run.close(error)
        raise
    return started


def _start_device(device: str | torch.device, recorder: Recorder) -> threading.Event:
    """Have the driver start this process's device in the background; return what tells that it has."""
    kind, _, index = str(device).partition(":")
    index, done = index or str(local_rank()), threading.Event()

    def work() -> None:
        try:
            with span(recorder, "cuda_init"):
                start_device(int(index))
        finally:
            done.set()

    if kind in ("auto", "cuda") and index.isdecimal():
        threading.Thread(target=work, name="start device", daemon=True).start()
    else:
        done.set()
    return done


def _checked_degrees(checkpoint: WanCheckpoint, options: StartOptions) -> StartOptions:
    """Return the options with what several processes divide by default; `OptionError` for what does not fit."""
    world = world_size()
    options.degrees.check(world, t5_cpu=options.t5_cpu)
    degrees = options.degrees.resolved(options.preset, world, t5_cpu=options.t5_cpu)
    degrees.check_model(checkpoint, options.size, options.frame_num)
    if world > 1 and (options.offload_model or options.like_diffusers):
        raise OptionError.because(
            "several processes keep everything on their devices", "leave out offload_model, use WanT2V"
        )
    if world > 1 and (quantised := [c for c in checkpoint.components if c.facts.quantised]):
        reason = f"{quantised[0].source} is quantised, and there are {world} processes, which load parts of tensors"
        raise OptionError.because(reason, "use one process, or a checkpoint in bf16")
    if world > 1 and options.cache:
        raise OptionError.because(f"the converted cache is for one process, and there are {world}", "leave out --cache")
    if world > 1 and options.keep:
        raise OptionError.because(
            f"kept weights are whole, and {world} processes divide them", "leave out keep (--keep)"
        )
    return replace(options, degrees=degrees)


def _start_fetching(context: _StartContext) -> Started:
    """Choose the preset and begin to load; needs torch and the device, no other library."""
    run = parallel.connect(context.options.degrees, context.options.device) if world_size() > 1 else None
    try:
        return _fetching(context, run)
    except BaseException as error:
        if run is not None:
            run.close(error)
        raise


def _fetching(context: _StartContext, run: parallel.DistributedRun | None) -> Started:
    import torch

    from wan_loader import resolve_device

    checkpoint, options, cache = context.checkpoint, context.options, context.cache
    device = resolve_device(options.device, context.recorder) if run is None else run.device
    plan = make_memory_plan(checkpoint, options, device)
    preset, steps = plan.preset, plan.steps
    if options.keep and plan.streams:
        reason = f"kept weights are whole, and networks are streamed here: {plan.reason}"
        raise OptionError.because(reason, "leave out keep (--keep), or allow more memory")
    if cache is not None and plan.streams:
        cache.leave_out()
    names = [name for name in checkpoint.names if run is None or run.keeps(name)]
    if run is not None:
        if preset.residency != "everything":
            raise OptionError.because(
                f"preset {preset.name} swaps networks, several processes keep them", "use --preset multi-gpu"
            )
        # no network gives way: all processes must have it at the same time
        steps = presets.residency_steps(preset, names)
    placements = [
        Placement(
            component,
            torch.device("cpu")
            if component.network.kind == "text_encoder" and preset.text_encoder == "cpu"
            else device,
            network_dtype(component, preset, options),
            decoder_only=not options.like_diffusers,
            run=run if run is not None and run.loads_together(component.name, preset.text_encoder) else None,
            streaming=plan.streams.get(component.name),
            keep=options.keep,
        )
        for component in checkpoint.components
        if component.name in names
    ]
    residency = ModuleResidency(
        placements,
        steps,
        observer=context.recorder,
        warm_ahead=preset.warm_ahead,
        warming=context.warming,
        on_loaded=None if cache is None else cache.note,
    )
    limit = DeviceLimit(device, allocator_nbytes(preset))
    residency.start()
    return Started(None, checkpoint, residency, plan, options, limit, device, context.recorder, cache, run)


def _build(context: _StartContext, library: str) -> dict[str, torch.nn.Module]:
    """Build the networks whose classes are a library's, on meta."""
    return {
        component.name: modules.build(component, decoder_only=not context.options.like_diffusers)
        for component in context.checkpoint.components
        if component.network.module[0] == library
    }


def _settle(started: Started, constructed: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """Give networks the dtypes of the preset, and make them known to the residency.

    Raises:
        KeyMismatchError: A checkpoint does not fit its module.
    """
    built: dict[str, Any] = {}
    for name, module in constructed.items():
        component = started.checkpoint[name]
        modules.set_dtypes(module, component, network_dtype(component, started.preset, started.options))
        modules.check(module, component)
        if started.run is not None:
            parallel.divide(started.run, name, module)
        if name in started.plan.tiled:
            module.enable_tiling()  # type: ignore[operator]
        started.residency.provide(name, module)
        built[name] = module
    return built


def _pipeline(checkpoint: WanCheckpoint, tokenizer: Any, built: dict[str, Any]) -> Any:
    import diffusers

    scheduler: Any = getattr(diffusers, checkpoint.scheduler.get("_class_name", "UniPCMultistepScheduler"))
    wan: Any = diffusers.WanPipeline
    return wan(
        tokenizer=tokenizer,
        scheduler=scheduler.from_config(dict(checkpoint.scheduler)),
        boundary_ratio=checkpoint.boundary_ratio,
        expand_timesteps=checkpoint.family.expand_timesteps,
        **built,
    )
