"""Checkpoint formats: bytes -> facts (name, dtype, shape, file, offset). Reads headers only, never weights."""

from wan_loader.formats.checkpoint_facts import Checkpoint, FileFacts, StorageFacts, TensorFacts
from wan_loader.formats.directory import Candidate, look_into
from wan_loader.formats.hub_cache import locate
from wan_loader.formats.opening import open_checkpoint
from wan_loader.formats.quantised import with_values
from wan_loader.formats.scales import find_scales
from wan_loader.formats.strict_json import parse_object

__all__ = [
    "Candidate",
    "Checkpoint",
    "FileFacts",
    "StorageFacts",
    "TensorFacts",
    "find_scales",
    "locate",
    "look_into",
    "open_checkpoint",
    "parse_object",
    "with_values",
]
