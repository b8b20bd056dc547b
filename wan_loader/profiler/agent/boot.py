"""The start of the recording inside a program, from the sitecustomize that the profiler put on PYTHONPATH."""

from __future__ import annotations

import atexit
import os
import sys
import time

from . import import_hooks
from .file_hooks import hook_open
from .process_hooks import hook_processes
from .recorder import AgentRecorder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["finish_inside", "start", "start_inside"]

_MAX_FILES = 4000
_KEPT = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "WORLD_SIZE")
#: What to call when a module has arrived: (module here, function, attribute of what arrived).
_HOOKS = {
    "torch": ("torch_hooks", "hook_torch"),
    "torch.distributed.fsdp": ("torch_hooks", "hook_distributed"),
    "numpy": ("file_hooks", "hook_numpy"),
    "gguf.quants": ("weight_hooks", "hook_gguf"),
    "safetensors": ("weight_hooks", "hook_safetensors"),
    "safetensors.torch": ("weight_hooks", "hook_safetensors_torch"),
    "transformers.modeling_utils": ("weight_hooks", "hook_pretrained", "PreTrainedModel"),
    "transformers.tokenization_utils_base": ("weight_hooks", "hook_pretrained", "PreTrainedTokenizerBase"),
    "diffusers.models.modeling_utils": ("weight_hooks", "hook_pretrained", "ModelMixin"),
    "diffusers.pipelines.pipeline_utils": ("weight_hooks", "hook_pretrained", "DiffusionPipeline"),
    "wan_loader.loading.load_session": ("own_hooks", "hook_own_loads", "LoadSession"),
}


class _FileRecorder(AgentRecorder):
    def file(self, path: Any, reader: Any, mapped: Any) -> None:
        """Remember a weight file, once, with what was in the page cache when it was opened."""
        files = self.facts.setdefault("files", {})
        path = os.path.abspath(path)
        if path in files or len(files) >= _MAX_FILES:
            return
        files[path] = {}  # opening it below is not to be noted again
        try:
            from .weight_hooks import cached_bytes

            nbytes, resident = cached_bytes(path)
        except Exception:  # gone, or not a plain file
            nbytes, resident = 0, None
        files[path] = {"nbytes": nbytes, "resident_before": resident, "reader": reader, "mapped": mapped}
        if site := _site():
            files[path]["site"] = site
        self.note(file=[path, files[path]])


def _site() -> Any:
    """Return file and line of the innermost frame that belongs to no library and not to Python; None without one."""
    library, here = os.path.dirname(os.__file__), os.path.dirname(__file__)
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(("<", library, here)) and not ("site-packages" in name or "dist-packages" in name):
            return [os.path.abspath(name), frame.f_lineno]
        frame = frame.f_back
    return None


def start(directory: Any) -> None:
    """Record this process into `directory`, from its beginning to its end."""
    environ = os.environ
    deadline = environ.get("WAN_LOADER_TRACE_DEADLINE")
    recorder = _FileRecorder(directory, _first_facts(_process_start()), int(deadline) if deadline else None)
    # what Python itself took until sitecustomize
    recorder.whole("import", "python", recorder.started, recorder.now())
    import_hooks.install(recorder, _hooks(recorder))
    hook_open(recorder)
    hook_processes(recorder, lambda: _finish(recorder))
    if environ.get("WAN_LOADER_TRACE_UNTIL"):
        _watch_output(recorder, environ["WAN_LOADER_TRACE_UNTIL"])
    atexit.register(lambda: _finish(recorder))


def start_inside(directory: Any) -> Any:
    """Record this process, which has begun long ago, into `directory`; return the recorder."""
    recorder = _FileRecorder(directory, _first_facts(time.perf_counter_ns()))
    hooks = _hooks(recorder)
    for name in [name for name in hooks if name in sys.modules]:
        try:
            hooks.pop(name)(sys.modules[name])
        except Exception:  # a hook that does not fit this version, or a module that is only half imported
            continue
    import_hooks.install(recorder, hooks)
    hook_open(recorder)
    hook_processes(recorder, lambda: _finish(recorder))
    return recorder


def finish_inside(recorder: Any) -> None:
    """End what `start_inside` began, and take all hooks back."""
    _finish(recorder, "block")
    recorder.close()


def _first_facts(started: Any) -> Any:
    environ = os.environ
    rank = environ.get("RANK", "")
    return {
        "argv": list(getattr(sys, "orig_argv", sys.argv))[:64],
        "rank": int(rank) if rank.isdigit() else None,
        "python": sys.version.split()[0],
        "started": started,
        "env": {k: environ[k] for k in _KEPT if k in environ},
    }


def _hooks(recorder: Any) -> Any:
    return {name: _hook(recorder, *where) for name, where in _HOOKS.items()}


def _hook(recorder: Any, module: str, function: str, attribute: Any = None) -> Any:
    """Make a hook of a function of this package, imported when needed: the start of a program must not wait for it."""

    def hook(arrived: Any) -> None:
        from importlib import import_module

        subject = getattr(arrived, attribute) if attribute else arrived
        getattr(import_module(f"{__package__}.{module}"), function)(recorder, subject)

    return hook


def _process_start() -> Any:
    """Return when this process began, on the clock of the spans; 10 ms exact."""
    now = time.perf_counter_ns()
    try:
        with open("/proc/self/stat") as f:
            ticks = int(f.read().rpartition(")")[2].split()[19])
        # field 22 of proc(5), in clock ticks since boot; the clock of the spans begins elsewhere
        age = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        return now - max(0, age)
    except (OSError, ValueError, AttributeError, IndexError):
        return now


def _watch_output(recorder: Any, text: Any) -> Any:
    """End the recording when the program prints `text`."""

    def watch(stream: Any) -> Any:
        write, tail = stream.write, ""

        def watching(s: Any) -> Any:
            nonlocal tail
            result = write(s)
            if isinstance(s, str):
                if text in tail + s:
                    recorder.stop("until")
                # the text may come in several writes
                tail = (tail + s)[-len(text) :]
            return result

        stream.write = watching
        recorder.undo.append(lambda: delattr(stream, "write"))

    for stream in (sys.stdout, sys.stderr):
        try:
            watch(stream)
        except Exception:
            continue


def _finish(recorder: Any, why: Any = "exit") -> None:
    try:
        # what is imported for the recording is no part of the program
        recorder.on = False
        import resource

        recorder.on = True
        recorder.facts["counters"] = [recorder.now(), *recorder.io()]
        recorder.facts["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            recorder.facts["gpu"] = torch.cuda.get_device_name()
            recorder.facts["device_memory_bytes"] = torch.cuda.get_device_properties().total_memory
            recorder.facts["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    except Exception:
        recorder.facts["incomplete"] = True
    recorder.stop(why)
