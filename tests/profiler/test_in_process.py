"""`with wan_loader.profile()`: a block of this process, and nothing that stays behind."""

import builtins
import importlib._bootstrap_external as machinery
import io
import os
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

import wan_loader
from wan_loader.errors import OptionError
from wan_loader.loading.load_session import LoadSession

OWNERS = (
    builtins,
    io,
    os,
    torch,
    torch.Tensor,
    torch.nn.Module,
    torch.nn.Linear,
    torch.nn.init,
    torch.cuda,
    torch.distributed,
    torch.storage._StorageBase,
    safetensors,
    safetensors.torch,
    machinery.SourceFileLoader,
    machinery._LoaderBasics,
    machinery.ExtensionFileLoader,
    LoadSession,
)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"w{i}": torch.ones(1 << 20) for i in range(4)}, path)
    return path


def attributes():
    return [dict(vars(owner)) for owner in OWNERS]


def test_what_happens_in_the_block_is_recorded_and_no_patch_stays(weights, capsys):
    load_file(weights)
    before, fds = attributes(), len(os.listdir("/proc/self/fd"))
    with wan_loader.profile() as p:
        assert repr(p) == "Profile(running)"
        tensors = load_file(weights)
        halves = [t.to(torch.bfloat16) for t in tensors.values()]

        class Later(torch.nn.Linear):
            def __init__(self):
                super().__init__(300, 300)

        Later()
        with open(weights, "rb") as file:
            file.read()
        wan_loader.load_file(weights)
        subprocess.run([sys.executable, "-c", "import time; time.sleep(0.3)"], check=True)
    for owner, was, now in zip(OWNERS, before, attributes(), strict=True):
        changed = [name for name in was.keys() | now.keys() if was.get(name) is not now.get(name)]
        assert not [name for name in changed if not name.startswith(("_abc", "__abstract"))], owner
    assert not hasattr(Later.__init__, "__wrapped__")
    assert len(os.listdir("/proc/self/fd")) <= fds
    assert len(halves) == 4
    spans = p.session.processes[p.session.subject].spans
    assert {s.name for s in spans} >= {"construct", "cast", "read"}
    assert {s.label for s in spans} >= {"open().read", "wan_loader"}
    assert list(p.session.processes[p.session.subject].facts["files"]) == [str(weights)]
    assert len(p.session.processes) >= 2, "what the block started is there"
    p.report()
    assert "verdict" in capsys.readouterr().out
    assert p.session.processes[0].ended == "still running"


def test_only_the_block_counts(weights):
    weights.read_bytes()
    with wan_loader.profile() as p:
        pass
    assert p.session.report.nbytes_file == 0
    assert not [s for s in p.session.spans if s.name == "read"]
    assert p.session.report.seconds < 5


def test_a_module_that_is_imported_in_one_block_is_seen_in_the_next(weights, tmp_path, monkeypatch):
    """As in a notebook, whose first cell imports diffusers: that has `safe_open` for itself."""
    (tmp_path / "imported_late.py").write_text("from safetensors import safe_open")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = []
    for _ in range(2):
        with wan_loader.profile() as p:
            import imported_late

            with imported_late.safe_open(weights, "pt") as file:
                file.get_tensor("w0")
        sizes.append(p.session.report.nbytes_file)
    assert sizes == [weights.stat().st_size] * 2
    assert imported_late.safe_open is safetensors.safe_open


def test_a_block_that_fails_is_ended_like_any_other(weights):
    before = attributes()
    p = wan_loader.profile()

    def fail():
        with p:
            load_file(weights)
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert all(a.keys() == b.keys() for a, b in zip(before, attributes(), strict=True))
    assert p.session.report.nbytes_file == weights.stat().st_size


def test_asked_too_early_or_twice():
    p = wan_loader.profile()
    assert repr(p) == "Profile(not started)"
    with pytest.raises(OptionError, match="nothing to report yet"):
        p.report()
    with p, pytest.raises(OptionError, match="do not nest"), wan_loader.profile():
        pass
    assert repr(p) == "Profile(done)"
    with p:  # another block: the report is about the last one
        pass
    assert p.session.report.nbytes_file == 0
