"""Fixtures that several test modules share."""

import contextlib
import functools
import gc
import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from installed import install_entry_points

install_entry_points()
os.environ["WAN_LOADER_STANDBY"] = "0"  # whatever server the user has
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells have it for what they start in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Asked of the driver's files: torch takes long to ask, and CUDA that has begun in here does not work in forks.
HAS_CUDA = any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def pytest_report_header():
    """Say once what is not run, and why."""
    return None if HAS_CUDA else "gpu: tests that need a CUDA device are left out, there is none"


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Freeze what tests have in common: to look for garbage in all of it takes 0.25 s each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked as gpu where there is no CUDA device."""
    if HAS_CUDA:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_CUDA else [])])
def device(request):
    """Every test that takes this runs on the CPU, and where there is one, on CUDA."""
    if request.param == "cuda":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def evict():
    """Push byte ranges of a file out of the page cache; skips the test where the kernel keeps them."""

    def evict(path, start=0, nbytes=0):
        from wan_loader.system.posix import cached_bytes

        fd = os.open(path, os.O_RDWR)
        try:
            end = start + nbytes if nbytes else os.fstat(fd).st_size
            for _ in range(20):  # pages still in a CPU's batch of new ones are kept at first
                os.fsync(fd)
                os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)
                if cached_bytes(fd, start, end - start) == 0:
                    return
                time.sleep(0.01)
            pytest.skip(f"the file system of {path} keeps its pages")
        finally:
            os.close(fd)

    return evict


@pytest.fixture
def resident():
    """Bytes of a file that lie in the page cache."""

    def resident(path):
        from wan_loader.system.posix import cached_bytes

        fd = os.open(path, os.O_RDONLY)
        try:
            return cached_bytes(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    return resident


@pytest.fixture
def open_files():
    """How many descriptors this process holds, and what `needle` is mapped as: for comparing before and after.

    Where there is a GPU, its driver opens devices, pipes and sockets as it likes: only files count.
    """

    def counts(fd):
        with contextlib.suppress(FileNotFoundError):  # what lists them has one of its own
            target = os.readlink(f"/proc/self/fd/{fd}")
            return not HAS_CUDA or (target.startswith("/") and not target.startswith(("/dev/", "/proc/", "/sys/")))
        return False

    def open_files(needle):
        with open("/proc/self/maps") as maps:
            mapped = sum(str(needle) in line for line in maps)
        return sum(map(counts, os.listdir("/proc/self/fd"))), mapped

    return open_files


@pytest.fixture
def unprivileged():
    """A context in which modes of files count, for root too."""

    @contextlib.contextmanager
    def unprivileged():
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)

    return unprivileged


@pytest.fixture
def open_dir():
    """A directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def python_that_forks(tmp_path_factory):
    """(modules) -> what may stand in the place of `python`, and need not import them."""
    from programs import python_that_forks

    return functools.cache(lambda modules: python_that_forks(tmp_path_factory.mktemp("bin"), modules))


@pytest.fixture
def call_main(monkeypatch):
    """Call the `main` of a program in this process, with arguments; returns its exit code."""

    def call_main(main, *words):
        name = main.__module__.split(".")[0].replace("_", "-")
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0

    return call_main


@pytest.fixture
def benchmark_main(monkeypatch):
    """Run a script of benchmarks/ in this process, with arguments; the processes that it starts come from a zygote."""

    def benchmark_main(name, *words, modules):
        from programs import ROOT, forking

        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "")  # a benchmark takes it out, and it comes back
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        script = importlib.import_module(name)
        for module in [*sys.modules.values()]:  # most start theirs by functions of others of these scripts
            path = Path(getattr(module, "__file__", None) or "")
            if path.parent == ROOT / "benchmarks" and hasattr(module, "subprocess"):
                monkeypatch.setattr(module, "subprocess", forking(modules))
        script.main()

    return benchmark_main


@pytest.fixture(params=["disk", "tmpfs"])
def disk_or_memory(request, tmp_path):
    """A directory on a disk (or what /tmp is) and one in memory."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="wan-loader-test-") as name:
        yield Path(name)


@pytest.fixture
def printed(monkeypatch, capfd):
    """What an action prints on stdout at some width."""

    def print_it(action, width):
        monkeypatch.setenv("COLUMNS", str(width))
        capfd.readouterr()
        action()
        return capfd.readouterr().out

    return print_it
