"""The fast path as it is offered to a process, and the sum of what several have counted."""

import json
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")

import wan_loader  # noqa: E402
from wan_loader.fastpath.launch.tallies import sum_up  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402


@pytest.fixture(autouse=True)
def originals():
    """Everything is as before in the end."""
    before = torch.nn.Module.to, torch.nn.Module.cuda, torch.load, torch.nn.Module.load_state_dict, sys.meta_path[:]
    yield before[0]
    assert not wan_loader.accelerate().is_installed
    after = torch.nn.Module.to, torch.nn.Module.cuda, torch.load, torch.nn.Module.load_state_dict, sys.meta_path[:]
    assert after == before


def test_a_context_takes_out_what_it_has_put_in(originals):
    with wan_loader.accelerate() as fast:
        assert fast.is_installed
        assert torch.nn.Module.to is not originals
        assert torch.nn.Linear(3, 3).to(torch.float64).weight.dtype == torch.float64
    assert torch.nn.Module.to is originals


def test_after_an_exception_too(originals):
    with pytest.raises(ZeroDivisionError), wan_loader.accelerate():
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), wan_loader.accelerate():
        raise KeyboardInterrupt
    assert torch.nn.Module.to is originals


def test_all_who_install_it_hold_the_same(originals):
    fast = wan_loader.install()
    with wan_loader.accelerate() as again, wan_loader.accelerate():
        assert again is fast
    assert torch.nn.Module.to is not originals
    wan_loader.uninstall()
    assert torch.nn.Module.to is originals
    with pytest.raises(RuntimeError, match="more often"):
        wan_loader.uninstall()


def test_contexts_of_threads_may_overlap(originals):
    first, second = threading.Event(), threading.Event()

    def outlive():
        with wan_loader.accelerate():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=outlive)
    thread.start()
    first.wait(10)
    with wan_loader.accelerate():
        pass
    assert torch.nn.Module.to is not originals
    second.set()
    thread.join()
    assert torch.nn.Module.to is originals


def test_a_program_may_replace_the_same_functions(originals, monkeypatch):
    calls = []

    def replace():
        below = torch.nn.Module.to

        def to(module, *args, **kwargs):
            calls.append(below)
            return below(module, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, "to", to)
        return to

    before = replace()
    with wan_loader.accelerate():
        ours = torch.nn.Module.to
        assert ours is not before
        within = replace()
        torch.nn.Linear(3, 3).to("cpu")
        assert calls == [ours, originals]
    assert torch.nn.Module.to is within, "what the program has put over ours stays"
    assert torch.nn.Linear(3, 3).to(torch.float64).weight.dtype == torch.float64
    monkeypatch.undo()


def test_it_imports_nothing_heavy_before_there_is_something_to_load():
    """A program with torch that loads nothing is not to wait for our loader."""
    code = """
import sys, wan_loader
wan_loader.install()
assert "torch" not in sys.modules and "safetensors" not in sys.modules
import torch
torch.nn.Linear(3, 3).to("cpu")
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("wan_loader", "diffusers", "transformers")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = {".".join(name.split(".")[:2]) for name in done.stdout.split()}
    assert not rooms & {
        *("diffusers", "transformers"),
        *(f"wan_loader.{room}" for room in ("api", "engine", "loading", "plan", "cache", "warming")),
    }


def test_the_counts_of_processes_add_up(tmp_path):
    tally = Tally()
    tally.served("Model", 100, 0.5)
    tally.saved("casts on the CPU", 3, 40)
    tally.leave("was written to", 7)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(tally.as_dict()))
    for name, text in {"cut": '{"components": {"Mod', "empty": "", "foreign": "[]", "other": "{}"}.items():
        (tmp_path / f"{name}.json").write_text(text)
    total, n_processes = sum_up(tmp_path)
    assert n_processes == 2
    tally.add(tally.as_dict())
    assert total == tally
