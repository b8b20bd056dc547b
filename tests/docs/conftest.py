"""A directory in which everything lies that the pages name, as small as it can be, and programs that are run there."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parents[2]

MY_MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(config), nn.Linear(config, config)) for _ in range(3))
        self.norm2 = nn.LayerNorm(config)
        self.head = nn.Linear(config, 2048)

    def forward(self, x):
        x = x.to(self.head.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm2(x.to(self.norm2.weight.dtype)).to(x.dtype))


config = 16
"""


class Place:
    """The directory, and how its programs run: without a GPU, with caches and servers of their own."""

    def __init__(self, directory, python):
        self.directory, self.python = directory, python
        self.runtime = Path(tempfile.mkdtemp(prefix="docs-"))  # short: it is part of a socket's name
        self.runtime.chmod(0o700)
        self.env = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "200",
            "PET_MASTER_PORT": str(_free_port()),  # torchrun's own is the same for all
        }

    def run(self, *words, modules=programs.PIPELINE, timeout=200, **options):
        """Run `python` with words in a fork of the zygote, and so what that starts; return how it ended: well."""
        env = {**self.env, "PYTHON_EXEC": str(self.python), **options.pop("env", {})}
        return _well(programs.run(*words, env=env, cwd=self.directory, modules=modules, timeout=timeout, **options))

    def run_itself(self, *words, timeout=200, **env):
        """Run `python` with words as a process of its own."""
        env = {name: value for name, value in (os.environ | self.env | env).items() if value}
        command = [sys.executable, *map(str, words)]
        nothing = subprocess.DEVNULL
        return _well(
            subprocess.run(
                command, env=env, cwd=self.directory, stdin=nothing, capture_output=True, text=True, timeout=timeout
            )
        )


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _well(done):
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def place(tmp_path_factory, python_that_forks):
    """The place, with checkpoints in all forms."""
    pytest.importorskip("diffusers")
    import torch
    from safetensors.torch import save_file

    from wan_pipeline.synth import synth

    here = tmp_path_factory.mktemp("docs")
    synth(here / "Wan2.2-T2V-A14B")
    synth(here / "Wan2.2-T2V-A14B-Diffusers", layout="diffusers")
    synth(here / "ComfyUI" / "models", form="comfy")
    gguf = synth(here / "gguf", form="gguf").directory
    for noise in ("high", "low"):
        (file,) = gguf.rglob(f"*{noise}*.gguf")
        file.rename(here / f"{noise}-Q4_K_M.gguf")
    (here / "my_model.py").write_text(MY_MODEL)
    shutil.copy(ROOT / "examples" / "official_order.py", here / "generate.py")

    names = {}
    exec(MY_MODEL, names)
    state = names["Model"](names["config"]).state_dict()
    (here / "checkpoint").mkdir()
    for path in (here / "model.safetensors", here / "checkpoint" / "model.safetensors"):
        save_file(state, path)
    torch.save(state, here / "weights.pth")
    place = Place(here, python_that_forks(programs.PIPELINE))
    yield place
    for what in (("standby", "keep", "stop"), ("standby", "stop")):
        subprocess.run(
            [sys.executable, "-m", "wan_loader", *what], env=os.environ | place.env, capture_output=True, check=False
        )
    shutil.rmtree(place.runtime, ignore_errors=True)
