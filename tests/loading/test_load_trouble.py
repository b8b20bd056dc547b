"""Files that change during a load, and what cannot be done: one error, and nothing stays behind."""

import contextlib
import errno
import gc
import os
import resource
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from loader_cases import IO, MiB, same_dicts, weights, write  # noqa: E402
from pairwise import pairwise  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.devices.resolve import check_room_for_torch  # noqa: E402
from wan_loader.loading.allocate import Allocation  # noqa: E402
from wan_loader.system.posix import cached_bytes  # noqa: E402
from wan_loader.system.posix_aio import AioRequest  # noqa: E402

# files that change


class Meddler:
    """An observer that does something when the nth span of a name ends."""

    def __init__(self, name, n, action):
        self._name, self._n, self._action = name, n, action
        self._lock = threading.Lock()
        self.done = False

    def record(self, span):
        with self._lock:
            self._n -= span.name == self._name
            if self._n == 0 and not self.done:
                self.done = True
                self._action()


def replace_file(path):
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def replace_by_another(path):
    other = path.parent / ("other" + path.suffix)
    tensors = {"something": torch.ones(70_000), "else": torch.zeros(3)}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, other)
    else:
        torch.save(tensors, other, _use_new_zipfile_serialization=path.suffix != ".pt")
    os.replace(other, path)


def append(path):
    with open(path, "ab") as f:
        f.write(b"x" * 5000)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def overwrite(path):
    with open(path, "r+b") as f:
        f.seek(-8, os.SEEK_END)
        f.write(b"changed!")


def overwrite_and_put_the_time_back(path):
    times = os.stat(path)
    overwrite(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


ACTIONS = [
    replace_file,
    replace_by_another,
    append,
    truncate,
    empty,
    overwrite,
    overwrite_and_put_the_time_back,
    Path.unlink,
]
MOMENTS = ["header", "init 1", "init 2", "init 3"]


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    ("transport", "moment", "action"),
    pairwise([*((mode, None) for mode in IO), ("auto", "bf16"), ("direct", "bf16")], MOMENTS, ACTIONS),
)
def test_file_changed_during_the_load(tmp_path, device, transport, moment, action):
    mode, dtype = transport
    path = write("safetensors", tmp_path, weights(4))
    name, _, n = moment.partition(" ")
    meddler = Meddler(name, int(n or 1), lambda: action(path))
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, device=device, io=mode, dtype=dtype, observer=meddler)
    assert meddler.done
    assert str(path) in str(caught.value)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("mode", ["direct", "buffered", "mapped"])
def test_file_changed_between_two_reads(tmp_path, device, mode, action, open_files):
    """Also where views are asked for: a cast on the CPU out of a mapping would be the end of the process."""
    if mode == "mapped" and device == "cuda":
        pytest.skip("the GPU fetches the pages itself")
    path = write("safetensors", tmp_path, weights(4, nbytes=5 * MiB))
    meddler = Meddler("read", 2, lambda: action(path))
    before = open_files(path)[1]
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, device=device, io=mode, threads=1, dtype="bf16", observer=meddler)
    assert meddler.done
    assert str(path) in str(caught.value)
    assert open_files(path)[1] == before


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("kind", ["pth", "legacy pickle"])
def test_torch_file_changed_during_the_load(tmp_path, kind, action):
    path = write(kind, tmp_path, weights(4))
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, observer=Meddler("header", 1, lambda: action(path)))
    assert str(path) in str(caught.value)


def test_legacy_pickle_rewritten_with_other_values_during_the_load(tmp_path):
    path = write("legacy pickle", tmp_path, weights(4))

    def rewrite():
        write("legacy pickle", tmp_path, {n: t + 1 for n, t in weights(4).items()})

    with pytest.raises(wan_loader.CheckpointError):
        wan_loader.load_file(path, observer=Meddler("header", 1, rewrite))


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_read_error_names_the_file(tmp_path, device, monkeypatch, mode, code):
    path, result = write("safetensors", tmp_path, weights(4)), AioRequest.result

    def failing(request):
        if result(request) is not None:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(AioRequest, "result", failing)
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, device=device, io=mode)
    assert caught.value.path == str(path)
    assert caught.value.reason == os.strerror(code)


@pytest.fixture
def alive(monkeypatch):
    """Whether each tensor that loads filled is still there."""
    seen, plain = [], Allocation._make

    def make(self, plan, nbytes):
        plain(self, plan, nbytes)
        seen.append(weakref.ref(self.destinations[-1].whole))

    monkeypatch.setattr(Allocation, "_make", make)
    return lambda: [ref() is not None for ref in seen]


@pytest.mark.parametrize(("mode", "span"), [("mapped", "read"), ("mapped", "cast"), ("buffered", "cast")])
def test_weights_of_a_failed_load_go_with_its_error(tmp_path, alive, mode, span):
    """At once: the next collection does not look at what a load made."""
    path = write("safetensors", tmp_path, weights())

    token = wan_loader.CancelToken()

    def fail():
        assert alive() == [True] * 6
        token.cancel(OSError("broken"))

    gc.disable()
    try:
        with pytest.raises(OSError, match="broken"):
            wan_loader.load_file(path, dtype="bfloat16", io=mode, cancel=token, observer=Meddler(span, 1, fail))
        assert alive() == [False] * 6
    finally:
        gc.enable()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch, code):
    path = write("safetensors", tmp_path, weights(1))
    real = os.open

    def failing(name, *args, **kwargs):
        if os.fspath(name) == str(path):
            raise OSError(code, os.strerror(code), name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(wan_loader.CheckpointError) as caught:
        wan_loader.load_file(path, io="buffered")
    assert str(path) in str(caught.value)


# what cannot be done


@pytest.fixture
def four_descriptors():
    """All that may be open besides what is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 5, hard))
    opened = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(4):
            os.close(opened.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in opened:
            os.close(fd)


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.usefixtures("four_descriptors")
def test_few_descriptors_are_enough(tmp_path, mode):
    """Reads then wait for each other."""
    tensors = weights(4, nbytes=20 * MiB)
    path = write("safetensors", tmp_path, tensors)
    same_dicts(wan_loader.load_file(path, io=mode, threads=8), tensors)


def test_missing_host_memory(tmp_path, monkeypatch):
    path = write("safetensors", tmp_path, weights(2))
    monkeypatch.setattr("wan_loader.system.machine.available_memory", lambda: 1000)
    for options in ({"io": "buffered"}, {"io": "direct"}, {"dtype": "fp64"}):
        with pytest.raises(wan_loader.HostMemoryError, match="1000") as caught:
            wan_loader.load_file(path, **options)
        assert (caught.value.path, caught.value.remedy) == (str(path), "free some memory")
    same_dicts(wan_loader.load_file(path, io="mapped"), weights(2))


@pytest.mark.parametrize("kind", ["safetensors", "legacy pickle"])
def test_weights_that_would_fit_alone_are_refused_before_reading(tmp_path, monkeypatch, kind):
    """A load takes more than its weights: the rest would be the kernel's to find, by killing."""
    path = write(kind, tmp_path, weights(2))
    nbytes = sum(t.nbytes for t in weights(2).values())
    monkeypatch.setattr("wan_loader.system.machine.available_memory", lambda: nbytes + 16 * MiB)
    with pytest.raises(wan_loader.HostMemoryError, match="beside its weights") as caught:
        wan_loader.load_file(path, io="buffered")
    assert (caught.value.path, caught.value.remedy) == (str(path), "free some memory")


@pytest.mark.parametrize("facts", [(None, {}), (1 << 40, {}), (None, {"ulimit -v": 1 << 40})])
def test_what_is_unknown_refuses_nothing(tmp_path, monkeypatch, facts):
    path = write("safetensors", tmp_path, weights(2))
    for name, fact in zip(("available_memory", "process_headrooms"), facts, strict=True):
        monkeypatch.setattr(f"wan_loader.system.machine.{name}", lambda fact=fact: fact)
    same_dicts(wan_loader.load_file(path, io="buffered"), weights(2))


def test_the_process_s_own_limit_counts(tmp_path, monkeypatch):
    path = write("safetensors", tmp_path, weights(2))
    monkeypatch.setattr("wan_loader.system.machine.process_headrooms", lambda: {"ulimit -v": 1000})
    with pytest.raises(wan_loader.HostMemoryError, match="1000"):
        wan_loader.load_file(path, io="buffered")


@pytest.mark.parametrize(
    ("free", "limits", "what"), [(100 * MiB, {}, "cgroup"), (1 << 40, {"ulimit -v": 400 * MiB}, "ulimit -v")]
)
def test_torch_is_not_imported_where_that_would_be_the_end(monkeypatch, free, limits, what):
    monkeypatch.setattr("wan_loader.devices.resolve.available_memory", lambda: free)
    monkeypatch.setattr("wan_loader.devices.resolve.process_headrooms", lambda: limits)
    check_room_for_torch()  # it is imported
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(wan_loader.HostMemoryError) as caught:
        check_room_for_torch()
    assert what in caught.value.reason
    assert caught.value.remedy == "allow more memory"
    monkeypatch.setattr("wan_loader.devices.resolve.available_memory", lambda: None)
    monkeypatch.setattr("wan_loader.devices.resolve.process_headrooms", dict)
    check_room_for_torch()


def test_the_ring_takes_what_the_weights_leave(tmp_path, monkeypatch):
    tensors = weights(8, nbytes=8 * MiB)
    path = write("safetensors", tmp_path, tensors)
    wide = wan_loader.load(path, io="buffered").report.settings
    monkeypatch.setattr("wan_loader.system.machine.available_memory", lambda: 170 * MiB)
    loaded = wan_loader.load(path, io="buffered")
    assert loaded.report.settings["n_slots"] < wide["n_slots"]
    same_dicts(loaded.tensors, tensors)


def test_what_freed_memory_leaves_behind_is_given_back_before_a_refusal(tmp_path, monkeypatch):
    path = write("safetensors", tmp_path, weights(2))
    free = [1000]
    monkeypatch.setattr("wan_loader.system.machine.available_memory", lambda: free[0])
    monkeypatch.setattr("wan_loader.loading.load_session.trim_heap", lambda: free.insert(0, 1 << 40))
    same_dicts(wan_loader.load_file(path, io="buffered"), weights(2))


def test_memory_that_is_refused_all_the_same(tmp_path, monkeypatch):
    """By limits that cannot be seen beforehand."""
    path = write("safetensors", tmp_path, weights(2))
    monkeypatch.setattr("wan_loader.system.machine.process_headrooms", dict)
    monkeypatch.setattr("wan_loader.loading.run.Allocation._make", lambda *_: torch.empty(1 << 60))
    with pytest.raises(wan_loader.HostMemoryError, match="no room") as caught:
        wan_loader.load_file(path, io="buffered")
    assert caught.value.path == str(path)


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK), reason="needs root, and cgroup v1")
def test_a_load_in_a_small_cgroup_is_never_killed(tmp_path):
    path = write("safetensors", tmp_path, {str(i): torch.zeros(8 * MiB) for i in range(4)})
    group = Path(f"/sys/fs/cgroup/memory/wan-loader-test-{os.getpid()}")
    code = (
        "import os, sys, torch, wan_loader\n"
        "path, group = sys.argv[1:]\n"
        "open(f'{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "for beside in (20, 60):\n"
        "    used = int(open(f'{group}/memory.usage_in_bytes').read())\n"
        "    open(f'{group}/memory.limit_in_bytes', 'w').write(str(used + (64 + beside << 20)))\n"
        "    try: print(sum(t.nbytes for t in wan_loader.load_file(path, dtype='bf16').values()))\n"
        "    except wan_loader.HostMemoryError: print('refused')\n"
    )
    group.mkdir()
    try:
        done = subprocess.run([sys.executable, "-c", code, path, group], capture_output=True, text=True, timeout=60)
    finally:
        group.rmdir()
    assert (done.returncode, done.stdout) == (0, f"refused\n{64 * MiB}\n"), done.stderr


def test_memory_limit_too_small_for_the_ring(tmp_path, monkeypatch):
    path = write("safetensors", tmp_path, weights(2))
    monkeypatch.setattr("wan_loader.loading.probe.memory_limit", lambda: 16 * MiB)
    with pytest.raises(wan_loader.HostMemoryError):
        wan_loader.load_file(path, io="buffered")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy pickle"])
@pytest.mark.parametrize(
    "options",
    [
        {"io": "teleport"},
        {"io": ""},
        {"threads": 0},
        {"threads": -1},
        {"threads": 65},
        {"dtype": "int8"},
        {"dtype": "x"},
    ],
    ids=str,
)
def test_options_that_make_no_sense(tmp_path, kind, options):
    path = write(kind, tmp_path, weights(1))
    with pytest.raises(wan_loader.OptionError):
        wan_loader.load_file(path, **options)


@pytest.mark.parametrize("name", ["mps", "meta", "gpu", "cuda:x", "", "cpu:-3", "cpu:3"])
def test_devices_that_are_none(tmp_path, name):
    path = write("safetensors", tmp_path, weights(1))
    with pytest.raises(wan_loader.DeviceError):
        wan_loader.load_file(path, device=name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", 0])
def test_cuda_where_there_is_none(tmp_path, name):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    path = write("safetensors", tmp_path, weights(1))
    with pytest.raises(wan_loader.DeviceError) as caught:
        wan_loader.load_file(path, device=name)
    assert "sees no CUDA device" in caught.value.reason
    assert ("a torch that is built with CUDA" in caught.value.remedy) is (torch.version.cuda is None)
    assert caught.value.remedy.startswith("use device='cpu'")


@pytest.mark.gpu
def test_cuda_devices_by_number(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = write("safetensors", tmp_path, weights(1))
    count = torch.cuda.device_count()
    for index in range(count):
        loaded = wan_loader.load_file(path, device=f"cuda:{index}")
        assert {t.device.index for t in loaded.values()} == {index}
        assert torch.cuda.current_device() == 0
    with pytest.raises(wan_loader.DeviceError):
        wan_loader.load_file(path, device=f"cuda:{count}")


@pytest.mark.gpu
def test_model_larger_than_the_device(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = write("safetensors", tmp_path, weights(1))
    torch.cuda.empty_cache()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)  # nothing cached either
    with pytest.raises(wan_loader.DeviceMemoryError):
        wan_loader.load_file(path, device="cuda")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_fake_tensors_have_no_memory_to_fill(tmp_path, suffix):
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = tmp_path / f"model.{suffix}"
    (torch.save if suffix == "pth" else safetensors.torch.save_file)({"w": torch.ones(3)}, path)
    with FakeTensorMode(), pytest.raises(wan_loader.OptionError, match="FakeTensor of every tensor") as caught:
        wan_loader.load_file(path, dtype="bf16")
    assert caught.value.remedy == "load outside of it"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        wan_loader.load_file(tmp_path / "nothing.safetensors")


def test_loads_side_by_side(tmp_path, device):
    """Several loads in several threads do not disturb each other."""
    path = write("safetensors", tmp_path, weights(6))
    results, errors = [], []

    def work(mode):
        try:
            results.append(wan_loader.load_file(path, device=device, io=mode, dtype="bf16"))
        except BaseException as error:
            errors.append(error)

    with warnings.catch_warnings():
        threads = [threading.Thread(target=work, args=(mode,)) for mode in IO]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert gc.isenabled()
    for loaded in results:
        same_dicts(loaded, {n: t.to(device).to(torch.bfloat16) for n, t in weights(6).items()})


def test_resident_bytes_helper_sees_this_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"x" * 8192)
    with open(path, "rb") as f:
        assert cached_bytes(f.fileno(), 0, 8192) == 8192
