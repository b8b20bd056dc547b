"""The two layouts in which WAN2.2 is published: which files text-to-video needs, and which of them are missing.

    native      high_noise_model/, low_noise_model/ (TI2V-5B: shards at the root), text encoder and VAE as .pth,
                google/umt5-xxl/
    diffusers   model_index.json and a directory for each component

Works on names, and reads small JSON files only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from wan_loader import CheckpointError
from wan_loader.formats import look_into, parse_object

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from wan_loader.formats import Candidate

__all__ = ["REPOSITORIES", "Layout", "layout_of", "layouts_in", "missing_files", "parts_of", "wanted_files"]

Layout = Literal["native", "diffusers"]

#: Where each layout of T2V-A14B is published.
REPOSITORIES: dict[Layout, str] = {
    "native": "Wan-AI/Wan2.2-T2V-A14B",
    "diffusers": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
}
_EXPERTS = ("high_noise_model", "low_noise_model")
_TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
_VAE_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
#: Words in the names of both, whoever has saved them again.
_TEXT_WORD, _VAE_WORD = "t5", "vae"
_VAE_22 = re.compile(r"wan-?2[._]2", re.IGNORECASE)
_TOKENIZER = "google/umt5-xxl"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_MAX_JSON_BYTES = 10_000_000

_TRANSFORMER_FILE = r"(config\.json|diffusion_pytorch_model[^/]*\.safetensors(\.index\.json)?)"
_NATIVE = re.compile(
    rf"(({'|'.join(_EXPERTS)})/{_TRANSFORMER_FILE}|{re.escape(_TEXT_FILE)}"
    rf"|{'|'.join(map(re.escape, _VAE_FILES))}|{_TOKENIZER}/[^/]+)"
)
_NATIVE_5B = re.compile(rf"({_TRANSFORMER_FILE}|{_NATIVE.pattern})")
_DIFFUSERS = re.compile(
    r"(model_index\.json"
    r"|(transformer|transformer_2|text_encoder|vae|scheduler|tokenizer)/[^/]+\.(json|safetensors|model|txt))"
)


def layouts_in(names: Iterable[str]) -> tuple[Layout, ...]:
    """The layouts that a listing of files holds."""
    held = set(names)
    found: list[Layout] = []
    if any(n.split("/")[0] in _EXPERTS or n in _VAE_FILES for n in held) and "model_index.json" not in held:
        found.append("native")
    if "model_index.json" in held:
        found.append("diffusers")
        if any(name.split("/")[0] in _EXPERTS for name in held):
            found.append("native")
    return tuple(found)


def wanted_files(names: Iterable[str], layout: Layout) -> tuple[str, ...]:
    """Those of the files that text-to-video needs: weights, indexes, configurations, tokenizer."""
    held = list(names)
    if layout == "diffusers":
        pattern = _DIFFUSERS
    else:
        pattern = _NATIVE if any(name.startswith(_EXPERTS) for name in held) else _NATIVE_5B
    return tuple(name for name in held if pattern.fullmatch(name))


def layout_of(root: Path) -> Layout | None:
    """The layout of a model's directory, complete or not; None for any other directory, such as one component's."""
    if (root / "model_index.json").exists():
        return "diffusers" if _is_wan(root) else None
    loose = sum((root / name).exists() for name in (_TEXT_FILE, *_VAE_FILES))
    if loose > 1 or any((root / name).is_dir() for name in (*_EXPERTS, _TOKENIZER)):
        return "native"
    return None


def parts_of(root: Path, layout: Layout) -> dict[str, str]:
    """Name of each part that holds weights -> its file or directory below the root, in the order of first use."""
    if layout == "diffusers":
        experts = ["transformer"] if _boundary(root) is None else ["transformer", "transformer_2"]
        return {name: name for name in ("text_encoder", *experts, "vae")}
    if _is_5b(root):
        transformers = {"transformer": _transformer_file(root)}
    else:
        transformers = {"transformer": _EXPERTS[0], "transformer_2": _EXPERTS[1]}
    text = _called(root, _TEXT_FILE, _TEXT_WORD)
    return {"text_encoder": text, **transformers, "vae": _called(root, _VAE_FILES[_is_5b(root)], _VAE_WORD)}


def missing_files(root: Path, layout: Layout) -> list[str]:
    """Files that a complete checkpoint has and that are not there, relative to `root`; directories end in a slash.

    Raises `CheckpointError` for an index or a configuration that is damaged.
    """
    if layout == "native":
        parts = parts_of(root, layout)
        missing = [parts[name] for name in ("text_encoder", "vae") if not (root / parts[name]).exists()]
        if "transformer_2" in parts:
            for name in _EXPERTS:
                missing += _missing_parts(root, root / name, _INDEX)
        else:
            missing += _missing_parts(root, root, parts["transformer"])
        return missing + _missing_tokenizer(root, root / _TOKENIZER)
    missing = []
    for name in parts_of(root, "diffusers"):
        missing += _missing_parts(root, root / name, "model.safetensors.index.json" if "text" in name else _INDEX)
    missing += _missing_tokenizer(root, root / "tokenizer")
    scheduler = "scheduler/scheduler_config.json"
    return missing if (root / scheduler).exists() else [*missing, scheduler]


def _is_wan(root: Path) -> bool:
    """Whether a diffusers model is one of WAN's, as far as its index tells."""
    try:
        kind = _read_json(root / "model_index.json").get("_class_name")
    except CheckpointError:  # reported as missing or damaged
        return True
    return not isinstance(kind, str) or kind.startswith("Wan")


def _is_5b(root: Path) -> bool:
    if (root / _VAE_FILES[1]).exists() or (root / _INDEX).exists():
        return True
    return any(_VAE_22.search(c.name) and _VAE_WORD in c.name.lower() for c in _loose(root))


def _called(root: Path, usual: str, word: str) -> str:
    """The name of a file: the usual one or, where that is not there, the only one with the word in it."""
    if not (root / usual).exists():
        named = [c.name for c in _loose(root) if word in c.name.lower()]
        return named[0] if len(named) == 1 else usual
    return usual


def _transformer_file(root: Path) -> str:
    """The index of TI2V-5B's transformer or, where that is not there, the only checkpoint that is no other part."""
    if not (root / _INDEX).exists():
        named = [c.name for c in _loose(root) if not any(word in c.name.lower() for word in (_TEXT_WORD, _VAE_WORD))]
        return named[0] if len(named) == 1 else _INDEX
    return _INDEX


def _loose(root: Path) -> tuple[Candidate, ...]:
    """The checkpoints that lie in the directory itself."""
    try:
        return look_into(str(root), by_content=False).candidates
    except FileNotFoundError:
        return ()


def _boundary(root: Path) -> Any:
    return _read_json(root / "model_index.json").get("boundary_ratio")


def _missing_parts(root: Path, path: Path, index: str) -> list[str]:
    """Files that the config or the index of a part promises and that are not there."""
    if not path.is_dir():
        return [f"{path.relative_to(root)}/"]
    missing = [] if (path / "config.json").exists() else [str((path / "config.json").relative_to(root))]
    found = look_into(str(path), by_content=False).candidates
    found = tuple(c for c in found if c.name == index) or (() if path == root else found)
    for candidate in found:
        if candidate.is_damaged_index and candidate.problem is not None:
            raise candidate.problem
        missing += sorted(str((path / name).relative_to(root)) for name in candidate.missing)
    return missing if found else [*missing, str((path / index).relative_to(root))]


def _missing_tokenizer(root: Path, path: Path) -> list[str]:
    names = ("tokenizer.json", "tokenizer_config.json")
    return [str((path / name).relative_to(root)) for name in names if not (path / name).exists()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES} bytes: not a configuration")
    return parse_object(text, path=str(path), what="the file")
