"""The right culprit every time: exactly one thing is slowed down, and the verdict must name it."""

import time

import pytest
import torch
from safetensors.torch import save_file

import wan_loader
from wan_loader.events import Recorder, span
from wan_loader.profiler.analysis.assemble import Environment, load_session

SECONDS = 1.5


def profile(path, ceilings, **options):
    recorder = Recorder()
    report = wan_loader.load(path, observer=recorder, io="buffered", **options).report
    return load_session(report, recorder.spans, Environment(ceilings=ceilings))


def slowed(function, seconds):
    """The function, taking longer by that much."""

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


@pytest.fixture(scope="module")
def small_tensors(tmp_path_factory):
    """64 MB that pass through staging on the CPU, too: large tensors are read to their place."""
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    save_file({f"blocks.{i}.bias": torch.full((50_000,), float(i)) for i in range(320)}, path)
    return path


class TestOwnLoads:
    """Our own loader, with one part of it slowed down."""

    def test_healthy(self, checkpoint, ceilings):
        wan_loader.load(checkpoint, io="buffered")
        for _ in range(3):  # on a shared machine one load may really be slow: memory that the host has to find first
            session = profile(checkpoint, ceilings)
            if session.verdict.kind == "limit":
                break
        assert session.verdict.kind == "limit", session.verdict
        assert session.verdict.why.startswith("healthy")

    def test_disk(self, checkpoint, ceilings, monkeypatch):
        from wan_loader.system.posix_aio import AioRequest

        monkeypatch.setattr(AioRequest, "result", slowed(AioRequest.result, 0.2))
        self.expect("read", profile(checkpoint, ceilings, threads=2))

    def test_copies(self, small_tensors, ceilings, monkeypatch):
        from wan_loader.devices import cpu

        class Slow:
            memmove = staticmethod(slowed(cpu.ctypes.memmove, 0.004))

        monkeypatch.setattr(cpu, "ctypes", Slow)
        self.expect("h2d", profile(small_tensors, ceilings))

    def test_cast(self, checkpoint, ceilings, monkeypatch):
        from wan_loader.devices import cpu

        monkeypatch.setattr(cpu, "_convert", slowed(cpu._convert, 0.08))
        self.expect("cast", profile(checkpoint, ceilings, dtype="bf16"))

    def test_slots(self, small_tensors, ceilings, monkeypatch):
        from wan_loader.devices.cpu import CpuWriter

        class Late:
            is_done = False

            def done(self):
                return self.is_done

            def wait(self):
                time.sleep(0.1)
                self.is_done = True

        submit = CpuWriter.submit
        monkeypatch.setattr(CpuWriter, "submit", lambda *args: submit(*args) or Late())
        self.expect("wait", profile(small_tensors, ceilings, threads=1))

    def test_headers(self, checkpoint, ceilings, monkeypatch):
        from wan_loader.plan import request

        monkeypatch.setattr(request, "open_checkpoint", slowed(request.open_checkpoint, SECONDS))
        self.expect("header", profile(checkpoint, ceilings))

    def test_planning(self, checkpoint, ceilings, monkeypatch):
        from wan_loader.plan import plan

        monkeypatch.setattr(plan, "plan_storages", slowed(plan.plan_storages, SECONDS))
        self.expect("init", profile(checkpoint, ceilings))

    def test_imports(self, checkpoint, ceilings, monkeypatch):
        from wan_loader.loading import probe

        resolve, quick = probe.resolve_device, ceilings | {"import_torch_s": 0.5}

        def slow(device, observer):
            with span(observer, "import"):
                time.sleep(quick["import_torch_s"] * 2 + SECONDS)
            return resolve(device, observer)

        monkeypatch.setattr(probe, "resolve_device", slow)
        self.expect("import", profile(checkpoint, quick))

    def test_binding(self, checkpoint, ceilings, monkeypatch):
        from wan_loader.loading import run as load

        monkeypatch.setattr(load, "convert_late", slowed(load.convert_late, SECONDS))
        self.expect("assign", profile(checkpoint, ceilings))

    def expect(self, phase, session):
        assert (session.verdict.kind, session.verdict.phase) == ("slow", phase), session.verdict


LOAD = """
import sys, time
import torch
from safetensors.torch import load_file
weights = load_file(sys.argv[1])
"""

SLOW_TENSOR = (
    LOAD
    + """
class Slow(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        time.sleep(1.5)
        return super().__torch_function__(func, types, args, kwargs or {})
source = torch.zeros(8 << 20)
target = torch.empty(8 << 20)
slow = source.as_subclass(Slow)
"""
)

PROGRAMS = {
    "construct": """
import sys, time, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        time.sleep(4)
Net()
""",
    "random_init": """
import sys, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4096, 8192, bias=False) for _ in range(12))
Net()
"""
    + LOAD,
    "import": """
import sys, pathlib
here = pathlib.Path(sys.argv[1]).parent
(here / "molasses.py").write_text("import time; time.sleep(8)")
sys.path.insert(0, str(here))
import molasses
"""
    + LOAD,
    "cast": SLOW_TENSOR + "for _ in range(3):\n    slow.to(torch.float16)\n",
    "h2d": SLOW_TENSOR + "for _ in range(3):\n    target.copy_(slow)\n",
    "read": """
import io, sys, time, torch
class SlowFile(io.FileIO):
    def readinto(self, buffer):
        time.sleep(0.1)
        return super().readinto(buffer)
    def read(self, n=-1):
        time.sleep(0.1)
        return super().read(n)
torch.save({str(i): torch.ones(1 << 20) for i in range(32)}, sys.argv[1] + ".pth")
with SlowFile(sys.argv[1] + ".pth") as file:
    torch.load(file)
""",
    "assign": LOAD
    + """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
    def _load_from_state_dict(self, *args):
        time.sleep(4)
        super()._load_from_state_dict(*args)
net = Net()
net.load_state_dict(Net().state_dict())
""",
    "shard": """
import os, sys, threading, time, torch
import torch.distributed as dist
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29731")
if os.fork() == 0:
    time.sleep(6)
    dist.init_process_group("gloo", rank=1, world_size=2)
    os._exit(0)
dist.init_process_group("gloo", rank=0, world_size=2)
""",
}


class TestForeignPrograms:
    """Programs that know nothing of wan-loader."""

    @pytest.mark.parametrize("phase", PROGRAMS)
    def test_culprit(self, phase, checkpoint, ceilings, profiled):
        session = profiled(PROGRAMS[phase], checkpoint, ceilings=ceilings)
        assert session.processes[session.subject].ended == "exit 0"
        assert (session.verdict.kind, session.verdict.phase) == ("slow", phase), session.verdict

    def test_healthy(self, checkpoint, ceilings, profiled):
        for _ in range(3):  # on a shared machine one start may really be slow
            session = profiled(LOAD, checkpoint, ceilings=ceilings)
            if session.verdict.kind == "limit":
                break
        assert session.verdict.kind == "limit", session.verdict

    def test_page_faults_are_reading(self, tmp_path, profiled, evict):
        """A mapped file is read inside the conversion; more than what the reader asks for ahead of time."""
        import torch
        from safetensors.torch import save_file

        path = tmp_path / "model.safetensors"
        save_file({f"blocks.{i}.weight": torch.zeros(4096, 2048) for i in range(12)}, path)
        evict(path)
        session = profiled(LOAD + "weights = {k: v.to(torch.bfloat16) for k, v in weights.items()}\n", path)
        read = next(p for p in session.report.phases if p.name == "read")
        assert read.nbytes >= 0.9 * path.stat().st_size
        assert any("page faults" in s.label for s in session.spans)
        assert session.report.io.resident_before < 0.1 * path.stat().st_size
