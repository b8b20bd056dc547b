"""Files that are named one by one: for a network in the place of a checkpoint's own, or for all of them without one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from wan_loader import OptionError
from wan_loader.arguments import checked_path
from wan_pipeline.families import FAMILIES

if TYPE_CHECKING:
    from wan_loader import StrPath
    from wan_pipeline.model_family import ModelFamily, Network, SynthName

__all__ = ["NetworkFiles"]


#: Experts have the same names and shapes; what they are called is all that tells one from the other.
_WRONG_EXPERT = {
    "high_noise": re.compile(r"(?<![a-z])low(?![a-z])|low[-_ ]?noise", re.IGNORECASE),
    "low_noise": re.compile(r"(?<![a-z])high(?![a-z])|high[-_ ]?noise", re.IGNORECASE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFiles:
    """The files that were named; each may also be a directory or an index, as for `wan_loader.load`."""

    high_noise: StrPath | None = None
    low_noise: StrPath | None = None
    transformer: StrPath | None = None
    """The one expert of a model that has no two."""
    text_encoder: StrPath | None = None
    vae: StrPath | None = None
    tokenizer: StrPath | None = None
    """A directory with a tokenizer as transformers has it, one in the hub's cache, or a sentencepiece model."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if (path := getattr(self, one.name)) is not None:
                object.__setattr__(self, one.name, checked_path(path, one.name))
        for name, wrong in _WRONG_EXPERT.items():
            if (path := getattr(self, name)) is not None and wrong.search(os.path.basename(path)):
                raise OptionError.because(f"--{name} {path}: it is called like the other expert", "swap the two")
        if self.high_noise is not None and self.high_noise == self.low_noise:
            raise OptionError.because(f"--high_noise and --low_noise are both {self.low_noise}", "name two files")
        if not self.families:
            reason = f"no model has networks for {', '.join(f'--{name}' for name in self.networks)} together"
            raise OptionError.because(reason, "--transformer is for models with one expert")

    @property
    def networks(self) -> dict[SynthName, str]:
        """The files of networks that were named, by the network."""
        names: tuple[SynthName, ...] = ("high_noise", "low_noise", "transformer", "text_encoder", "vae")
        return {name: str(path) for name in names if (path := getattr(self, name)) is not None}

    @property
    def named(self) -> dict[str, StrPath]:
        """All that was named, as arguments of `open_wan`."""
        return {one.name: path for one in fields(self) if (path := getattr(self, one.name)) is not None}

    @property
    def families(self) -> tuple[ModelFamily, ...]:
        """The models that have all of these networks."""
        named = self.networks.keys()
        return tuple(f for f in FAMILIES if named <= {network.synth_name for network in f.networks})

    def path(self, network: Network) -> str | None:
        """Return the file that was named for a network; None if none was."""
        return self.networks.get(network.synth_name)

    def __bool__(self) -> bool:
        return bool(self.named)
