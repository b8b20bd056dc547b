"""What a user's type checker sees: both packages are typed, and the public functions say what they take."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import torch
import wan_loader
from wan_pipeline import WanT2V

tensors: dict[str, torch.Tensor] = wan_loader.load_file("model.safetensors", device="cuda", dtype="bf16")
result: wan_loader.LoadResult = wan_loader.load("model.safetensors", {keyword}=True)
pipe: WanT2V = WanT2V.from_checkpoint("model")
"""


@pytest.mark.parametrize(("keyword", "error"), [("cache", None), ("cached", 'Unexpected keyword argument "cached"')])
def test_a_misspelt_keyword_is_an_error(tmp_path, keyword, error):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(keyword=keyword))
    # with the project's own settings, and so with what checking the project has left in the cache
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--no-error-summary", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=ROOT)
    assert (done.stdout == "") if error is None else (error in done.stdout), done.stdout


def test_the_version_has_one_source():
    import wan_loader

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert wan_loader.__version__ in (ROOT / settings["tool"]["hatch"]["version"]["path"]).read_text()
