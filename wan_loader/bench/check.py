"""Comparison of what a loader gave with what safetensors or torch itself reads. Outside every clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.dtypes import FLOATING, torch_dtype
from wan_loader.formats import open_checkpoint
from wan_loader.verify import reference_tensors, same_bits

if TYPE_CHECKING:
    from wan_loader.bench.contract import LoadTask, Outcome

__all__ = ["compare_tensors"]


def compare_tensors(task: LoadTask, outcome: Outcome) -> tuple[int, list[str]]:
    """Compare what a loader gave: names, dtypes, shapes, bits.

    A tensor must equal `.to(dtype)` of the reference. A module may keep tensors in their file's dtype or in float32
    and have them under more names than the file; such names are not compared. Holds one reference tensor at a time.

    Returns:
        How many tensors were compared, and what is wrong with them.
    """
    checkpoint = open_checkpoint(list(task.files))
    wanted = {t.name: t for t in checkpoint.tensors}
    problems: dict[str, list[str]] = {}
    compared = 0
    for name, reference in reference_tensors(checkpoint):
        if name not in wanted:
            continue
        actual = outcome.tensors.get(name)
        facts = wanted.pop(name)
        if actual is None:
            problems.setdefault("missing", []).append(name)
            continue
        target = torch_dtype(task.dtype if task.dtype and facts.dtype in FLOATING else facts.dtype)
        allowed = {target, torch_dtype(facts.dtype), torch_dtype("float32")} if outcome.is_module else {target}
        compared += 1
        if actual.dtype not in allowed:
            problems.setdefault(f"not {target}", []).append(name)
        elif tuple(actual.shape) != facts.shape:
            problems.setdefault("of another shape", []).append(name)
        # converted where it is compared: GPU and CPU round alike, and it is the quicker one
        elif not same_bits(actual, reference.to(actual.device).to(actual.dtype)):
            problems.setdefault("of other bits", []).append(name)
    known = {t.name for t in checkpoint.tensors}
    if not outcome.is_module and (extra := sorted(set(outcome.tensors) - known)):
        problems["not in the file"] = extra
    if outcome.is_module and compared:
        problems.pop("missing", None)  # a module may hold them under its own names
    return compared, [f"{len(names)} tensors {what}, such as {min(names)!r}" for what, names in problems.items()]
