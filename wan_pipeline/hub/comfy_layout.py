"""ComfyUI's folders: which of the files in them are the networks of a model, by what they are called.

    diffusion_models/ (unet/)   wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors, Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf
    text_encoders/ (clip/)      umt5_xxl_fp8_e4m3fn_scaled.safetensors
    vae/                        wan_2.1_vae.safetensors

The folders may hold any number of other models. They lie in the directory itself, in its `models` (that of ComfyUI) or
in its `split_files` (a repository of repackaged models). Works on names: what a file holds is found when it is opened.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from wan_loader import CheckpointError, MissingFileError
from wan_pipeline.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from wan_pipeline.model_family import ComponentName, ModelFamily, Network

__all__ = ["comfy_family", "comfy_file", "comfy_files", "comfy_parts", "comfy_root"]

_ROOTS = ("", "models", "split_files")
#: The folders of each kind of network; what ComfyUI called them earlier comes second.
_FOLDERS = {"dit": ("diffusion_models", "unet"), "text_encoder": ("text_encoders", "clip"), "vae": ("vae",)}
_SUFFIXES = (".safetensors", ".gguf", ".sft", ".pth", ".pt", ".bin")
_MAX_DEPTH = 3
_MAX_SEEN = 1000
_MAX_NAMED = 8


def comfy_root(root: Path) -> Path | None:
    """Return the directory in or below `root` that has the folders of diffusion models; None if there is none."""
    places = [root / name for name in _ROOTS]
    return next((p for p in places if any((p / folder).is_dir() for folder in _FOLDERS["dit"])), None)


def comfy_family(root: Path, families: Sequence[ModelFamily] = FAMILIES, given: Collection[str] = ()) -> ModelFamily:
    """Return the model of which least is missing; of several such, the first.

    Args:
        root: What `comfy_root` has found.
        families: The models that it may be.
        given: Networks that are named elsewhere, as `synth` calls them.
    """

    def missing(family: ModelFamily) -> int:
        wanted = [network for network in family.networks if network.synth_name not in given]
        return sum(not comfy_files(root, family, network) for network in wanted)

    return min(families, key=missing)


def comfy_files(root: Path, family: ModelFamily, network: Network) -> list[str]:
    """List the files that are called like a network, relative to the root."""
    words = family.marks[network.synth_name]
    return [name for name in _names(root, network) if _is_called(name, words)]


def comfy_file(root: Path, family: ModelFamily, network: Network) -> Path:
    """Return the file of a network.

    Raises:
        MissingFileError: No file is called like it.
        CheckpointError: Several are.
    """
    found = comfy_files(root, family, network)
    if len(found) == 1:
        return root / found[0]
    remedy = f"choose one with --{network.synth_name} FILE"
    if found:
        reason = f"holds several files that are called like the {network.title} of {family.title}: {_some(found)}"
        raise CheckpointError.because(reason, remedy, path=root)
    folder, usual = _FOLDERS[network.kind][0], family.comfy[network.synth_name]
    held = _some(list(_names(root, network))) or "nothing"
    reason = f"holds no {network.title} of {family.title} (such as {folder}/{usual}_*); in {folder}/ is {held}"
    raise MissingFileError.because(reason, f"download it, or {remedy}", path=root)


def comfy_parts(root: Path) -> tuple[ModelFamily, dict[ComponentName, str]] | None:
    """Find the one model in ComfyUI's folders: it, and the file of each network below `root`, in order of first use.

    None where there are no such folders, or some network has no file or several: then only its user can say what is
    meant.
    """
    if (held := comfy_root(root)) is None:
        return None
    family = comfy_family(held)
    found = {network.name: comfy_files(held, family, network) for network in family.networks}
    if any(len(names) != 1 for names in found.values()):
        return None
    return family, {name: (held / names[0]).relative_to(root).as_posix() for name, names in found.items()}


def _names(root: Path, network: Network) -> Iterator[str]:
    """Yield files with weights in the folders of a kind of network and below, relative to the root."""
    for folder in _FOLDERS[network.kind]:
        names: list[str] = []
        # links: people keep their models on another disk; limited: one may lead to all of it
        for seen, (path, below, files) in enumerate(os.walk(root / folder, followlinks=True)):
            depth = os.path.relpath(path, root / folder).count(os.sep) + 1
            below[:] = sorted(n for n in below if not n.startswith(".")) if depth < _MAX_DEPTH else []
            weights = [n for n in files if n.lower().endswith(_SUFFIXES) and not n.startswith(".")]
            names += [os.path.relpath(os.path.join(path, n), root) for n in weights]
            if seen >= _MAX_SEEN:
                break
        yield from sorted(names)


def _is_called(name: str, words: Sequence[str]) -> bool:
    """Say whether a file's name has all of these words, whatever stands between letters and digits."""
    squeezed = re.sub("[^a-z0-9]", "", os.path.basename(name).lower())
    return all(word in squeezed for word in words) and "lora" not in squeezed


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
