"""`iter_file`: the tensors of `load_file`, each as soon as it is there; what nobody waits for any more is not read."""

import contextlib
import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from loader_cases import IO, KINDS, MiB, random_tensor, same, same_dicts, storable, weights, write, zoo  # noqa: E402
from pairwise import pairwise  # noqa: E402
from programs import run  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.engine import activity, convert  # noqa: E402
from wan_loader.engine.read_queue import ReadQueue  # noqa: E402
from wan_loader.errors import CheckpointError, KeyMismatchError, LoadCancelledError, OptionError  # noqa: E402
from wan_loader.plan import engine_settings  # noqa: E402

MODES = ["auto", "direct", "buffered"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 40 tensors of 1 MiB that nobody changes, of which few are under way at once: one read, of 1 MiB."""
    tensors = {f"layer.{i:02d}": random_tensor(torch.float32, (512, 512), seed=i) for i in range(40)}
    return write("safetensors", tmp_path_factory.mktemp("large"), tensors), tensors


@pytest.fixture
def small_slots(monkeypatch):
    """Rings of so few and small slots that a file of some MiB passes through them many times."""
    for name in ("_DISK", "_CACHED", "_CPU"):
        monkeypatch.setattr(engine_settings, name, engine_settings._Ring(2, 2, MiB))


def bytes_read():
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


@pytest.fixture
def nothing_made_ready(monkeypatch):
    """What a load to a GPU does beforehand reads, too."""
    monkeypatch.setattr("wan_loader.loading.load_session.get_ready", lambda n_reads: None)


def engine_threads():
    return {t for t in threading.enumerate() if t.name in ("mapper", "pinning", "release", "reader")}


# what arrives


@pytest.mark.parametrize(("kind", "mode", "dtype"), pairwise([*KINDS, "legacy pickle"], IO, [None, "bf16"]))
def test_the_tensors_are_those_of_load_file(tmp_path, device, kind, mode, dtype):
    path = write(kind, tmp_path, weights(7) if kind == "legacy pickle" else storable(zoo()))
    arrived = list(wan_loader.iter_file(path, device, io=mode, dtype=dtype))
    loaded = wan_loader.load_file(path, device, io=mode, dtype=dtype)
    assert len(arrived) == len(loaded)
    same_dicts(dict(arrived), loaded)
    for name, tensor in arrived:
        assert tensor.device.type == device
        assert tensor.stride() == loaded[name].stride()
        assert tensor.untyped_storage().nbytes() == loaded[name].untyped_storage().nbytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_each_is_complete_when_it_comes_and_early_ones_come_early(
    large, device, small_slots, mode, dtype, nothing_made_ready
):
    path, tensors = large
    names = []
    before = bytes_read()
    for name, tensor in wan_loader.iter_file(path, device, io=mode, dtype=dtype, threads=1):
        if not names and not (mode == "auto" and dtype is None):  # else it may be a view
            assert bytes_read() - before < 12 * MiB
        same(tensor, tensors[name].to(device).to(tensor.dtype))
        names.append(name)
    assert names == list(tensors)


def test_names_are_the_order(large, small_slots):
    path, _ = large
    names = ["layer.31", "layer.02", "layer.17", "layer.02"]
    arrivals = wan_loader.iter_file(path, io="buffered", threads=1, names=names)
    assert [name for name, _ in arrivals] == ["layer.31", "layer.02", "layer.17"]


def test_tied_tensors_come_together_and_share(tmp_path, device):
    whole = torch.arange(100.0)
    state = {"a": whole, "b": whole[:50].view(5, 10), "c": whole.view(10, 10).t(), "d": torch.ones(3)}
    path = write("pth", tmp_path, state)
    arrived = dict(wan_loader.iter_file(path, device))
    same_dicts(arrived, state)
    assert arrived["c"].stride() == (1, 10)
    assert len({arrived[name].untyped_storage().data_ptr() for name in "abc"}) == 1
    parted = dict(wan_loader.iter_file(path, device, dtype="fp16", keep_fp32=["b"]))
    same_dicts(parted, {n: t.to(torch.float32 if n == "b" else torch.float16) for n, t in state.items()})


def test_the_report_is_what_the_generator_returns(large):
    path, tensors = large
    arrivals = wan_loader.iter_file(path, io="buffered")
    reports = []

    def returned():
        reports.append((yield from arrivals))

    assert len(list(returned())) == len(tensors)
    (report,) = reports
    assert report.n_tensors == len(tensors)
    assert report.io.nbytes_buffered == sum(t.nbytes for t in tensors.values())


def test_an_opened_checkpoint_and_a_part(tmp_path):
    torch.save({"state": {"w": torch.ones(3)}, "step": 5}, tmp_path / "m.pth")
    opened = wan_loader.open_checkpoint(tmp_path / "m.pth", part="state")
    for arrivals in (wan_loader.iter_file(opened), wan_loader.iter_file(tmp_path / "m.pth", part="state")):
        same_dicts(dict(arrivals), {"w": torch.ones(3)})


# slices


def cases(tensors):
    """Slices, and what they give."""
    a, b = tensors["a"], tensors["b"]
    return {
        "pair": ({"a": (2, 5)}, {"a": a[2:5]}),
        "rows": ({"a": slice(-3, None), "b": slice(0, 100)}, {"a": a[-3:], "b": b[:100]}),
        "step": ({"a": slice(1, None, 3)}, {"a": a[1::3]}),
        "columns": ({"a": (slice(None), slice(2, 9))}, {"a": a[:, 2:9]}),
        "both": ({"a": (slice(3, 7), slice(1, None, 4)), "b": (slice(1), slice(1), slice(1))}, {"a": a[3:7, 1::4]}),
        "none": ({"a": slice(5, 2), "b": slice(99, None)}, {"a": a[5:2], "b": b[99:]}),
        "all": ({"a": slice(None)}, {"a": a}),
    }


@pytest.fixture
def sliced():
    return {
        "a": random_tensor(torch.float32, (11, 13)),
        "odd": random_tensor(torch.uint8, (3,)),
        "b": random_tensor(torch.bfloat16, (4, 3, 5)),
    }


@pytest.mark.parametrize(
    ("case", "kind", "way"),
    pairwise(
        ["pair", "rows", "step", "columns", "both", "none", "all"],
        [*KINDS, "legacy pickle"],
        list(itertools.product(IO, [None, "fp16"])),
    ),
)
def test_slices(tmp_path, device, sliced, case, kind, way):
    mode, dtype = way
    path = write(kind, tmp_path, sliced)
    slices, expected = cases(sliced)[case]
    if case == "both":
        expected["b"] = sliced["b"][:1, :1, :1]
    arrived = dict(wan_loader.iter_file(path, device, io=mode, dtype=dtype, slices=slices))
    assert arrived.keys() == sliced.keys()
    for name, tensor in arrived.items():
        whole = expected.get(name, sliced[name]).to(device)
        converted = whole.to(torch.float16) if dtype and whole.is_floating_point() else whole
        same(tensor, converted)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("mode", ["buffered", "mapped"])
def test_slices_of_a_tensor_with_strides_that_is_tied(tmp_path, device, mode):
    memory = torch.arange(120.0)
    state = {"t": memory.view(10, 12).t(), "flat": memory, "every": memory.as_strided((5, 4), (20, 2), 3)}
    path = write("pth", tmp_path, state)
    slices = {"t": (slice(2, 7), slice(3, 5)), "every": slice(1, 3)}
    arrived = dict(wan_loader.iter_file(path, device, io=mode, slices=slices))
    same_dicts(arrived, {"t": state["t"][2:7, 3:5], "flat": memory, "every": state["every"][1:3]})
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in arrived.values())


def test_what_is_cut_is_not_mapped(tmp_path, monkeypatch):
    """This process copies it, and would be killed if the file shrank."""

    def refuse(*args):
        raise AssertionError("mapped")

    whole = random_tensor(torch.float32, (700, 800))
    path = write("safetensors", tmp_path, {"w": whole})
    monkeypatch.setattr("wan_loader.loading.allocate.map_private", refuse)
    for mode in ("auto", "mapped"):
        ((_, part),) = wan_loader.iter_file(path, io=mode, slices={"w": (slice(None), slice(3, 700))})
        same(part, whole[:, 3:700])


@pytest.mark.parametrize("mode", ["buffered", "direct"])
def test_of_rows_nothing_else_is_read(large, device, mode, nothing_made_ready):
    path, tensors = large
    opened = wan_loader.open_checkpoint(path)
    before = bytes_read()
    ((_, rows),) = wan_loader.iter_file(
        opened, device, io=mode, names=["layer.20"], slices={"layer.20": slice(100, 110)}
    )
    # small files of the system are looked at, too
    assert bytes_read() - before < 10 * 512 * 4 + (64 << 10)
    same(rows, tensors["layer.20"][100:110].to(device))


def test_mistakes_are_told_at_the_call(tmp_path):
    path = write("safetensors", tmp_path, {"a": torch.ones(3, 4), "n": torch.tensor(1.0)})
    for wrong, message in [
        ({"slices": {"a": slice(None, None, -1)}}, r"slices\['a'\]: step -1"),
        ({"slices": {"a": (slice(1),) * 3}}, r"slices\['a'\]: too many indices"),
        ({"slices": {"n": slice(1)}}, r"slices\['n'\]: too many indices for a tensor of 0 dimensions"),
        ({"slices": {"a": slice(1)}, "names": ["n"]}, "slices has tensors that names leaves out: a"),
        ({"cancel": 5}, "cancel"),
        ({"observer": 5}, "observer"),
    ]:
        with pytest.raises(OptionError, match=message):
            wan_loader.iter_file(path, **wrong)
    for wrong in ({"names": ["x"]}, {"slices": {"x": slice(1)}}):
        with pytest.raises(KeyMismatchError) as caught:
            wan_loader.iter_file(path, **wrong)
        assert caught.value.missing == ("x",)
    with pytest.raises(FileNotFoundError):
        wan_loader.iter_file(tmp_path / "not there.safetensors")


# the end, early or late


def ends_by_close(arrivals):
    next(arrivals)
    arrivals.close()


def ends_by_collection(arrivals):
    next(arrivals)


def ends_by_an_error(arrivals):
    with contextlib.suppress(ZeroDivisionError):
        for _ in arrivals:
            _ = 1 / 0


def never_begins(arrivals):
    arrivals.close()


def ends_by_itself(arrivals):
    for _ in arrivals:
        pass


@pytest.mark.parametrize(
    ("end", "mode", "dtype"),
    pairwise(
        [ends_by_close, ends_by_collection, ends_by_an_error, never_begins, ends_by_itself], MODES, [None, "bf16"]
    ),
)
def test_whatever_ends_it_nothing_stays(large, device, small_slots, open_files, mode, dtype, end):
    path, _ = large
    ends_by_itself(wan_loader.iter_file(path, device, io=mode, dtype=dtype))  # what is kept for later loads is made
    time.sleep(0.1 if device == "cuda" else 0)
    before, read = open_files(path), bytes_read()
    arrivals = [wan_loader.iter_file(path, device, io=mode, dtype=dtype)]
    began = time.monotonic()
    end(arrivals.pop())
    assert time.monotonic() - began < 1 or end is ends_by_itself
    deadline = time.monotonic() + 5
    while engine_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine_threads()
    assert open_files(path) == before
    assert activity.wait_until_idle(0)
    if end is not ends_by_itself and not (mode == "auto" and dtype is None):
        assert bytes_read() - read < 20 * MiB  # of 40


def test_memory_that_is_read_into_stays_until_the_read_has_ended(large, small_slots, monkeypatch):
    """Closed while reads hang: what they write to may go only when they have returned."""
    path, _ = large
    arrivals = wan_loader.iter_file(path, io="buffered")
    next(arrivals)
    release, end = threading.Event(), ReadQueue.end

    def late(queue):
        release.wait(10)
        end(queue)

    monkeypatch.setattr(ReadQueue, "end", late)
    assert_kept_until(release, arrivals)


def test_memory_that_is_converted_into_stays_until_the_read_has_ended(large, small_slots, monkeypatch):
    path, _ = large
    hangs, release, plain = threading.Event(), threading.Event(), convert.read_at

    def late(fd, address, nbytes, offset):
        if offset > 2.5 * MiB:
            hangs.set()
            release.wait(10)
        return plain(fd, address, nbytes, offset)

    monkeypatch.setattr(convert, "read_at", late)
    arrivals = wan_loader.iter_file(path, io="buffered", dtype="bf16", threads=3)
    next(arrivals)
    assert hangs.wait(10), "what was drawn is read without anybody asking for it"
    assert_kept_until(release, arrivals)


def assert_kept_until(release, arrivals):
    """Close an iteration whose reads hang until `release`, and see its memory go only after that."""
    held = weakref.ref(arrivals.gi_frame.f_locals["moving"].gi_frame.f_locals["allocation"])
    arrivals.close()
    gc.collect()
    assert held() is not None
    release.set()
    deadline = time.monotonic() + 5
    while held() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held() is None


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_what_is_let_go_is_freed(large, device, small_slots, dtype, tmp_path):
    path, _ = large
    if device == "cuda":
        if dtype:
            pytest.skip("what a GPU converts is referred to until the end")
        # more than the blocks that are planned ahead, of 8 MiB each
        path = write("safetensors", tmp_path, {f"t{i}": torch.ones(MiB // 4) for i in range(240)})
    memories = []
    for _, tensor in wan_loader.iter_file(path, device, io="buffered", dtype=dtype, threads=1):
        memories.append(weakref.ref(tensor))
        if device == "cuda":
            assert torch.cuda.memory_allocated() < 160 * MiB
        del tensor
        assert memories[-1]() is None


@pytest.mark.parametrize(("mode", "least"), [("buffered", 3), ("auto", 0)])
def test_memory_goes_back_to_the_system(large, small_slots, monkeypatch, mode, least):
    """Not where tensors are views of the file."""
    path, _ = large
    trims = []
    monkeypatch.setattr("wan_loader.loading.iterate._TRIM_BYTES", 8 * MiB)
    monkeypatch.setattr("wan_loader.loading.iterate.trim_heap", lambda: trims.append(1))
    for _ in wan_loader.iter_file(path, io=mode):
        pass
    assert least <= len(trims) <= 2 * least


def test_a_load_of_more_than_fits_passes_through(tmp_path):
    """A process never has more than 100 MB of its own of a load of 250 MB, or of 125 MB where it is converted."""
    count = 60
    path = write("safetensors", tmp_path, {f"t{i}": torch.full((MiB,), float(i)) for i in range(count)})
    program = f"""
import torch, wan_loader
from wan_loader.loading import iterate
from wan_loader.plan import engine_settings
engine_settings._CPU = engine_settings._Ring(2, 2, {MiB})
iterate._TRIM_BYTES = {32 * MiB}

def own_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

for name, tensor in wan_loader.iter_file({str(path)!r}, io="buffered", names=["t0"]): pass
before = own_kib()
for dtype in (None, "bf16"):
    n = 0
    for name, tensor in wan_loader.iter_file({str(path)!r}, io="buffered", dtype=dtype):
        assert tensor[0] == int(name[1:]) and tensor[-1] == tensor[0]
        assert own_kib() - before < 100 << 10
        n += 1
    assert n == {count}
"""
    done = run("-c", program, timeout=100)
    assert done.returncode == 0, done.stderr


# what the caller does in between


@pytest.mark.parametrize("mode", MODES)
def test_between_two_steps_nothing_of_the_caller_is_changed(large, device, small_slots, mode):
    path, _ = large
    assert gc.isenabled()
    n_current = torch.cuda.current_device() if device == "cuda" else None
    arrivals = wan_loader.iter_file(path, device, io=mode, dtype="bf16")
    for _ in range(5):
        assert gc.isenabled()
        assert activity.wait_until_idle(0)
        next(arrivals)
    gc.disable()
    try:
        next(arrivals)
        assert not gc.isenabled()
    finally:
        gc.enable()
    arrivals.close()
    assert n_current is None or torch.cuda.current_device() == n_current


def test_within_a_step_it_is_a_load_as_others(large, small_slots):
    """No collection of cycles, and what can wait for loads waits: seen by an observer, who is told in the steps."""

    seen = set()

    class Watching:
        def record(self, span):
            seen.add((span.name, gc.isenabled(), activity.wait_until_idle(0)))

    path, _ = large
    for _ in wan_loader.iter_file(path, io="buffered", observer=Watching()):
        pass
    assert {("read", False, False), ("header", False, True)} <= seen
    assert not {(enabled, idle) for name, enabled, idle in seen if name == "read"} - {(False, False)}


@pytest.mark.gpu
def test_the_current_device_is_the_callers(large):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    path, tensors = large
    for name, tensor in wan_loader.iter_file(path, "cuda:1", io="buffered"):
        assert torch.cuda.current_device() == 0
        same(tensor, tensors[name])


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_other_loads_in_between(large, device, small_slots, dtype):
    path, tensors = large
    options = {"io": "buffered", "dtype": dtype}
    expected = {n: t.to(device).to(torch.bfloat16) if dtype else t for n, t in tensors.items()}
    first, second = wan_loader.iter_file(path, device, **options), wan_loader.iter_file(path, device, **options)
    got = [{}, {}]
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        for into, (name, tensor) in zip(got, (one, other), strict=True):
            into[name] = tensor
        if number % 10 == 0:
            same_dicts(wan_loader.load_file(path, device, **options), expected)
            (torch.randn(400, 400, device=device) @ torch.randn(400, 400, device=device)).sum().item()
    same_dicts(got[0], expected)
    same_dicts(got[1], expected)


def test_each_step_may_be_another_threads(large, device, small_slots):
    path, tensors = large
    arrivals, got = wan_loader.iter_file(path, device, io="buffered"), {}

    def step():
        name, tensor = next(arrivals)
        got[name] = tensor

    for _ in tensors:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert next(arrivals, None) is None
    same_dicts(got, tensors)


@pytest.mark.parametrize("action", ["close", "go on", "exit"])
def test_a_fork_in_between(tmp_path, action):
    """The child has a copy of the generator: it neither reads on nor waits for what stayed behind."""
    path = write("safetensors", tmp_path, {f"t{i}": torch.full((MiB // 4,), float(i)) for i in range(30)})
    program = f"""
import os, sys, torch, wan_loader
for _ in range({2 if action == "exit" else 5}):
    arrivals = wan_loader.iter_file({str(path)!r}, io="buffered")
    first = dict([next(arrivals)])
    if not (child := os.fork()):
        if {action!r} == "exit":
            sys.exit(0)
        try:
            arrivals.close() if {action!r} == "close" else list(arrivals)
        except wan_loader.OptionError as error:
            os._exit("forked" not in str(error))
        os._exit({action!r} != "close")
    assert os.waitpid(child, 0)[1] == 0
    whole = first | dict(arrivals)
    assert len(whole) == 30 and all((tensor == int(name[1:])).all() for name, tensor in whole.items())
"""
    if action == "exit":  # Python takes its modules apart
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    else:
        done = run("-c", program)
        assert done.returncode == 0, done.stderr


def test_a_token_ends_it(large, small_slots):
    path, _ = large
    token = wan_loader.CancelToken()
    arrivals = wan_loader.iter_file(path, io="buffered", cancel=token)
    next(arrivals)
    token.cancel()
    with pytest.raises(LoadCancelledError):
        for _ in arrivals:
            pass
    with pytest.raises(LoadCancelledError):
        wan_loader.iter_file(path, cancel=token)


def touch(path):
    os.utime(path)


def cut_off(path):
    os.truncate(path, path.stat().st_size // 4)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [touch, cut_off, remove])
def test_a_file_that_changes_meanwhile_is_an_error(large, tmp_path, device, small_slots, mode, change):
    path = shutil.copy(large[0], tmp_path / "changes.safetensors")
    arrivals = wan_loader.iter_file(path, device, io=mode, dtype="bf16")
    next(arrivals)
    change(path)
    with pytest.raises(CheckpointError, match=path.name):
        for _ in arrivals:
            pass
    assert next(arrivals, None) is None


def test_spans_are_told(large):
    path, _ = large
    recorder = wan_loader.Recorder()
    for _ in wan_loader.iter_file(path, io="buffered", observer=recorder):
        pass
    assert {"header", "init", "read"} <= {span.name for span in recorder.spans}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_iterate_over(tmp_path, mode):
    empty = write("safetensors", tmp_path, weights(0))
    assert list(wan_loader.iter_file(empty, io=mode)) == []
    assert list(wan_loader.iter_file(write("safetensors", tmp_path, weights(2)), io=mode, names=[])) == []


def test_it_works_on_a_real_library_file(tmp_path):
    """Written by safetensors, in its order."""
    tensors = weights(5)
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    same_dicts(dict(wan_loader.iter_file(tmp_path / "m.safetensors", io="buffered")), tensors)
