"""What the fast path would leave out of a program's start: what speaks for it, and what remains. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.profiler.analysis.case import cold_share, in_gb, scaled
from wan_loader.sizes import format_seconds
from wan_loader.verdict import ideal_seconds

if TYPE_CHECKING:
    from wan_loader.events import Span
    from wan_loader.profiler.analysis.case import Case
    from wan_loader.profiler.analysis.remedies import Part

__all__ = ["spared"]

#: Initialisations of fewer bytes do not wait under the fast path.
_INIT_BYTES = 64 << 20
_DRAWN_AT_ONCE = ("trunc", "orthogonal", "sparse")


def spared(c: Case) -> list[tuple[str, dict[Part, float]]]:
    """Find what the fast path would leave out: each with what speaks for it, and what remains."""
    if c.evidence.kind != "program" or c.program.is_ours:
        return []
    found = (_initialisation(c), _one_plan(c) if c.evidence.cuda else _mapped(c))
    return [one for one in found if one is not None]


def _initialisation(c: Case) -> tuple[str, dict[Part, float]] | None:
    """Find random numbers that are overwritten, and would wait until then."""
    e, seconds = c.evidence, c.evidence.blame.get("random_init", 0.0)
    if not seconds or not (e.nbytes_file or "assign" in e.phases):
        return None
    spans = [s for s in e.of_phase("random_init") if s.nbytes]
    nbytes = sum(s.nbytes for s in spans)
    waiting = sum(s.nbytes for s in spans if s.nbytes >= _INIT_BYTES and not _is_drawn_at_once(s))
    if not waiting:
        return None
    why = f"{in_gb(nbytes)} were filled with random numbers in {seconds:.2f} s, and weights are loaded over them"
    return why, scaled(c.seconds("random_init"), 1 - waiting / nbytes)


def _is_drawn_at_once(span: Span) -> bool:
    return any(word in getattr(span, "label", "") for word in _DRAWN_AT_ONCE)


def _mapped(c: Case) -> tuple[str, dict[Part, float]] | None:
    """Find copies in host memory that a mapping of the file makes needless."""
    e = c.evidence
    copies = {p: s for p, s in c.seconds("h2d").items() if p.label == "copy in host memory" and "assign" in e.phases}
    reads = {p: s for p, s in c.seconds("read").items() if p.label == "torch.load"}
    if e.storage.get("network") or str(e.storage.get("filesystem", "")).startswith(("overlay", "fuse")):
        reads = {}
    rate, share = e.ceilings.get("page_cache_gbps"), cold_share(e)
    nbytes = sum(row[2] for row in e.labels("read") if row[0] == "torch.load")
    leaves = dict.fromkeys(copies, 0.0)
    if rate and reads:
        # what is in the page cache is only mapped, and its pages are touched later
        touched_s = nbytes * (1 - share) / rate / 1e9 / 2
        leaves |= scaled(reads, share + touched_s / sum(reads.values()))
    if not leaves:
        return None
    seconds = sum(s for part, s in c.parts.items() if part in leaves)
    return f"copies of files into memory took {seconds:.2f} s: they are mapped instead", leaves


def _one_plan(c: Case) -> tuple[str, dict[Part, float]] | None:
    """Find reading, converting and copying to a GPU one after the other, where all may go on at the same time."""
    e, moved = c.evidence, c.seconds("read", "cast", "h2d")
    seconds = sum(moved.values())
    to_device = sum(s.nbytes for s in e.of_phase("h2d") if "host to" in getattr(s, "label", ""))
    to_device += sum(s.nbytes for s in e.of_phase("cast") if "host to" in getattr(s, "label", ""))
    if not to_device:
        return None
    known = [ideal_seconds(e, name) for name in ("read", "h2d", "cast")]
    ideal = max(
        (e.blame.get(name, 0.0) if best is None else best)
        for name, best in zip(("read", "h2d", "cast"), known, strict=True)
    )
    if not seconds or ideal >= seconds:
        return None
    parts = ", ".join(
        f"{name} {format_seconds(e.blame[name])}" for name in ("read", "cast", "h2d") if e.blame.get(name)
    )
    why = f"reading, converting and copying took turns ({parts}): at the same time they take {ideal:.2f} s"
    return why, scaled(moved, ideal / seconds)
