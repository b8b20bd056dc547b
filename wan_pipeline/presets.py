"""Start-up presets: `profiles/*.toml` as frozen values, and what they mean for memory.

A preset says which networks may lie on the device together in each step of a generation. From that, the sizes of the
networks and the working memory of a step follows the peak, before anything is loaded: a preset that cannot fit is an
error with the numbers, and `choose` takes the fastest that fits and says why. The same steps drive `residency`, so
what is checked is what happens.

Pure, but for reading the TOML files: no torch, no device is touched.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from wan_loader import DeviceMemoryError, HostMemoryError, OptionError
from wan_pipeline.families import TITLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "PRESETS",
    "Limits",
    "Preset",
    "ResidencyStep",
    "check_fit",
    "choose",
    "fitted_steps",
    "load_preset",
    "peak",
    "residency_steps",
]

#: Fastest first: the order in which `choose` tries them.
PRESETS = ("fastest", "balanced", "min-memory", "multi-gpu")

ResidencyMode = Literal["everything", "next", "one"]
_DTYPES = ("bf16", "fp16", "fp32", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The use of memory by a start and a generation."""

    name: str
    description: str
    device_memory_gb: float
    """The contract: the device never holds more than this, working memory included."""
    residency: ResidencyMode
    """The networks that lie on the device together: "everything": all stay. "next": text encoder and first expert
    together, later one at a time. "one": one at a time from the beginning.
    """
    text_encoder: Literal["device", "cpu"] = "device"
    warm_ahead: bool = True
    """Read what comes next into the page cache while a network runs, as far as memory allows."""
    dtype: str = "bf16"
    vae_dtype: str = "fp32"
    sharded: bool = False
    """Weights are divided over the processes of a distributed run."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("residency", self.residency, get_args(ResidencyMode)),
            ("text_encoder", self.text_encoder, ("device", "cpu")),
            ("dtype", self.dtype, _DTYPES),
            ("vae_dtype", self.vae_dtype, _DTYPES),
        ):
            if value not in allowed:
                raise OptionError.because(
                    f"preset {self.name}: {name} is {value!r}", f"use one of {', '.join(allowed)}"
                )
        if not self.device_memory_gb > 0:
            reason = f"preset {self.name}: device_memory_gb is {self.device_memory_gb}"
            raise OptionError.because(reason, "it must be positive")

    def adapted(self, *, t5_cpu: bool = False, offload_model: bool | None = None, dtype: str | None = None) -> Preset:
        """Return the preset with what was asked for on top of it."""
        residency: ResidencyMode = self.residency
        if offload_model is not None:
            # a preset that keeps one at a time goes on doing so
            residency = "everything" if not offload_model else "one" if residency == "one" else "next"
        where: Literal["device", "cpu"] = "cpu" if t5_cpu else self.text_encoder
        return replace(self, residency=residency, text_encoder=where, dtype=dtype or self.dtype)


@dataclass(frozen=True, slots=True)
class ResidencyStep:
    """A part of a generation: the network it runs, and all that may be in memory meanwhile, in order of first use."""

    uses: str
    resident: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The memory that the machine allows, in bytes."""

    device: str
    """The device's name, for messages."""
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)
    """The networks' names in messages."""
    device_nbytes: int | None
    """Free bytes on the device; None if it is the CPU, which has no memory of its own."""
    host_nbytes: int
    """Bytes that this process may still take on the host."""
    world_size: int = 1
    may_drop: bool = True
    """True if a network can be dropped for another to run; False where the networks are handed out."""


def load_preset(name: str) -> Preset:
    """Read a preset by its name, or from a TOML file of one's own (a path that ends in .toml).

    Raises:
        OptionError: There is no such preset, or the file is none.
    """
    path = Path(name) if name.endswith(".toml") else _profiles() / f"{name}.toml"
    if not name.endswith(".toml") and name not in PRESETS:
        raise OptionError.because(f"no preset is called {name!r}", f"use auto, {', '.join(PRESETS)}, or a .toml file")
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text())
        unknown = sorted(set(table) - {field.name for field in fields(Preset)})
        if unknown:
            raise OptionError.because(f"has unknown settings: {', '.join(unknown)}", path=path)
        return Preset(**{"name": path.stem, **table})
    except OSError as error:
        raise OptionError.because(f"cannot be read: {error.strerror}", path=path) from error
    except OptionError:
        raise
    except (TypeError, ValueError) as error:
        raise OptionError.because(f"is no preset: {error}", path=path) from error


def _profiles() -> Path:
    """Return the presets' directory: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def residency_steps(preset: Preset, names: Sequence[str]) -> tuple[ResidencyStep, ...]:
    """List the steps of a generation with the networks `names`, given in the order of first use."""
    if preset.residency == "everything":
        return tuple(ResidencyStep(name, tuple(names)) for name in names)
    if preset.residency == "one":
        return tuple(ResidencyStep(name, (name,)) for name in names)
    text, first, *_, last = names
    return (
        ResidencyStep(text, (text, first)),
        *(ResidencyStep(name, (name, last)) for name in names[1:-1]),
        ResidencyStep(last, (last,)),
    )


def fitted_steps(
    preset: Preset, sizes: Mapping[str, int], workspace: Mapping[str, int], limits: Limits
) -> tuple[ResidencyStep, ...]:
    """List the steps on a device: where all networks stay, and the VAE's work finds no room beside them, one gives way.

    It is the one that another generation would need last, the low-noise expert: it is fetched again behind the others.
    """
    *others, decode = residency_steps(preset, list(sizes))
    allowed = _allowed(preset, limits)
    if preset.residency == "everything" and limits.may_drop and allowed is not None:
        needed = _needed(preset, decode, sizes, workspace, limits)[0]
        if needed > allowed:
            # the last but one of the order of first use: the VAE is the last
            decode = replace(decode, resident=tuple(n for n in decode.resident if n != list(sizes)[-2]))
    return (*others, decode)


def _allowed(preset: Preset, limits: Limits) -> int | None:
    """Return the bytes that the preset may take on the device; None if that has no memory of its own."""
    return None if limits.device_nbytes is None else min(int(preset.device_memory_gb * 1e9), limits.device_nbytes)


def _needed(
    preset: Preset, step: ResidencyStep, sizes: Mapping[str, int], workspace: Mapping[str, int], limits: Limits
) -> tuple[int, str]:
    """Return the bytes on the device in a step, and a sentence that adds them up."""
    share = limits.world_size if preset.sharded else 1
    held = {
        # only the weights of experts and text encoder are divided
        name: sizes[name] if name == "vae" else sizes[name] // share
        for name in step.resident
        if not (name == "text_encoder" and preset.text_encoder == "cpu")
    }
    work = workspace.get(step.uses, 0)
    total = sum(held.values()) + work
    parts = [*(f"{limits.titles[name]} {_gb(n)}" for name, n in held.items()), f"{_gb(work)} to work in"]
    return total, f"{_gb(total)} while the {limits.titles[step.uses]} runs ({' + '.join(parts)})"


def peak(preset: Preset, sizes: Mapping[str, int], workspace: Mapping[str, int], limits: Limits) -> tuple[int, str]:
    """Return the bytes on the device in the step that needs most, and a sentence that adds them up.

    Args:
        preset: The preset.
        sizes: Bytes of each network, in the order of first use.
        workspace: Bytes for running each.
        limits: The memory that the machine allows.
    """
    found = fitted_steps(preset, sizes, workspace, limits)
    return max(_needed(preset, step, sizes, workspace, limits) for step in found)


def check_fit(
    preset: Preset, sizes: Mapping[str, int], workspace: Mapping[str, int], host_nbytes: int, limits: Limits
) -> str:
    """Say in one sentence why the preset fits.

    Args:
        preset: The preset.
        sizes: Bytes of each network, in the order of first use.
        workspace: Bytes for running each.
        host_nbytes: Bytes that the load takes on the host beyond the page cache.
        limits: The memory that the machine allows.

    Raises:
        DeviceMemoryError: It does not fit on the device; the message has the numbers.
        HostMemoryError: It does not fit into host memory.
    """
    if host_nbytes > limits.host_nbytes:
        have = _gb(limits.host_nbytes)
        reason = f"preset {preset.name} needs {_gb(host_nbytes)} of host memory, {have} are available here"
        raise HostMemoryError.because(reason, "allow more memory")
    allowed = _allowed(preset, limits)
    if limits.device_nbytes is None or allowed is None:
        return f"{preset.name}: {limits.device} has no memory of its own, weights are mapped where they need no cast"
    needed, where = peak(preset, sizes, workspace, limits)
    if needed > allowed:
        what = f"its contract is {_gb(allowed)}" if allowed < limits.device_nbytes else ""
        free = f"{_gb(limits.device_nbytes)} are free on {limits.device}"
        raise DeviceMemoryError.because(
            f"preset {preset.name} needs {where}; {' and '.join(filter(None, (what, free)))}",
            "use a smaller preset (--preset min-memory), a smaller size, or fewer frames",
        )
    return f"{preset.name}: {where}, {_gb(allowed)} allowed on {limits.device}"


def choose(
    sizes: Mapping[str, int],
    workspace: Mapping[str, int],
    host_nbytes: int,
    limits: Limits,
    *,
    t5_cpu: bool = False,
    offload_model: bool | None = None,
    dtype: str | None = None,
) -> tuple[Preset, str]:
    """Return the fastest preset that fits, and why it was taken; raise the error of the smallest if none does."""
    names = ("multi-gpu",) if limits.world_size > 1 else PRESETS[:3]
    too_large: list[str] = []
    for name in names:
        preset = load_preset(name).adapted(t5_cpu=t5_cpu, offload_model=offload_model, dtype=dtype)
        try:
            why = check_fit(preset, sizes, workspace, host_nbytes, limits)
        except DeviceMemoryError as error:
            if name == names[-1]:
                raise
            too_large.append(str(error.reason))
        else:
            return preset, "; ".join([why, *too_large])
    raise AssertionError("unreachable: the last preset fits or raises")


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
