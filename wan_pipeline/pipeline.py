"""Text to video with WAN2.2: `WanT2V` for whole videos, `load_diffusers` for people with code of their own.

    with WanT2V.from_checkpoint("Wan2.2-T2V-A14B") as pipe:
        pipe("Two cats boxing on a stage").save("cats.mp4")

`from_checkpoint` returns while networks are still being fetched; a call waits for each one when it needs it. The
networks and the arithmetic are diffusers' and transformers'; the results are theirs, bit for bit.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wan_loader import OptionError, clock_ns
from wan_loader.arguments import checked_path
from wan_pipeline.hooks import detach
from wan_pipeline.network_files import NetworkFiles
from wan_pipeline.parallel import Degrees
from wan_pipeline.sleeping import Slept, Woken, fall_asleep, wake_up
from wan_pipeline.start_options import StartOptions, checked_bytes
from wan_pipeline.startup import begin
from wan_pipeline.timeline import Timeline
from wan_pipeline.video import write_mp4
from wan_pipeline.video_request import VideoRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy as np
    import torch

    from wan_loader import StrPath
    from wan_loader.cache import EntryBuild
    from wan_pipeline.parallel import DistributedRun
    from wan_pipeline.startup import Started
    from wan_pipeline.wan_checkpoint import WanCheckpoint

    Progress = Callable[[str, int, int], None]

__all__ = ["Video", "WanT2V", "load_diffusers"]


@dataclass(frozen=True, slots=True)
class Video:
    """A generated video."""

    frames_THWC: np.ndarray = field(repr=False)
    """Floats from 0 to 1."""
    fps: int
    request: VideoRequest

    def save(self, path: StrPath) -> None:
        """Write an mp4.

        Raises:
            OutputError: It cannot be written.
            OptionError: It is no path, or the name of another kind of file.
        """
        write_mp4(checked_path(path), self.frames_THWC, self.fps)


class WanT2V:
    """A started text-to-video pipeline. A context manager: leaving it frees everything."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self.pipe: Any = started.pipe
        """The `diffusers.WanPipeline` underneath."""
        self.timeline = Timeline()
        """The times at which things happened, for reports."""
        self.pipe.set_progress_bar_config(disable=True)

    @classmethod
    def from_checkpoint(
        cls,
        directory: StrPath | WanCheckpoint | None = None,
        *,
        preset: str = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        t5_cpu: bool = False,
        offload_model: bool | None = None,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        cache: bool = False,
        cache_dir: StrPath | None = None,
        keep: bool = False,
        dit_fsdp: bool = False,
        t5_fsdp: bool = False,
        ulysses_size: int = 1,
        high_noise: StrPath | None = None,
        low_noise: StrPath | None = None,
        transformer: StrPath | None = None,
        text_encoder: StrPath | None = None,
        vae: StrPath | None = None,
        tokenizer: StrPath | None = None,
        full_imports: bool = False,
    ) -> WanT2V:
        """Start from a checkpoint; returns while weights are still on their way.

        The checkpoint is a directory in the native or the diffusers layout, one with ComfyUI's folders, or files that
        are named one by one:

            WanT2V.from_checkpoint("ComfyUI/models")
            WanT2V.from_checkpoint("Wan2.2-T2V-A14B", high_noise="high-Q4_K_M.gguf", low_noise="low-Q4_K_M.gguf")

        In a distributed run (torchrun) every process makes the same calls. All weights have arrived when this returns.
        Only process 0 has the VAE and gets frames; the videos of the others have none. There is no cache then: it is
        for one process. Nothing given of `dit_fsdp`, `t5_fsdp` and `ulysses_size` divides everything.

        Args:
            directory: The checkpoint's directory, or what `open_wan` made of it: then no header is read again. None if
                all networks are named.
            preset: auto, fastest, balanced, min-memory, streamed, multi-gpu, or the path of a TOML file.
            device: auto, cpu, cuda or cuda:N.
            dtype: The dtype of the experts, bf16, fp16 or fp32; None takes the preset's (bf16). The text encoder is
                used as it is in the file (in bf16 if that is quantised or fp16), the VAE in fp32.
            t5_cpu: Encode on the CPU.
            offload_model: False keeps everything on the device, True one expert at a time; None is the preset's choice.
            size: The largest width and height, in pixels, that will be asked for. Like `frame_num` it decides how much
                memory a preset must leave.
            frame_num: The largest number of frames that will be asked for.
            device_memory: The bytes that the process may hold on the device, as the driver counts them (its context and
                libraries included), or a text such as "12GB". With `preset="auto"` the fastest way that fits is taken:
                everything resident, networks that take turns, or blocks that come from the files as they run; the VAE
                works by tiles if it must, which changes its pictures slightly. A named preset gets it as its number.
                None leaves the presets theirs, and "auto" what is free.
            host_memory: The bytes that the process may hold on the host, likewise, with the pages that streamed blocks
                rely upon; blocks beyond that are read from the disk whenever they run, and `preset_reason` says
                how many. None relies upon three quarters of what is available.
            cache: Read the experts as they were converted by an earlier start, from the converted cache, or leave them
                there once everything was loaded.
            cache_dir: The cache's directory; None is the user's.
            keep: Attach to the networks that `wan-loader standby keep DIR` has left in the device's memory: they are
                neither read nor held twice. Others may use them at the same time, so nothing may be written to them (no
                LoRA is to be fused). What is not kept is loaded, and the report says why. For one process, without
                streamed networks and without the converted cache.
            dit_fsdp: Divide the weights of the experts over the processes.
            t5_fsdp: Divide the weights of the text encoder over the processes.
            ulysses_size: 1, or the number of processes, which then divide attention.
            high_noise: A file in the place of the directory's high-noise expert, as for `open_wan`, and so are the next
                five.
            low_noise: The low-noise expert.
            transformer: The one expert of a model that has no two.
            text_encoder: The text encoder.
            vae: The VAE.
            tokenizer: The directory of the tokenizer.
            full_imports: Import at once what the networks do not need, too. Else packages that transformers and
                diffusers only offer something for (scipy, peft) are stand-ins until they are used, and so is torch's
                compiler.

        Raises:
            CheckpointError: The checkpoint is damaged, or another model.
            MissingFileError: Files of it are missing.
            DeviceError: The device does not exist or cannot be used.
            DeviceMemoryError: The preset does not fit on the device, or nothing fits the limit; the message names the
                smallest limit that would do.
            HostMemoryError: The preset does not fit into host memory.
            OptionError: An option makes no sense. Like the others it is raised before a weight is loaded.
        """
        from wan_loader.dtypes import dtype_name

        options = StartOptions(
            files=NetworkFiles(
                high_noise=high_noise,
                low_noise=low_noise,
                transformer=transformer,
                text_encoder=text_encoder,
                vae=vae,
                tokenizer=tokenizer,
            ),
            preset=preset,
            device=device,
            dtype=dtype_name(dtype),
            t5_cpu=t5_cpu,
            offload_model=offload_model,
            size=size,
            frame_num=frame_num,
            device_memory=checked_bytes(device_memory, "device_memory"),
            host_memory=checked_bytes(host_memory, "host_memory"),
            cache=cache,
            cache_dir=cache_dir,
            keep=keep,
            degrees=Degrees(dit_fsdp=dit_fsdp, t5_fsdp=t5_fsdp, ulysses_size=ulysses_size),
            full_imports=full_imports,
        )
        return cls(begin(directory, options))

    def __enter__(self) -> WanT2V:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close(error)

    def __repr__(self) -> str:
        started = self._started
        return f"WanT2V({str(started.directory)!r}, {self.task}, on {started.device}, preset {self.preset})"

    def close(self) -> None:
        """Stop what is still being fetched and free the weights; in a distributed run, when all have come here.

        A closed pipeline cannot be used again; see `sleep` for one that can. A cache entry that was begun is
        still completed.
        """
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        # the group is left once, however often this is called
        run, self._started.run = self.run, None
        try:
            if run is not None:
                run.close(error)
        finally:
            self._started.close()

    @property
    def run(self) -> DistributedRun | None:
        """The process among the others of a distributed run; None outside of one."""
        return self._started.run

    @property
    def task(self) -> str:
        """The name of the model in `--task`: t2v-A14B, for instance."""
        return self._started.checkpoint.task

    @property
    def preset(self) -> str:
        """The preset in use."""
        return self._started.preset.name

    @property
    def preset_reason(self) -> str:
        """The reason for that preset, with the numbers."""
        return self._started.plan.reason

    @property
    def build(self) -> EntryBuild | None:
        """The cache entry that is being written from this start; None if there is none (yet)."""
        return self._started.cache.build if self._started.cache is not None else None

    def wait(self) -> None:
        """Wait until everything that was begun has been fetched; raises what went wrong."""
        self._started.residency.wait_all()

    @property
    def asleep(self) -> bool:
        """True if the pipeline holds no weights and fetches none."""
        return self._started.residency.is_empty

    def sleep(self) -> Slept:
        """Give the memory of all weights back, and go on living: what takes long in a start is not done again.

        What is left on a GPU is its context. Using the pipeline wakes it, each network when it is about to run; `wake`
        brings back at once what a start brings. Weights come out of the files again, which the page cache holds if it
        can: what was changed in them since (LoRA weights, for instance) is gone. Call it in the thread that uses the
        pipeline.

        Returns:
            What was given back.

        Raises:
            OptionError: It is one of several processes, whose networks are together.
        """
        if self.run is not None:
            raise OptionError.because("several processes keep their networks", "close it, or use one process")
        return fall_asleep(self._started.residency, self._started.device)

    def wake(self) -> Woken:
        """Take the memory again: fetch what a start fetches, and wait for it. Does nothing if it is awake.

        Returns:
            What was fetched, and how long it took.

        Raises:
            DeviceMemoryError: Others have taken the memory meanwhile.
            CheckpointError: The files have changed.
        """
        return wake_up(self._started.residency)

    def __call__(self, prompt: str, *, progress: Progress | None = None, **settings: Any) -> Video:
        """Generate a video. The same seed and settings give the same video.

        Args:
            prompt: What the video shows.
            progress: Called with a phase, steps done and steps in all.
            **settings: Fields of `VideoRequest` (size, frame_num, steps, shift, guide_scale, negative_prompt, solver,
                grid, seed); what is not given is the official default of the model.

        Raises:
            OptionError: A setting makes no sense.
            DistributedError: Another process failed or is gone.
        """
        import torch

        request = VideoRequest.make(self.task, prompt, **settings)
        request.check_task(self.task, self._started.checkpoint.vae_scale[1] * 2)
        tell = progress or (lambda phase, done, total: None)
        with torch.no_grad(), nullcontext() if self.run is None else self.run.explained():
            embeds = self._encode(request, tell)
            latents = self._denoise(request, embeds, tell)
            if self.run is None:
                frames = self._decode(latents, tell)
            else:
                frames = self._decode(latents, tell) if self.run.rank == 0 else _no_frames(request)
                self.run.together("decoded")
        return Video(frames, self._started.checkpoint.family.fps, request)

    def report(self) -> dict[str, Any]:
        """Return everything about the start and the generations so far, as one JSON document."""
        return self.timeline.document(self._started)

    def _encode(self, request: VideoRequest, tell: Progress) -> tuple[Any, Any]:
        tell("encode", 0, 1)
        with self.timeline.stage("encode"):
            embeds = self.pipe.encode_prompt(
                request.prompt,
                negative_prompt=request.negative_prompt,
                do_classifier_free_guidance=max(request.guide_scale) > 1,
                max_sequence_length=512,
            )
        tell("encode", 1, 1)
        return embeds[0], embeds[1]

    def _denoise(self, request: VideoRequest, embeds: tuple[Any, Any], tell: Progress) -> Any:
        import torch

        from wan_pipeline.solvers import make_scheduler

        self.pipe.scheduler = make_scheduler(
            self._started.checkpoint.scheduler, solver=request.solver, shift=request.shift, grid=request.grid
        )
        low, high = request.guide_scale
        tell("denoise", 0, request.steps)

        def after_step(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tell("denoise", step + 1, request.steps)
            self.timeline.step_ns.append(clock_ns())
            # diffusers goes on with the tensors that it is given back
            return tensors

        with self.timeline.stage("denoise"):
            return self.pipe(
                prompt_embeds=embeds[0],
                negative_prompt_embeds=embeds[1],
                width=request.size[0],
                height=request.size[1],
                num_frames=request.frame_num,
                num_inference_steps=request.steps,
                # for diffusers, the first transformer is the high-noise expert
                guidance_scale=high,
                guidance_scale_2=low if self.pipe.config.boundary_ratio is not None else None,
                # drawn on the CPU: the same seed gives the same noise on every device
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="latent",
                callback_on_step_end=after_step,
            ).frames

    def _decode(self, latents: Any, tell: Progress) -> np.ndarray:
        """Decode as the end of `WanPipeline.__call__` does, so that it is a phase of its own."""
        import torch

        tell("decode", 0, 1)
        with self.timeline.stage("decode"):
            vae = self.pipe.vae
            latents = latents.to(self._started.device, vae.dtype)
            shape = (1, vae.config.z_dim, 1, 1, 1)
            mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
            # multiplied and divided as there: another order would round otherwise
            inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
            video = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
            frames: np.ndarray = self.pipe.video_processor.postprocess_video(video, output_type="np")[0]
        tell("decode", 1, 1)
        return frames


def _no_frames(request: VideoRequest) -> np.ndarray:
    import numpy as np

    width, height = request.size
    return np.empty((0, height, width, 3), np.float32)


def load_diffusers(
    directory: StrPath | WanCheckpoint | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    preset: str = "auto",
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    cache: bool = False,
    cache_dir: StrPath | None = None,
    high_noise: StrPath | None = None,
    low_noise: StrPath | None = None,
    transformer: StrPath | None = None,
    text_encoder: StrPath | None = None,
    vae: StrPath | None = None,
    tokenizer: StrPath | None = None,
) -> Any:
    """Load a ready `diffusers.WanPipeline`, the same as `WanPipeline.from_pretrained` makes.

    With a preset that keeps everything resident (`fastest`, or `auto` where that fits) all weights have arrived when
    this returns, and the pipeline is an ordinary one. With another, each network is loaded when it is about to run and
    dropped when another needs the room; such a pipeline cannot be moved with `.to()`, nor can weights be merged into
    blocks that are streamed. Room is left to make 81 frames of 832*480: larger ones may need the VAE's tiling, or
    another preset.

    Args:
        directory: As for `WanT2V.from_checkpoint`.
        device: auto, cpu, cuda or cuda:N.
        dtype: As diffusers' argument; None gives its default, fp32 with the text encoder as in the file (a quantised
            one in bf16).
        preset: As for `WanT2V.from_checkpoint`, and so are the other arguments and the errors.
        device_memory: The bytes that the process may hold on the device.
        host_memory: The bytes that it may hold on the host.
        cache: Read converted experts from the converted cache, and leave them there.
        cache_dir: The cache's directory; None is the user's.
        high_noise: As there, and so are the next five.
        low_noise: The low-noise expert.
        transformer: The one expert of a model that has no two.
        text_encoder: The text encoder.
        vae: The VAE.
        tokenizer: The directory of the tokenizer.
    """
    from wan_loader.dtypes import dtype_name

    options = StartOptions(
        files=NetworkFiles(
            high_noise=high_noise,
            low_noise=low_noise,
            transformer=transformer,
            text_encoder=text_encoder,
            vae=vae,
            tokenizer=tokenizer,
        ),
        preset=preset,
        device=device,
        dtype=dtype_name(dtype),
        like_diffusers=True,
        size=(832, 480),
        device_memory=checked_bytes(device_memory, "device_memory"),
        host_memory=checked_bytes(host_memory, "host_memory"),
        cache=cache,
        cache_dir=cache_dir,
    )
    started = begin(directory, options)
    if started.preset.residency == "everything":
        try:
            started.residency.wait_all()
        except BaseException:
            started.close()
            raise
        # nothing of ours is called any more
        detach(started.pipe)
        if started.cache is not None:
            started.cache.close()
    return started.pipe
