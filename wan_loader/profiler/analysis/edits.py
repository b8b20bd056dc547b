"""What to write in the place of a line of a program: a call of a library, rewritten as one of ours. Pure.

Only text is looked at. What cannot be rewritten with certainty (other arguments, a call across what is no plain
statement) is left: there is then no edit.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Edit", "converted_load", "first_lines"]

#: Statements before which a line may be put.
_PLAIN = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
_LOADS = {"load_file": ("filename", "device"), "load": ("f", "map_location")}


@dataclass(frozen=True, slots=True)
class Edit:
    """Lines of a file, and what takes their place."""

    path: str
    line: int
    """The first of them, counted from 1."""
    text: str
    """The lines as they are."""
    replacement: str


@dataclass(frozen=True, slots=True)
class _Found:
    """A call in a statement of a program."""

    call: ast.Call
    statement: ast.stmt
    lines: Sequence[str]
    source: str

    def segment(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.source, node) or ""

    @property
    def indent(self) -> str:
        line = self.lines[self.statement.lineno - 1]
        return line[: len(line) - len(line.lstrip())]

    @property
    def text(self) -> str:
        return "\n".join(self.lines[self.statement.lineno - 1 : self.statement.end_lineno])

    def edit(self, path: str, new: Sequence[str]) -> Edit:
        return Edit(path, self.statement.lineno, self.text, "\n".join(self.indent + line for line in new))


def converted_load(source: str, path: str, line: int, dtype: str) -> Edit | None:
    """Rewrite the load in a line as one that converts, and keeps the converted copy.

    Args:
        source: The program.
        path: The file that it is in.
        line: A line of the call: `load_file`, `torch.load`, or `from_pretrained` of a model of diffusers.
        dtype: What the program converts the tensors to, as "bf16".
    """
    found = _call_at(source, line)
    if found is None:
        return None
    name = _name(found.call)
    if name == "from_pretrained":
        return _pretrained(found, path, dtype)
    arguments = _arguments(found, *_LOADS[name]) if name in _LOADS else None
    if arguments is None:
        return None
    call = f'wan_loader.load_file({", ".join(arguments)}, dtype="{dtype}", cache=True)'
    old = found.segment(found.call)
    if "\n" in old or found.text.count(old) != 1:
        return None
    new = found.text.replace(old, call).splitlines()
    return found.edit(path, ["import wan_loader", *(row.removeprefix(found.indent) for row in new)])


def first_lines(source: str, path: str, new: Sequence[str]) -> Edit | None:
    """Put lines before the first import of a program; None where that is not at its top level."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    for node in body:
        futures = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not futures:
            text = source.splitlines()[node.lineno - 1]
            return Edit(path, node.lineno, text, "\n".join([*new, text]))
    return None


def _call_at(source: str, line: int) -> _Found | None:
    """Find the innermost call of a load in a line, in a statement that stands alone in its lines."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or n.lineno)]
    statement = max(around, key=lambda n: (n.lineno, n.col_offset), default=None)
    if not isinstance(statement, _PLAIN):
        return None
    known = (*_LOADS, "from_pretrained")
    calls = [n for n in ast.walk(statement) if isinstance(n, ast.Call) and _name(n) in known]
    lines = source.splitlines()
    if len(calls) != 1 or lines[statement.lineno - 1][: statement.col_offset].strip():
        return None
    return _Found(calls[0], statement, lines, source)


def _name(call: ast.Call) -> str:
    function = call.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def _arguments(found: _Found, subject: str, device: str) -> list[str] | None:
    """Return the arguments of a load as ours takes them; None if there are others than path and device."""
    call = found.call
    given = dict(zip((subject, device), call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg in (subject, device):
            given[keyword.arg] = keyword.value
        elif keyword.arg not in ("weights_only", "mmap"):
            return None
    if len(call.args) > 2 or subject not in given:
        return None
    where = [found.segment(given[device])] if device in given else []
    return [found.segment(given[subject]), *(f"device={w}" for w in where)]


def _pretrained(found: _Found, path: str, dtype: str) -> Edit | None:
    """Rewrite `model = Class.from_pretrained(directory, torch_dtype=...)`."""
    call, statement = found.call, found.statement
    if not (isinstance(statement, ast.Assign) and statement.value is call and len(statement.targets) == 1):
        return None
    if not isinstance(call.func, ast.Attribute) or len(call.args) != 1:
        return None
    if any(keyword.arg not in ("torch_dtype", "dtype") for keyword in call.keywords):
        return None
    target, owner = found.segment(statement.targets[0]), found.segment(call.func.value)
    directory = found.segment(call.args[0])
    keep = f"keep_fp32={owner}._keep_in_fp32_modules or []"
    new = [
        "import wan_loader",
        "with wan_loader.empty_weights():",
        f"    {target} = {owner}.from_config({owner}.load_config({directory})).eval()",
        f'wan_loader.load_into({target}, {directory}, device="cpu", dtype="{dtype}", {keep}, cache=True)',
    ]
    return found.edit(path, new)
