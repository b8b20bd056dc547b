"""Start-up presets: `profiles/*.toml` as frozen values, and the steps of a generation that they mean.

A preset says which networks may lie on the device together in each step of a generation. `memory_plan` says whether
they fit, and how; the same steps drive `residency`, so what is checked is what happens.

Pure, but for reading the TOML files: no torch, no device is touched.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from wan_loader import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PRESETS", "Preset", "ResidencyStep", "load_preset", "residency_steps"]

#: Fastest first: the order in which `auto` tries those for one process.
PRESETS = ("fastest", "balanced", "min-memory", "streamed", "multi-gpu")

ResidencyMode = Literal["everything", "next", "one", "streamed"]
_DTYPES = ("bf16", "fp16", "fp32", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The use of memory by a start and a generation."""

    name: str
    description: str
    device_memory_gb: float
    """The contract: the device never holds more than this, working memory included."""
    whole_process: bool = False
    """True if that number is of all that the process holds on the device, as the driver counts it: its context and
    libraries included.
    """
    residency: ResidencyMode
    """The networks that lie on the device together: "everything": all stay. "next": text encoder and first expert
    together, later one at a time. "one": one at a time from the beginning. "streamed": likewise, and blocks that
    find no room come from the files as they run.
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

    def adapted(
        self,
        *,
        t5_cpu: bool = False,
        offload_model: bool | None = None,
        dtype: str | None = None,
        device_memory: int | None = None,
    ) -> Preset:
        """Return the preset with what was asked for on top of it."""
        residency: ResidencyMode = self.residency
        if offload_model is not None:
            # a preset that keeps one at a time goes on doing so
            one = residency in ("one", "streamed")
            residency = "everything" if not offload_model else residency if one else "next"
        where: Literal["device", "cpu"] = "cpu" if t5_cpu else self.text_encoder
        made = replace(self, residency=residency, text_encoder=where, dtype=dtype or self.dtype)
        if device_memory is None:
            return made
        return replace(made, device_memory_gb=device_memory / 1e9, whole_process=True)


@dataclass(frozen=True, slots=True)
class ResidencyStep:
    """A part of a generation: the network it runs, and all that may be in memory meanwhile, in order of first use."""

    uses: str
    resident: tuple[str, ...]


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
    if preset.residency in ("one", "streamed"):
        return tuple(ResidencyStep(name, (name,)) for name in names)
    text, first, *_, last = names
    return (
        ResidencyStep(text, (text, first)),
        *(ResidencyStep(name, (name, last)) for name in names[1:-1]),
        ResidencyStep(last, (last,)),
    )
