"""Lines of programs, rewritten: only what is certain, and what results is Python."""

import ast
import textwrap

import pytest

from wan_loader.profiler.analysis.edits import converted_load, first_lines


def rewritten(source, line=None):
    source = textwrap.dedent(source)
    line = line or next(i for i, row in enumerate(source.splitlines(), 1) if "load" in row or "pretrained" in row)
    edit = converted_load(source, "a.py", line, "bf16")
    if edit is None:
        return None
    rows = source.splitlines()
    height = len(edit.text.splitlines())
    assert "\n".join(rows[edit.line - 1 : edit.line - 1 + height]) == edit.text
    new = "\n".join([*rows[: edit.line - 1], edit.replacement, *rows[edit.line - 1 + height :]])
    ast.parse(new)
    return edit.replacement


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ('w = load_file("a.safetensors")', 'w = wan_loader.load_file("a.safetensors", '),
        ("w = st.load_file(path, 'cuda')", "w = wan_loader.load_file(path, device='cuda', "),
        ("w = load_file(path, device=d)", "w = wan_loader.load_file(path, device=d, "),
        ("w = torch.load(p, weights_only=True)", "w = wan_loader.load_file(p, "),
        ("w = torch.load(p, map_location='cpu')", "w = wan_loader.load_file(p, device='cpu', "),
        ("net.load_state_dict(load_file(p))", "net.load_state_dict(wan_loader.load_file(p, "),
        ("w: dict = load_file(f(x)[0])", "w: dict = wan_loader.load_file(f(x)[0], "),
    ],
)
def test_loads(line, call):
    found = rewritten(line)
    assert found.splitlines()[0] == "import wan_loader"
    assert found.splitlines()[1].startswith(call + 'dtype="bf16", cache=True)')


def test_indentation_and_several_lines():
    source = """
    def f(p):
        if p:
            net.load_state_dict(
                load_file(p),
                strict=False,
            )
    """
    assert rewritten(source, 5) == (
        "        import wan_loader\n"
        "        net.load_state_dict(\n"
        '            wan_loader.load_file(p, dtype="bf16", cache=True),\n'
        "            strict=False,\n"
        "        )"
    )


def test_from_pretrained():
    found = rewritten("model = m.Net.from_pretrained(directory, torch_dtype=torch.bfloat16)")
    assert "model = m.Net.from_config(m.Net.load_config(directory)).eval()" in found
    assert 'wan_loader.load_into(model, directory, device="cpu", dtype="bf16"' in found


@pytest.mark.parametrize(
    "line",
    [
        "w = load_file(path, backend='mmap')",
        "w = torch.load(p, pickle_module=dill)",
        "w = torch.load()",
        "w, v = load_file(a), load_file(b)",
        "x = 1; w = load_file(a)",
        "if load_file(a): pass",
        "w = load_file(",
        "model = Net.from_pretrained(d, variant='fp16')",
        "model = Net.from_pretrained(d).to('cuda')",
        "w = json.loads(text)",
    ],
)
def test_what_is_not_certain_is_left(line):
    assert rewritten(line, 1) is None


def test_lines_before_the_first_import():
    source = '"""A program."""\nfrom __future__ import annotations\nimport torch\n'
    edit = first_lines(source, "a.py", ["import wan_loader"])
    assert (edit.line, edit.text, edit.replacement) == (3, "import torch", "import wan_loader\nimport torch")
    assert first_lines("def f(): import torch", "a.py", ["x"]) is None
    assert first_lines("def f(", "a.py", ["x"]) is None
