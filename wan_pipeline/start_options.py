"""Every option of a start, checked when it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan_loader import OptionError
from wan_loader.arguments import check_cache, check_device, check_flag, checked_count, checked_path
from wan_loader.sizes import parse_size
from wan_pipeline.network_files import NetworkFiles
from wan_pipeline.parallel import Degrees
from wan_pipeline.video_request import checked_size

if TYPE_CHECKING:
    import torch

    from wan_loader import StrPath

__all__ = ["StartOptions", "checked_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """The options of a start."""

    files: NetworkFiles = field(default_factory=NetworkFiles)
    """Files in the place of those of the checkpoint's directory."""
    preset: str = "auto"
    device: str | torch.device = "auto"
    dtype: str | None = None
    """The experts' dtype: bf16, fp16 or fp32; None leaves it to the preset."""
    t5_cpu: bool = False
    offload_model: bool | None = None
    """False keeps everything on the device, True one expert at a time; None leaves it to the preset."""
    like_diffusers: bool = False
    """Load all of the VAE, and all networks in the dtypes that `WanPipeline.from_pretrained(dtype=...)` gives them."""
    size: tuple[int, int] = (1280, 720)
    frame_num: int = 81
    """Size and frames decide the working memory that a preset must leave."""
    device_memory: int | None = None
    """Bytes that the process may hold on the device, as the driver counts them; None leaves it to the preset."""
    host_memory: int | None = None
    """Bytes that it may hold on the host, with the pages that streamed blocks rely upon; None: what there is."""
    cache: bool = False
    """Read converted experts from the converted cache, and leave them there; not with several processes."""
    cache_dir: StrPath | None = None
    """None: the user's cache directory."""
    keep: bool = False
    """Attach to the networks that `wan-loader standby keep` has left in memory; one process, no streamed networks."""
    full_imports: bool = False
    """Import at once what waits for its first use otherwise; nothing waits where `like_diffusers` is asked for."""
    degrees: Degrees = field(default_factory=Degrees)
    """The networks that several processes divide."""

    def __post_init__(self) -> None:
        preset = checked_path(self.preset, "preset", "pass a name, or the path of a TOML file")
        object.__setattr__(self, "preset", preset)
        check_device(self.device)
        for name in ("t5_cpu", "like_diffusers", "full_imports", "keep"):
            check_flag(getattr(self, name), name)
        if self.offload_model is not None:
            check_flag(self.offload_model, "offload_model")
        checked_size(self.size)
        checked_count(self.frame_num, "frame_num")
        for name in ("device_memory", "host_memory"):
            checked_bytes(getattr(self, name), name)
        check_cache(cache=self.cache, cache_dir=self.cache_dir)
        if self.keep and self.cache:
            reason = "weights are kept as they come from the checkpoint's files, not from the converted cache"
            raise OptionError.because(reason, "leave out keep (--keep) or cache (--cache)")


def checked_bytes(size: int | str | None, what: str) -> int | None:
    """Return the bytes of an amount, or of a text such as "12GB"; None stays None."""
    return parse_size(size) if isinstance(size, str) else None if size is None else checked_count(size, what)
