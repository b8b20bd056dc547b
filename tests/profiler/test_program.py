"""Any program: unchanged behaviour, and a report whatever becomes of it."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise

import pytest

from wan_loader.profiler.analysis.merge import merge
from wan_loader.profiler.analysis.story import subject_of, turns_of
from wan_loader.profiler.program import Recording, run_program


def record(tmp_path, source, *args, **options):
    script = tmp_path / "program.py"
    script.write_text(source)
    return run_program([sys.executable, str(script), *args], **options)


def bare_and_profiled(tmp_path, source, *args):
    """(stdout, stderr, exit code) of a script run bare, and under the command line's profile."""
    script = tmp_path / "program.py"
    script.write_text(source)
    bare = [sys.executable, str(script), *args]
    results = []
    for command in (bare, [sys.executable, "-m", "wan_loader", "profile", "--no-ceilings", "--", *bare]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        results.append((done.stdout, done.stderr, done.returncode))
    return results


CRASH = """
import json, sys
def inner():
    print("about to fail", flush=True)
    raise ValueError("on purpose")
print(json.dumps({"argv": sys.argv[1:], "path0": sys.path[0] != "", "name": __name__}))
inner()
"""


def test_output_traceback_and_exit_code_are_unchanged(tmp_path):
    bare, profiled = bare_and_profiled(tmp_path, CRASH, "a b", "--dtype")
    assert profiled[0] == bare[0]
    assert profiled[1].startswith(bare[1])
    assert "exit 1" in profiled[1]
    assert profiled[2] == bare[2] == 1


def test_errors_inside_hooked_calls_show_no_frame_of_ours(tmp_path):
    source = """
import torch, traceback
class Bad(torch.nn.Module):
    def __init__(self, x):
        super().__init__()
for call in (lambda: torch.load("/nonexistent.pth"), Bad):
    try:
        call()
    except Exception:
        traceback.print_exc()
torch.zeros(1 << 20).copy_(torch.zeros(3, 5))
"""
    bare, profiled = bare_and_profiled(tmp_path, source)
    assert bare[1].count("Traceback") == 3
    assert profiled[1].startswith(bare[1])


def test_open_behaves_as_ever(tmp_path):
    """With weight files, with others, and with what is no file."""
    source = """
import io, pathlib, traceback
weights = pathlib.Path("w.safetensors")
weights.write_bytes(bytes(range(256)) * 400)
for subject, mode in ((3.5, "rb"), ([], "rb"), ("no.safetensors", "rb"), ("a\\0b", "rb"), (weights, "nonsense")):
    try:
        open(subject, mode)
    except Exception:
        traceback.print_exc()
assert io.open is open
for name in (weights, str(weights), bytes(weights)):
    with open(name, "rb") as file:
        print(type(file), file.name, file.mode, file.raw.name, type(file.raw).__name__)
        print(file.read(3), file.seek(100), file.tell(), len(file.read(70000)), len(file.peek()), len(file.read()))
        buffer = bytearray(102400)
        print(file.seek(0), file.readinto(buffer), bytes(buffer) == weights.read_bytes(), file.fileno() > 2)
    print(file.closed)
with open(weights, "rb", buffering=0) as file:
    print(type(file), len(file.read()))
with open(weights, encoding="latin1") as file:
    print(len(file.read()))
"""
    bare, profiled = bare_and_profiled(tmp_path, f"import os\nos.chdir({str(tmp_path)!r})\n{source}")
    assert bare[2] == 0, bare[1]
    assert profiled[0] == bare[0]
    assert bare[1].count("Traceback") == 5
    assert profiled[1].startswith(bare[1])


@pytest.mark.parametrize("fault", ["import not_there_at_all", "1 / 0", "this is no Python", "import math, deeper"])
def test_failing_import_shows_no_frame_of_ours(tmp_path, fault):
    (tmp_path / "deeper.py").write_text("raise ValueError('on purpose')\n")
    (tmp_path / "broken.py").write_text(fault + "\n")
    bare, profiled = bare_and_profiled(tmp_path, "import broken\n")
    assert "Error" in bare[1]
    assert profiled[1].startswith(bare[1])


def test_modules_are_what_they_are_without_a_recording(tmp_path):
    """Whatever the import system sets, and loaders of their own."""
    (tmp_path / "plain.py").write_text("value = 1\nimport sys\nframes = sys._getframe().f_back is not None\n")
    source = """
import importlib.abc, importlib.machinery, importlib.util, plain
names = ("__name__", "__file__", "__package__", "__doc__", "__cached__")
print({name: getattr(plain, name) for name in names}, type(plain.__builtins__), plain.__spec__, plain.frames)
class Nothing(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        return None
spec = importlib.util.spec_from_file_location("nothing", plain.__file__, loader=Nothing("nothing", plain.__file__))
try:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    print(error)
"""
    bare, profiled = bare_and_profiled(tmp_path, source)
    assert bare[2] == profiled[2] == 0, bare[1]
    assert "get_code() returns None" in bare[0]
    assert profiled[0].partition("at 0x")[0] == bare[0].partition("at 0x")[0]


def test_exit_code(tmp_path):
    recording = record(tmp_path, "import sys; sys.exit(7)")
    assert recording.returncode == 7
    assert merge(recording)[0].ended == "exit 7"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed(tmp_path, number):
    source = f"import os, time, json.tool\ntime.sleep(0.2)\nimport csv\nos.kill(os.getpid(), {int(number)})"
    recording = record(tmp_path, source)
    assert recording.returncode == -number
    (process,) = merge(recording)
    assert process.ended == f"killed by {number.name}"
    assert any(s.name == "import" for s in process.spans)


def test_cut_short(tmp_path):
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(0.3)\nimport csv, os\nos.kill(os.getpid(), 9)")
    (process,) = merge(record(tmp_path, "import endless"))
    assert any(s.name == "import" and s.label == "endless" for s in process.spans)


def test_fork_and_exec(tmp_path):
    source = """
import os, subprocess, sys
if os.fork() == 0:
    import csv
    os._exit(0)
os.wait()
subprocess.run([sys.executable, "-c", "import decimal"], check=True)
"""
    processes = merge(record(tmp_path, source))
    assert len(processes) == 3
    assert sum("(forked)" in p.title for p in processes) == 1
    assert any("decimal" in p.title for p in processes)


def test_program_that_is_no_python():
    recording = run_program(["true"])
    (process,) = merge(recording)
    assert process.facts == {"unseen": True}
    assert process.ended == "exit 0"


def test_python_that_ignores_the_environment():
    (process,) = merge(run_program([sys.executable, "-I", "-c", "print(1)"], stdout=subprocess.DEVNULL))
    assert process.facts.get("unseen")


def test_sitecustomize_of_others_still_runs(tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.custom = 'mine'")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    recording = record(tmp_path, "import sitecustomize; print(custom, sitecustomize.__file__)")
    assert recording.returncode == 0
    assert capfd.readouterr().out.strip() == f"mine {tmp_path}/sitecustomize.py"


def test_until_ends_the_recording_and_the_program_goes_on(tmp_path, capfd):
    source = "import csv, sys, time\nprint('ready to serve')\ntime.sleep(0.3)\nimport decimal\nprint('bye')"
    recording = record(tmp_path, source, until="ready")
    (process,) = merge(recording)
    assert capfd.readouterr().out.split("\n")[-2] == "bye"
    assert process.seconds < (recording.end_ns - recording.start_ns) / 1e9 - 0.25
    assert not any(s.label in ("decimal", "_decimal") for s in process.spans)


def test_until_and_for_can_stop_the_program(tmp_path):
    recording = record(tmp_path, "import time\nprint('ready')\ntime.sleep(60)", until="ready", stop=True)
    assert recording.returncode == -signal.SIGTERM
    recording = record(tmp_path, "import time\ntime.sleep(60)", seconds=0.5, stop=True)
    assert "--for" in recording.stopped


def test_mmap_load_is_left_ordinary(tmp_path):
    source = """
import torch, inspect, copy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
save_file(net.state_dict(), "x.safetensors")
with safe_open("x.safetensors", "pt") as f:
    assert torch.equal(f.get_tensor("0.weight"), net[0].weight)
    assert f.get_slice("0.weight")[:2].shape == (2, 256)
    assert f.get_slice("0.weight").get_shape() == [256, 256]
    assert sorted(f.keys()) == sorted(net.state_dict())
state = load_file("x.safetensors")
net.load_state_dict(state)
twin = copy.deepcopy(net).to(torch.bfloat16)
assert torch.equal(twin[0].weight, net[0].weight.to(torch.bfloat16))
assert str(inspect.signature(torch.nn.Linear.__init__)).startswith("(self, in_features")
torch.save(net.state_dict(), "x.pth")
assert torch.equal(torch.load("x.pth")["0.weight"], net[0].weight)
"""
    recording = record(tmp_path, f"import os\nos.chdir({str(tmp_path)!r})\n{source}")
    assert recording.returncode == 0
    (process,) = merge(recording)
    assert {s.name for s in process.spans} >= {"import", "construct", "random_init", "read", "cast", "assign"}
    assert len(process.facts["files"]) == 2


def test_spans_never_overlap_within_a_thread(tmp_path):
    source = """
import threading, torch
def work():
    for _ in range(20):
        torch.nn.Linear(512, 512).to(torch.float16).to(torch.float32)
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
    (process,) = merge(record(tmp_path, source))
    for track in {s.track for s in process.spans}:
        spans = sorted((s.start_ns, s.end_ns) for s in process.spans if s.track == track)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_lines_of_a_foreign_form_are_left_out():
    begin = {"begin": {"pid": 5, "argv": ["x"], "started": 100}}
    rows = {"spans": [["read", 100, 200, 5, "t", "l"], ["read", "x"], 7, ["nonsense", 1, 2, 3, "t", "l"]], "at": 250}
    recording = Recording(
        argv=("x",), pid=5, start_ns=100, end_ns=400, returncode=0, logs=((begin, rows, {"spans": 3}),)
    )
    (process,) = merge(recording)
    assert [(s.name, s.start_ns, s.end_ns) for s in process.spans] == [("read", 0, 100)]
    assert subject_of([process], turns_of([process], 300)) == 0
    assert process.end_ns == 300


def test_command_line_json_keeps_stdout_clean(tmp_path):
    command = [sys.executable, "-m", "wan_loader", "profile", "--json", "--no-ceilings", "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", "print('hello')"], capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout)["kind"] == "program"
    assert "hello" in done.stderr


def test_torchrun_ranks_side_by_side(tmp_path):
    pytest.importorskip("torch.distributed")
    script = tmp_path / "rank.py"
    script.write_text("import torch\nprint(torch.nn.Linear(8, 8))\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29744"]
    recording = run_program([*command, str(script)], stdout=subprocess.DEVNULL)
    assert recording.returncode == 0
    processes = merge(recording)
    assert sorted(p.rank for p in processes if p.rank is not None) == [0, 1]
    turns = turns_of(processes, max(p.end_ns for p in processes))
    assert processes[subject_of(processes, turns)].rank is not None
    assert all(any(s.label == "torch" for s in p.spans) for p in processes if p.rank is not None)


def test_os_open_behaves_as_ever(tmp_path):
    """With weight files, relative to a directory, and with what is no file; who asks what it can do gets its answer."""
    source = """
import os, shutil, traceback
with open("w.safetensors", "wb") as file:
    file.write(bytes(100_000))
for path, flags in (("no.gguf", os.O_RDONLY), (3.5, os.O_RDONLY), ("w.safetensors", "r")):
    try:
        os.open(path, flags)
    except Exception:
        traceback.print_exc()
directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
print(os.pread(os.open("w.safetensors", os.O_RDONLY, dir_fd=directory), 3, 0))
print(os.open in os.supports_dir_fd, shutil.rmtree.avoids_symlink_attacks)
for mode in (7, "nonsense"):
    try:
        open("w.safetensors", mode)
    except Exception:
        traceback.print_exc()
"""
    bare, profiled = bare_and_profiled(tmp_path, f"import os\nos.chdir({str(tmp_path)!r})\n{source}")
    assert bare[2] == 0, bare[1]
    assert profiled[0] == bare[0]
    assert "True True" in bare[0]
    assert bare[1].count("Traceback") == 5
    assert profiled[1].startswith(bare[1])
