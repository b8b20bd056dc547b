"""`wan-pipeline generate` and `wan-pipeline load`.

The flags of generate.py under its names; hyphens are accepted, too. Everything that can be wrong is found before a
weight is loaded, most of it before torch is imported.
"""

from __future__ import annotations

import secrets
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan_loader import OptionError
from wan_loader.cli import (
    OUTPUT,
    Force,
    Verbose,
    check_outputs,
    own_file,
    print_json,
    print_note,
    say,
    show,
    write_json,
)
from wan_loader.distributed import is_first, world_size
from wan_pipeline.commands.load_report import print_load_report
from wan_pipeline.commands.many import agreed_seed, make_videos, tell_made
from wan_pipeline.families import FAMILIES
from wan_pipeline.network_files import NetworkFiles
from wan_pipeline.parallel import Degrees
from wan_pipeline.phase_progress import phase_progress
from wan_pipeline.prompt_file import PromptLine, read_prompt_file
from wan_pipeline.start_options import checked_bytes
from wan_pipeline.video import check_video_name
from wan_pipeline.video_request import VideoRequest, parse_guide_scale, parse_size
from wan_pipeline.wan_checkpoint import open_wan

if TYPE_CHECKING:
    from wan_pipeline.pipeline import WanT2V
    from wan_pipeline.wan_checkpoint import WanCheckpoint

__all__ = ["generate", "load"]


_TASKS = [family.task for family in FAMILIES]


def _option(name: str, help: str, *, panel: str, **settings: Any) -> Any:
    """Make an option that stands in a panel of the help."""
    return typer.Option(f"--{name}", help=help, rich_help_panel=panel, **settings)


_checkpoint = partial(_option, panel="Checkpoint")
_video = partial(_option, panel="Video")
_memory = partial(_option, panel="Memory and devices")
_start = partial(_option, panel="Start")
_output = partial(_option, panel=OUTPUT)


_TASK_HELP = f"{', '.join(_TASKS[:-1])} or {_TASKS[-1]}."
CkptDir = Annotated[
    Path | None,
    _checkpoint(
        "ckpt_dir",
        "The checkpoint, in the native or the diffusers layout, or with ComfyUI's folders.",
    ),
]


def _file(name: str, what: str) -> Any:
    return _checkpoint(name, f"{what}, instead of the checkpoint's.", metavar="FILE", show_default=False)


HighNoise = Annotated[Path | None, _file("high_noise", "The high-noise expert, safetensors or GGUF")]
LowNoise = Annotated[Path | None, _file("low_noise", "The low-noise expert")]
Transformer = Annotated[Path | None, _file("transformer", "The expert of a model that has one")]
TextEncoder = Annotated[Path | None, _file("text_encoder", "The text encoder")]
Vae = Annotated[Path | None, _file("vae", "The VAE")]
Tokenizer = Annotated[
    Path | None,
    _checkpoint(
        "tokenizer",
        "The directory of umT5's tokenizer.",
        metavar="DIR",
        show_default="in or beside the files",
    ),
]
PresetName = Annotated[
    str,
    _memory(
        "preset",
        "auto, fastest, balanced, min-memory, streamed, multi-gpu, or a .toml file of your own.",
    ),
]
VramLimit = Annotated[
    str | None,
    _memory(
        "vram_limit",
        "What the process may hold on the GPU, as the driver counts it, such as 12GB: the fastest way that fits is "
        "taken, down to blocks that come from the files as they run.",
        metavar="SIZE",
        show_default="the preset's, or what is free",
    ),
]
RamLimit = Annotated[
    str | None,
    _memory(
        "ram_limit",
        "What the process may hold in host memory, such as 24GB: with the pages that streamed blocks rely upon.",
        metavar="SIZE",
        show_default="three quarters of what is available for streamed blocks",
    ),
]
Device = Annotated[str, _memory("device", "auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None,
    _memory("dtype", "Of the experts: bf16, fp16 or fp32.", show_default="the preset's, bf16"),
]
ConvertDtype = Annotated[bool, _memory("convert_model_dtype", "Experts in bf16; what the presets do anyway.")]
T5Cpu = Annotated[bool, _memory("t5_cpu", "Encode the prompt on the CPU.")]
OffloadModel = Annotated[
    str | None,
    _memory(
        "offload_model",
        "True: one expert on the device at a time; False: everything stays.",
        metavar="True|False",
        show_default="the preset decides",
    ),
]
DitFsdp = Annotated[bool, _memory("dit_fsdp", "Divide the experts over the processes.")]
T5Fsdp = Annotated[bool, _memory("t5_fsdp", "Divide the text encoder over the processes.")]
Ulysses = Annotated[int, _memory("ulysses_size", "Divide attention over so many processes.", min=1, metavar="N")]
Cache = Annotated[
    bool,
    _checkpoint("cache", "Keep converted experts, and read them from there the next time. For one process."),
]
CacheDir = Annotated[
    Path | None,
    _checkpoint("cache_dir", "Where the converted cache is.", show_default="the user's cache directory"),
]
Keep = Annotated[
    bool,
    _checkpoint(
        "keep",
        "Use the networks that `wan-loader standby keep DIR` has left in memory. For one process.",
    ),
]
FullImports = Annotated[
    bool, _start("full_imports", "Import at once what else waits for its first use, such as scipy.")
]
ProfileOut = Annotated[Path | None, _output("profile_out", "Write one JSON report of the whole run to a file.")]
Standby = Annotated[
    bool | None,
    typer.Option(
        "--standby/--no-standby",
        help="Start in a fork of the stand-by server.",
        show_default="if there is one",
        rich_help_panel="Start",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="The report as one JSON document on stdout.", rich_help_panel=OUTPUT)
]


def generate(
    prompt: Annotated[
        str | None, _video("prompt", "What the video shows.", show_default="what --prompt_file says")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        _video("prompt_file", "Many videos, one start: a prompt a line, or JSON with fields named as flags."),
    ] = None,
    ckpt_dir: CkptDir = None,
    high_noise: HighNoise = None,
    low_noise: LowNoise = None,
    transformer: Transformer = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    task: Annotated[str | None, _checkpoint("task", _TASK_HELP, show_default="the checkpoint's")] = None,
    size: Annotated[str | None, _video("size", "WIDTH*HEIGHT in pixels.", show_default="1280*720")] = None,
    frame_num: Annotated[int | None, _video("frame_num", "Frames, 4n+1.", show_default="81")] = None,
    sample_steps: Annotated[int | None, _video("sample_steps", "Denoising steps.", show_default="40")] = None,
    sample_shift: Annotated[float | None, _video("sample_shift", "Noise shift.", show_default="12")] = None,
    sample_guide_scale: Annotated[
        str | None,
        _video("sample_guide_scale", "Guidance: one number, or LOW,HIGH noise.", show_default="3.0,4.0"),
    ] = None,
    sample_solver: Annotated[str, _video("sample_solver", "unipc or dpm++.")] = "unipc",
    negative_prompt: Annotated[
        str | None,
        _video("negative_prompt", "What to steer away from.", show_default="the published one"),
    ] = None,
    base_seed: Annotated[int, _video("base_seed", "The same seed gives the same video; -1 draws one.")] = -1,
    save_file: Annotated[
        Path | None, _output("save_file", "The mp4 to write.", show_default="TASK_SIZE_SEED.mp4")
    ] = None,
    save_dir: Annotated[
        Path | None, _output("save_dir", "Where the videos of --prompt_file go; those that are there are kept.")
    ] = None,
    preset: PresetName = "auto",
    vram_limit: VramLimit = None,
    ram_limit: RamLimit = None,
    device: Device = "auto",
    dtype: Dtype = None,
    offload_model: OffloadModel = None,
    convert_model_dtype: ConvertDtype = False,
    t5_cpu: T5Cpu = False,
    dit_fsdp: DitFsdp = False,
    t5_fsdp: T5Fsdp = False,
    ulysses_size: Ulysses = 1,
    cache: Cache = False,
    cache_dir: CacheDir = None,
    keep: Keep = False,
    full_imports: FullImports = False,
    profile_out: ProfileOut = None,
    standby: Standby = None,
    json: Json = False,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Generate a video from a prompt, or many from a file of prompts.

    The flags are those of generate.py; hyphens in the place of underscores are accepted, too.

    Examples:

        wan-pipeline generate --ckpt_dir Wan2.2-T2V-A14B --prompt "Two cats boxing on a stage"

        wan-pipeline generate --ckpt_dir DIR --prompt TEXT --vram_limit 12GB --size 832*480 --save_file cats.mp4

        wan-pipeline generate --ckpt_dir DIR --prompt TEXT --high_noise high-Q4.gguf --low_noise low-Q4.gguf

        wan-pipeline generate --ckpt_dir DIR --prompt_file prompts.txt --save_dir videos

        torchrun --nproc_per_node 8 -m wan_pipeline generate --ckpt_dir DIR --prompt TEXT --dit_fsdp --ulysses_size 8
    """
    _check_prompts(prompt, prompt_file, save_file, save_dir)
    files = _named_files(ckpt_dir, high_noise, low_noise, transformer, text_encoder, vae, tokenizer)
    start = _start_settings(preset, device, dtype, convert_model_dtype, t5_cpu, offload_model)
    start |= _cache_settings(cache, cache_dir) | _memory_settings(vram_limit, ram_limit)
    start |= {"full_imports": full_imports, "keep": keep}
    degrees = Degrees(dit_fsdp=dit_fsdp, t5_fsdp=t5_fsdp, ulysses_size=ulysses_size)
    degrees.check(world_size(), t5_cpu=t5_cpu)
    start |= {"dit_fsdp": dit_fsdp, "t5_fsdp": t5_fsdp, "ulysses_size": ulysses_size}
    start["directory"] = checkpoint = open_wan(ckpt_dir, **files.named)
    if task not in (None, checkpoint.task):
        raise OptionError.because(f"--task {task}: {checkpoint.directory} is {checkpoint.task}")
    settings = {
        "size": parse_size(size) if size is not None else None,
        "frame_num": frame_num,
        "steps": sample_steps,
        "shift": sample_shift,
        "guide_scale": parse_guide_scale(sample_guide_scale) if sample_guide_scale is not None else None,
        "solver": sample_solver,
        "negative_prompt": negative_prompt,
        "seed": secrets.randbelow(2**31) if base_seed == -1 else base_seed,
    }
    if prompt_file is not None:
        lines = _checked_lines(prompt_file, checkpoint, settings | {"seed": base_seed}, degrees, save_dir or Path())
        if save_dir is not None and is_first():
            save_dir.mkdir(parents=True, exist_ok=True)
        _generate_all(lines, start, own_file(profile_out), json=json, force=force)
        return
    assert prompt is not None
    request = _checked_request(checkpoint, prompt, settings)
    degrees.check_model(checkpoint, request.size, request.frame_num)
    target = save_file or Path(f"{checkpoint.task}_{request.size[0]}x{request.size[1]}_{request.seed}.mp4")
    first, profile_out = is_first(), own_file(profile_out)
    check_outputs(target if first else None, profile_out, force=force)
    with phase_progress(quiet=not first) as progress, _started(start, request) as pipe:
        seed = settings["seed"] = agreed_seed(pipe, request.seed)
        if base_seed == -1 and first:
            say(f"seed {seed}")
        video = pipe(prompt, progress=progress, **settings)
        if first:
            progress("save", 0, 1)
            video.save(target)
            progress("save", 1, 1)
        report = {**pipe.report(), "command": "generate", "video": {"path": str(target), "seed": seed}}
    _finish_cache(report, pipe)
    _finish(report, profile_out, json=json, result=str(target))


def load(
    ckpt_dir: CkptDir = None,
    high_noise: HighNoise = None,
    low_noise: LowNoise = None,
    transformer: Transformer = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    preset: PresetName = "auto",
    vram_limit: VramLimit = None,
    ram_limit: RamLimit = None,
    device: Device = "auto",
    dtype: Dtype = None,
    offload_model: OffloadModel = None,
    convert_model_dtype: ConvertDtype = False,
    t5_cpu: T5Cpu = False,
    cache: Cache = False,
    cache_dir: CacheDir = None,
    keep: Keep = False,
    full_imports: FullImports = False,
    profile_out: ProfileOut = None,
    standby: Standby = None,
    json: Json = False,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Start the pipeline, load what its first phase needs, and say what took the time; generate nothing.

    Examples:

        wan-pipeline load --ckpt_dir Wan2.2-T2V-A14B

        wan-pipeline load --ckpt_dir Wan2.2-T2V-A14B --preset fastest --profile_out start.json
    """
    files = _named_files(ckpt_dir, high_noise, low_noise, transformer, text_encoder, vae, tokenizer)
    start = _start_settings(preset, device, dtype, convert_model_dtype, t5_cpu, offload_model)
    start |= {"directory": ckpt_dir, **files.named}
    start |= _cache_settings(cache, cache_dir) | _memory_settings(vram_limit, ram_limit)
    start |= {"full_imports": full_imports, "keep": keep}
    profile_out = own_file(profile_out)
    check_outputs(profile_out, force=force)
    with _started(start, None) as pipe:
        pipe.wait()
        report = {**pipe.report(), "command": "load"}
    _finish_cache(report, pipe)
    _finish(report, profile_out, json=json, result=None)
    if is_first() and not json:
        print_load_report(report)


def _check_prompts(prompt: str | None, prompt_file: Path | None, save_file: Path | None, save_dir: Path | None) -> None:
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("say what the video shows with --prompt or --prompt_file, and not with both")
    if prompt_file is not None and save_file is not None:
        raise OptionError.because("--save_file is for one video", "use --save_dir, or save_file in a line of the file")
    if save_file is not None:
        check_video_name(save_file)
    if prompt_file is None and save_dir is not None:
        raise OptionError.because("--save_dir needs --prompt_file", "use --save_file")


def _checked_lines(
    path: Path, checkpoint: WanCheckpoint, settings: dict[str, Any], degrees: Degrees, directory: Path
) -> list[PromptLine]:
    def check(request: VideoRequest) -> None:
        request.check_task(checkpoint.task, checkpoint.vae_scale[1] * 2)
        degrees.check_model(checkpoint, request.size, request.frame_num)

    return read_prompt_file(path, checkpoint.task, settings, directory, check)


def _generate_all(
    lines: list[PromptLine], start: dict[str, Any], profile_out: Path | None, *, json: bool, force: bool
) -> None:
    if is_first():
        check_outputs(profile_out, force=force)
        # what is there is kept, or to be made anew; that it can be written is checked
        check_outputs(*(line.target for line in lines), profile_out, force=True)
    made, report, pipe = make_videos(lines, lambda request: _started(start, request), force=force, names=not json)
    report |= {"command": "generate", "videos": [video.to_json() for video in made]}
    if pipe is not None:
        _finish_cache(report, pipe)
    _finish(report, profile_out, json=json, result=None)
    if is_first() and (code := tell_made(made)):
        raise typer.Exit(code)


def _named_files(
    ckpt_dir: Path | None,
    high_noise: Path | None,
    low_noise: Path | None,
    transformer: Path | None,
    text_encoder: Path | None,
    vae: Path | None,
    tokenizer: Path | None,
) -> NetworkFiles:
    """Return the files that were named; without any, there has to be a directory."""
    files = NetworkFiles(
        high_noise=high_noise,
        low_noise=low_noise,
        transformer=transformer,
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
    )
    if ckpt_dir is None and not files.networks:
        raise typer.BadParameter("Missing option '--ckpt_dir' (or a file for each network, such as '--high_noise').")
    return files


def _start_settings(
    preset: str,
    device: str,
    dtype: str | None,
    convert: bool,
    t5_cpu: bool,
    offload: str | None,
) -> dict[str, Any]:
    if convert and dtype not in (None, "bf16", "bfloat16"):
        reason = f"--convert_model_dtype converts to bf16, --dtype says {dtype}"
        raise OptionError.because(reason, "leave one of them out")
    return {
        "preset": preset,
        "device": device,
        "dtype": "bf16" if convert else dtype,
        "t5_cpu": t5_cpu,
        "offload_model": None if offload is None else _parse_bool("offload_model", offload),
    }


def _memory_settings(vram_limit: str | None, ram_limit: str | None) -> dict[str, Any]:
    """Read the limits, whose errors name the flags."""
    limits = {"device_memory": ("vram_limit", vram_limit), "host_memory": ("ram_limit", ram_limit)}
    found: dict[str, Any] = {}
    for name, (flag, text) in limits.items():
        try:
            found[name] = checked_bytes(text, flag)
        except OptionError as error:
            raise OptionError(f"--{flag}: {error}") from error
    return found


def _cache_settings(cache: bool, cache_dir: Path | None) -> dict[str, Any]:
    if cache_dir is not None and not cache:
        raise OptionError.because("--cache_dir needs --cache")
    return {"cache": cache, "cache_dir": cache_dir}


def _finish_cache(report: dict[str, Any], pipe: WanT2V) -> None:
    """Say what the cache had to do with it, and wait for the entry that is being written."""
    from wan_loader.cli import follow_build

    if report["cache"] is None:
        return
    state, reason, entry = (report["cache"][name] for name in ("state", "reason", "entry"))
    say(f"cache: read from {entry}" if state == "hit" else f"cache: {reason}")
    if pipe.build is not None:
        follow_build(pipe.build)
        failure = pipe.build.failure
        say(f"cached: {pipe.build.path}" if failure is None else f"not cached: {failure}")


def _checked_request(checkpoint: WanCheckpoint, prompt: str, settings: dict[str, Any]) -> VideoRequest:
    request = VideoRequest.make(checkpoint.task, prompt, **settings)
    request.check_task(checkpoint.task, checkpoint.vae_scale[1] * 2)
    return request


def _started(settings: dict[str, Any], request: VideoRequest | None) -> WanT2V:
    from wan_pipeline.pipeline import WanT2V

    if request is not None:
        settings = {**settings, "size": request.size, "frame_num": request.frame_num}
    pipe = WanT2V.from_checkpoint(**settings)
    if pipe.run is not None:
        pipe.run.exit_on_failure()
        if not is_first():
            warnings.simplefilter("ignore")
    if is_first():
        print_note(f"preset {pipe.preset_reason}")
    return pipe


def _parse_bool(name: str, text: str) -> bool:
    if (word := text.lower()) in ("true", "yes", "1", "y", "t"):
        return True
    if word in ("false", "no", "0", "n", "f"):
        return False
    raise OptionError.because(f"--{name} {text}", "use True or False")


def _finish(report: dict[str, Any], profile_out: Path | None, *, json: bool, result: str | None) -> None:
    if profile_out is not None:
        write_json(profile_out, report)
    if not is_first():
        return
    _tell_kept(report)
    first = report["pipeline"]["time_to_first_step_s"] if "pipeline" in report else None
    if first is not None:
        say(f"time to first denoising step: {first:.2f} s")
    if json:
        print_json(report)
    elif result is not None:
        show(result)


def _tell_kept(report: dict[str, Any]) -> None:
    """Say which networks were attached to, and why others were not, where that was asked for."""
    loads = report["pipeline"]["loads"] if "pipeline" in report else []
    # the last load of each network
    for name, kept in {load["name"]: load["kept"] for load in loads if "kept" in load}.items():
        say(f"{name}: {'kept' if kept['state'] == 'attached' else 'loaded, as ' + kept['reason']}")
