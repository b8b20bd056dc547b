"""The manifest of an entry: which source it was made from, its files, and a checksum for every block of them.

The manifest carries a checksum of its own. It is untrusted like any file: strictly read, with caps; what is wrong with
it is a `CacheError`, and the entry is then not used.

Blocks end at multiples of `BLOCK_BYTES` of the file; the header of a safetensors file, up to the first tensor, is a
block of its own. So the blocks are what a load of everything reads at once, and can be checked while they pass.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from wan_loader.cache.outline import FORMAT_VERSION, SourceIdentity
from wan_loader.documents import Doc, DocumentError
from wan_loader.errors import CacheError, CheckpointError, NewerFormatError
from wan_loader.formats.strict_json import parse_object

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

__all__ = ["BLOCK_BYTES", "MANIFEST_NAME", "EntryFile", "Manifest", "digest", "parse_manifest"]

BLOCK_BYTES = 16 << 20
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 100_000_000
#: How far the clock of a file server may be ahead of ours.
_CLOCKS_DIFFER_S = 2.0


def digest(block: Any) -> str:
    """Return the checksum of a block: XXH3, 128 bits. Finds accidents, not forgers; releases the interpreter lock."""
    return xxhash.xxh3_128_hexdigest(block)


@dataclass(frozen=True, slots=True)
class EntryFile:
    """One file of an entry."""

    path: str
    """The path relative to the entry, with `/`."""
    nbytes: int
    header_nbytes: int
    """The place where the first tensor begins; 0 in files that hold none."""
    blocks: tuple[str, ...]
    """Checksums of the blocks, in order."""
    mtime_ns: int | None = None
    """The moment when it was last written to, once it was complete; None if the version that wrote it did not say."""
    ctime_ns: int | None = None
    """The moment when anything about it last changed, which no program can set."""

    def was_touched(self, st: os.stat_result, created: float) -> bool:
        """Tell whether a file was written to since; `created` is when its manifest was."""
        if self.mtime_ns is None:
            # an older version left no times: only a file that is younger than its manifest was surely touched
            return st.st_mtime > created + _CLOCKS_DIFFER_S
        return st.st_mtime_ns != self.mtime_ns

    def is_as_left(self, st: os.stat_result) -> bool:
        """Tell whether nothing about a file changed, as far as it is known.

        A mode or an owner may have changed; so may an mtime that was put back.
        """
        return self.ctime_ns in (None, st.st_ctime_ns)

    @property
    def n_blocks(self) -> int:
        """The number of blocks that a file of this size has."""
        if self.nbytes <= self.header_nbytes:
            return 1 if self.header_nbytes else 0
        data = -(-self.nbytes // BLOCK_BYTES) - self.header_nbytes // BLOCK_BYTES
        return data + (1 if self.header_nbytes else 0)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield start and end of each block."""
        start = 0
        if self.header_nbytes:
            yield 0, self.header_nbytes
            start = self.header_nbytes
        while start < self.nbytes:
            end = min(self.nbytes, (start // BLOCK_BYTES + 1) * BLOCK_BYTES)
            yield start, end
            start = end


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The statements of an entry about itself."""

    key: str
    label: str
    dtype: str | None
    created: float
    """Seconds since the epoch."""
    sources: tuple[SourceIdentity, ...]
    files: tuple[EntryFile, ...]
    contents: tuple[str, ...] = ()
    """Checksums of the source files' contents, where they were asked for."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(f.nbytes for f in self.files)

    def to_bytes(self) -> bytes:
        """Return the document, with its own checksum."""
        body = {"format_version": FORMAT_VERSION, **asdict(self)}
        body["files"] = [{k: v for k, v in file.items() if v is not None} for file in body["files"]]
        return json.dumps({**body, "digest": _body_digest(body)}, indent=1).encode()


def _body_digest(body: dict[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True).encode())


def parse_manifest(text: bytes, path: str) -> Manifest:
    """Read a manifest.

    Args:
        text: The document.
        path: Its name in errors.

    Raises:
        NewerFormatError: A newer version of this program wrote it.
        CacheError: It is anything else but a sound one of this version.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise CacheError.because(f"is larger than {MAX_MANIFEST_BYTES} bytes: not a manifest", path=path)
    try:
        body = parse_object(text, path=path, what="the manifest", holds_paths=True)
    except CheckpointError as error:
        raise CacheError(str(error), path=path, reason=error.reason, remedy=error.remedy) from None
    if (version := body.pop("format_version", None)) != FORMAT_VERSION:
        kind = NewerFormatError if type(version) is int and version > FORMAT_VERSION else CacheError
        raise kind.because(f"has format version {version!r}, this program knows {FORMAT_VERSION}", path=path)
    # over the parsed object: the text itself holds the checksum
    said = body.pop("digest", None)
    if said != _body_digest({"format_version": FORMAT_VERSION, **body}):
        raise CacheError.because("does not match its own checksum: damaged", path=path)
    try:
        manifest = _typed(Doc(body))
    except DocumentError as error:
        raise CacheError.because(f"is no manifest ({error}): damaged or foreign", path=path) from None
    # spaces, order of keys, other spellings of a number: whatever the checksum of the object does not see
    if manifest.to_bytes() != text:
        raise CacheError.because("is not as it was written: damaged", path=path)
    for file in manifest.files:
        if not is_plain(file.path):
            raise CacheError.because(
                f"names {file.path!r}, which is not inside the entry: damaged or foreign", path=path
            )
        if file.header_nbytes > file.nbytes or len(file.blocks) != file.n_blocks:
            raise CacheError.because(
                f"has {len(file.blocks)} checksums of {file.path}, not one for each block: damaged", path=path
            )
    return manifest


def _typed(doc: Doc) -> Manifest:
    return Manifest(
        key=doc.text("key"),
        label=doc.text("label"),
        dtype=doc.optional_text("dtype"),
        created=doc.number("created"),
        sources=tuple(_source_identity(file) for file in doc.docs("sources")),
        files=tuple(_entry_file(file) for file in doc.docs("files")),
        contents=doc.texts("contents"),
    )


def _source_identity(doc: Doc) -> SourceIdentity:
    facts = (doc.whole(name) for name in ("nbytes", "mtime_ns", "ctime_ns", "inode"))
    return SourceIdentity(doc.text("path"), *facts)


def _entry_file(doc: Doc) -> EntryFile:
    return EntryFile(
        doc.text("path"),
        doc.whole("nbytes"),
        doc.whole("header_nbytes"),
        doc.texts("blocks"),
        doc.optional_whole("mtime_ns"),
        doc.optional_whole("ctime_ns"),
    )


def is_plain(path: str) -> bool:
    """Tell whether a relative path stays inside its directory."""
    parts = path.split("/")
    return path.isprintable() and len(parts) <= 4 and all(p not in ("", ".", "..") for p in parts)
