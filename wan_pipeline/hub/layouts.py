"""The two layouts in which models are published: which files text-to-video needs, and which of them are missing.

    native      a directory of shards for each expert (one transformer: shards at the root), text encoder and VAE as
                .pth, google/umt5-xxl/
    diffusers   model_index.json and a directory for each component

What the files of each model are called, `families` says. Works on names, and reads small JSON files only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from wan_loader import CheckpointError
from wan_loader.formats import look_into, parse_object
from wan_pipeline.families import FAMILIES
from wan_pipeline.model_family import Layout

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from wan_loader.formats import Candidate
    from wan_pipeline.model_family import ComponentName, ModelFamily, Network

__all__ = [
    "REPOSITORIES",
    "Layout",
    "family_of",
    "is_native",
    "layout_of",
    "layouts_in",
    "missing_files",
    "parts_of",
    "wanted_files",
]

#: Where each layout of T2V-A14B is published.
REPOSITORIES = FAMILIES[0].repositories
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_MAX_JSON_BYTES = 10_000_000


def _each(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


_NETWORKS = [network for family in FAMILIES for network in family.networks]
_EXPERTS = [network for network in _NETWORKS if network.kind == "dit"]
_EXPERT_DIRS = _each(network.native for network in _EXPERTS if network.native)
_TEXT_FILES = _each(n.native for n in _NETWORKS if n.kind == "text_encoder")
_VAE_FILES = _each(n.native for n in _NETWORKS if n.kind == "vae")
_WORDS = _each(n.native_word for n in _NETWORKS if n.native_word)
_TOKENIZERS = _each(family.tokenizer["native"] for family in FAMILIES)


def _any(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


_TRANSFORMER_FILE = r"(config\.json|diffusion_pytorch_model[^/]*\.safetensors(\.index\.json)?)"
_NATIVE = re.compile(
    rf"(({_any(_EXPERT_DIRS)})/{_TRANSFORMER_FILE}|{_any((*_TEXT_FILES, *_VAE_FILES))}|({_any(_TOKENIZERS)})/[^/]+)"
)
_NATIVE_AT_ROOT = re.compile(rf"({_TRANSFORMER_FILE}|{_NATIVE.pattern})")
_COMPONENTS = (*_each(n.name for n in _NETWORKS), "scheduler", *_each(f.tokenizer["diffusers"] for f in FAMILIES))
_DIFFUSERS = re.compile(rf"(model_index\.json|({_any(_COMPONENTS)})/[^/]+\.(json|safetensors|model|txt))")


def layouts_in(names: Iterable[str]) -> tuple[Layout, ...]:
    """Name the layouts that a listing of files holds."""
    held = set(names)
    found: list[Layout] = []
    if any(n.split("/")[0] in _EXPERT_DIRS or n in _VAE_FILES for n in held) and "model_index.json" not in held:
        found.append("native")
    if "model_index.json" in held:
        found.append("diffusers")
        if any(name.split("/")[0] in _EXPERT_DIRS for name in held):
            found.append("native")
    return tuple(found)


def wanted_files(names: Iterable[str], layout: Layout) -> tuple[str, ...]:
    """Return those of the files that text-to-video needs: weights, indexes, configurations, tokenizer."""
    held = list(names)
    if layout == "diffusers":
        pattern = _DIFFUSERS
    else:
        pattern = _NATIVE if any(name.startswith(_EXPERT_DIRS) for name in held) else _NATIVE_AT_ROOT
    return tuple(name for name in held if pattern.fullmatch(name))


def layout_of(root: Path) -> Layout | None:
    """Find the layout of a model's directory, complete or not; None for any other, such as one component's."""
    if (root / "model_index.json").exists():
        return "diffusers" if _is_wan(root) else None
    loose = sum((root / name).exists() for name in (*_TEXT_FILES, *_VAE_FILES))
    # one such file alone may lie anywhere
    if loose > 1 or any((root / name).is_dir() for name in (*_EXPERT_DIRS, *_TOKENIZERS)):
        return "native"
    return None


def is_native(root: Path) -> bool:
    """Return True if a directory holds anything of a model in the native layout."""
    return any((root / name).exists() for name in (*_EXPERT_DIRS, *_TEXT_FILES, *_VAE_FILES))


def family_of(root: Path, layout: Layout, among: Sequence[ModelFamily] = FAMILIES) -> ModelFamily:
    """Find the model that a directory holds, complete or not: the one for which most of what is there speaks.

    Args:
        root: The directory.
        layout: Its layout.
        among: The models that it may be.

    Raises:
        CheckpointError: Its model_index.json is damaged.
    """
    if layout == "diffusers":
        index, config = _read_json(root / "model_index.json"), _some_config(root / "transformer")
        return max(among, key=lambda family: _likeness(family, index, config))  # the first of equal ones
    loose = [c.name for c in _loose(root)]
    speaks = {family: _named_here(root, family, loose) for family in among}
    likely = [family for family in among if speaks[family] == max(speaks.values())]
    if len(likely) > 1:  # only then: what is read lies in the page cache, which `warm` measures
        configs = {n.native: _some_config(root / n.native) for n in _EXPERTS}
        likely.sort(key=lambda family: _likeness_native(family, configs), reverse=True)
    return likely[0]


def _likeness(family: ModelFamily, index: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return what speaks for a model, the weightiest first: how many experts, on what they work, how large they are."""
    return (
        (index.get("boundary_ratio") is None) == (family.boundary_ratio is None),
        config.get("in_channels") == family.sizes.channels,
        index.get("expand_timesteps") is family.expand_timesteps,
        config.get("num_layers") == family.sizes.layers,
    )


def _named_here(root: Path, family: ModelFamily, loose: Sequence[str]) -> int:
    """Return how much the names of files speak for a model, that of the VAE above all."""
    has_vae = any(_is_there(root, network, loose) for network in family.networks if network.kind == "vae")
    has_expert = any(_is_there(root, network, loose) for network in family.experts)
    return 2 * has_vae + has_expert


def _likeness_native(family: ModelFamily, configs: Mapping[str, Mapping[str, Any]]) -> tuple[bool, ...]:
    """Return what speaks for a model, as `_likeness`, where the files of several are called alike."""
    config = configs[family.experts[0].native]
    return config.get("in_dim") == family.sizes.channels, config.get("num_layers") == family.sizes.layers


def _is_there(root: Path, network: Network, loose: Sequence[str]) -> bool:
    """Return True if something of a network is there, under a name that tells whose it is, also among `loose` files."""
    if not network.native:
        return (root / _INDEX).exists() or any(map(_is_transformer, loose))
    if (root / network.native).exists():
        return True
    mark = re.compile(network.native_mark, re.IGNORECASE)
    return bool(network.native_mark) and any(mark.search(n) and network.native_word in n.lower() for n in loose)


def _some_config(path: Path) -> dict[str, Any]:
    """Read a network's configuration; empty where there is none that can be read, which is reported elsewhere."""
    try:
        return _read_json(path / "config.json")
    except CheckpointError:
        return {}


def parts_of(root: Path, layout: Layout, family: ModelFamily | None = None) -> dict[ComponentName, str]:
    """Map each part that holds weights to its file or directory below the root, in the order of first use."""
    family = family or family_of(root, layout)
    if layout == "diffusers":
        return {network.name: network.name for network in family.networks}
    return {network.name: _native_part(root, network) for network in family.networks}


def _native_part(root: Path, network: Network) -> str:
    if network.kind != "dit":
        return _called(root, network.native, network.native_word)
    return network.native or _transformer_file(root)


def missing_files(
    root: Path, layout: Layout, family: ModelFamily | None = None, given: Collection[str] = ()
) -> list[str]:
    """List the files that a complete checkpoint has and that are not there.

    Args:
        root: The directory.
        layout: Its layout.
        family: The model; None is the one that it looks like.
        given: Parts that lie elsewhere: networks as diffusers calls them, and "tokenizer".

    Returns:
        Paths relative to `root`; those of directories end in a slash.

    Raises:
        CheckpointError: An index or a configuration is damaged.
    """
    family = family or family_of(root, layout)
    parts = parts_of(root, layout, family)
    wanted = [network for network in family.networks if network.name not in given]
    tokenizer = [] if "tokenizer" in given else _missing_tokenizer(root, root / family.tokenizer[layout])
    missing: list[str] = []
    if layout == "native":
        missing += [parts[n.name] for n in wanted if n.kind != "dit" and not (root / parts[n.name]).exists()]
        for network in wanted:
            if network.kind == "dit":
                index = _INDEX if network.native else parts[network.name]
                missing += _missing_parts(root, root / network.native, index)
        return missing + tokenizer
    for network in wanted:
        index = "model.safetensors.index.json" if network.kind == "text_encoder" else _INDEX
        missing += _missing_parts(root, root / network.name, index)
    missing += tokenizer
    scheduler = "scheduler/scheduler_config.json"
    return missing if (root / scheduler).exists() else [*missing, scheduler]


def _is_wan(root: Path) -> bool:
    """Return True if a diffusers model is one of WAN's, as far as its index tells."""
    try:
        kind = _read_json(root / "model_index.json").get("_class_name")
    except CheckpointError:  # reported as missing or damaged
        return True
    return not isinstance(kind, str) or kind.startswith("Wan")


def _called(root: Path, usual: str, word: str) -> str:
    """Return the name of a file: the usual one or, where that is not there, the only one with the word in it."""
    if not (root / usual).exists():
        named = [c.name for c in _loose(root) if word in c.name.lower()]
        return named[0] if len(named) == 1 else usual
    return usual


def _transformer_file(root: Path) -> str:
    """Return the index of a transformer at the root, else the only checkpoint that is no other part."""
    if not (root / _INDEX).exists():
        named = [c.name for c in _loose(root) if _is_transformer(c.name)]
        return named[0] if len(named) == 1 else _INDEX
    return _INDEX


def _is_transformer(name: str) -> bool:
    """Return True if a file is no other part, by its name."""
    return not any(word in name.lower() for word in _WORDS)


def _loose(root: Path) -> tuple[Candidate, ...]:
    """Find the checkpoints that lie in the directory itself."""
    try:
        return look_into(str(root), by_content=False).candidates
    except FileNotFoundError:
        return ()


def _missing_parts(root: Path, path: Path, index: str) -> list[str]:
    """List the files that the config or the index of a part promises and that are not there."""
    if not path.is_dir():
        return [f"{path.relative_to(root)}/"]
    missing = [] if (path / "config.json").exists() else [str((path / "config.json").relative_to(root))]
    found = look_into(str(path), by_content=False).candidates
    # without an index, all in a directory of its own is one part; at the root lie others, too
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
        raise CheckpointError.because(f"cannot be read: {error.strerror}", path=path) from error
    if len(text) > _MAX_JSON_BYTES:
        raise CheckpointError.because(f"is larger than {_MAX_JSON_BYTES} bytes: not a configuration", path=path)
    return parse_object(text, path=str(path), what="the file")
