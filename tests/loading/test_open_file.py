"""`open_file`: bit for bit what `safe_open` gives, from every kind of checkpoint."""

import contextlib
import errno
import itertools
import os
import threading

import pytest

torch = pytest.importorskip("torch")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from loader_cases import (  # noqa: E402
    IO,
    KINDS,
    ST_NAMES,
    MiB,
    random_tensor,
    same,
    same_dicts,
    storable,
    weights,
    write,
    write_by_hand,
    zoo,
)
from pairwise import pairwise  # noqa: E402
from programs import run  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.errors import CheckpointError, DeviceError, KeyMismatchError, OptionError  # noqa: E402
from wan_loader.loading import handle  # noqa: E402


@pytest.fixture
def path(tmp_path):
    tensors = {"b": random_tensor(torch.float32, (7, 5)), "a": torch.arange(6).view(2, 3), "n": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "by": "hand"})
    return tmp_path / "model.safetensors"


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Small tensors are read by the handle, large ones by a load of their own: here each both ways."""
    if request.param == "large":
        monkeypatch.setattr(handle, "_SMALL_BYTES", -1)


# whole tensors


@pytest.mark.parametrize(
    ("kind", "mode", "way"),
    pairwise([*KINDS, "legacy pickle"], IO, list(itertools.product([None, "bf16"], [handle._SMALL_BYTES, -1]))),
)
def test_every_tensor_is_that_of_load_file(tmp_path, monkeypatch, device, kind, mode, way):
    dtype, small_bytes = way
    monkeypatch.setattr(handle, "_SMALL_BYTES", small_bytes)
    dtypes = [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64]
    tensors = weights(5) if kind == "legacy pickle" else storable(zoo(dtypes))
    path = write(kind, tmp_path, tensors)
    loaded = wan_loader.load_file(path, device, io=mode, dtype=dtype)
    with wan_loader.open_file(path, device, io=mode, dtype=dtype) as file:
        assert file.keys() == file.offset_keys() == list(loaded)
        for name, expected in loaded.items():
            tensor = file.get_tensor(name)
            same(tensor, expected)
            assert tensor.device.type == device
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        names = list(loaded)[::-3]
        together = file.get_tensors(names)
        assert list(together) == names
        same_dicts(together, {name: loaded[name] for name in names})


@pytest.mark.parametrize("remainder", [0, 1, 4, 6])
@pytest.mark.usefixtures("size")
def test_every_dtype_wherever_it_lies(tmp_path, device, remainder):
    tensors = zoo([getattr(torch, name) for name in ST_NAMES])
    path = write_by_hand(tmp_path / "model.safetensors", tensors, header_remainder=remainder)
    with wan_loader.open_file(path, device) as file:
        for name, expected in tensors.items():
            tensor = file.get_tensor(name)
            same(tensor, expected)
            assert tensor.data_ptr() % tensor.dtype.itemsize == 0


def test_it_answers_as_safe_open_does(path):
    with wan_loader.open_file(path) as ours, safe_open(path, "pt") as theirs:
        assert sorted(ours.keys()) == sorted(theirs.keys())
        if hasattr(theirs, "offset_keys"):
            assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata() == {"format": "pt", "by": "hand"}
        same_dicts(ours.get_tensors(["a", "n"]), {name: theirs.get_tensor(name) for name in ("a", "n")})
        for name in theirs.keys():  # noqa: SIM118
            same(ours.get_tensor(name), theirs.get_tensor(name))
            one, other = ours.get_slice(name), theirs.get_slice(name)
            assert one.get_shape() == other.get_shape()
            assert one.get_dtype() == other.get_dtype()
    save_file({"a": torch.ones(2)}, path)
    with wan_loader.open_file(path) as ours, safe_open(path, "pt") as theirs:
        assert ours.metadata() is theirs.metadata() is None


def test_dtypes_are_named_as_safetensors_names_them(tmp_path):
    tensors = storable({str(dtype): torch.empty(2).to(dtype) for dtype in (torch.bfloat16, torch.int8, torch.bool)})
    tensors["complex128"] = torch.ones(2, dtype=torch.complex128)
    with wan_loader.open_file(write("pth", tmp_path, tensors)) as file:
        names = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    assert sorted(names) == ["BF16", "BOOL", "I8", "complex128"]


def test_tied_tensors_have_memory_of_their_own_unless_loaded_together(tmp_path, device):
    memory = torch.arange(100.0)
    state = {"all": memory, "t": memory[20:32].view(3, 4).t(), "every": memory[::7]}
    with wan_loader.open_file(write("pth", tmp_path, state), device) as file:
        for name, expected in state.items():
            tensor = file.get_tensor(name)
            same(tensor, expected)
            assert tensor.stride() == expected.stride()
            span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            assert tensor.untyped_storage().nbytes() == span * 4
        together = file.get_tensors(["t", "every"])
        assert len({t.untyped_storage().data_ptr() for t in together.values()}) == 1


@pytest.mark.parametrize("mode", IO)
def test_what_is_written_to_a_tensor_is_seen_nowhere_else(tmp_path, mode):
    tensors = {"small": torch.arange(12.0).view(3, 4), "large": random_tensor(torch.uint8, (2, MiB))}
    path = write("safetensors", tmp_path, tensors)
    before = path.read_bytes()
    with wan_loader.open_file(path, io=mode) as file:
        for name, expected in tensors.items():
            file.get_tensor(name).zero_()
            file.get_slice(name)[:].zero_()
            same(file.get_tensor(name), expected)
            same(file.get_slice(name)[1:2], expected[1:2])
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_keep_fp32(path, dtype):
    with wan_loader.open_file(path, dtype=dtype, keep_fp32=["b"]) as file:
        assert file.get_tensor("b").dtype is torch.float32
        assert file.get_tensor("n").dtype is getattr(torch, dtype)
        assert file.get_tensor("a").dtype is torch.int64


def test_a_part_and_an_opened_checkpoint(tmp_path):
    torch.save({"state": {"w": torch.ones(3)}, "step": 5}, tmp_path / "m.pth")
    with wan_loader.open_file(tmp_path / "m.pth", part="state") as file:
        same(file.get_tensor("w"), torch.ones(3))
    with wan_loader.open_file(wan_loader.open_checkpoint(tmp_path / "m.pth", part="state")) as file:
        same(file.get_tensor("w"), torch.ones(3))


def test_quantised_tensors_are_not_converted_without_their_scale(tmp_path):
    tensors = {"w.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.tensor(2.0)}
    path = write("safetensors", tmp_path, tensors)
    with wan_loader.open_file(path, dtype="bf16") as file:
        with pytest.raises(CheckpointError, match="scale"):
            file.get_tensor("w.weight")
        assert file.get_tensor("w.weight_scale_inv").item() == 2
    with wan_loader.open_file(path) as file:
        same(file.get_tensor("w.weight"), tensors["w.weight"])


def test_quantised_tensors_are_numbers_where_a_dtype_is_asked_for(tmp_path):
    raw, scale = torch.arange(12.0).view(3, 4).to(torch.float8_e4m3fn), torch.tensor([0.5, 2.0, 0.1])
    path = write("safetensors", tmp_path, {"w.weight": raw, "w.weight_scale": scale, "v": torch.ones(2)})
    product = (raw.float() * scale.view(3, 1)).bfloat16()
    with wan_loader.open_file(path, dtype="bf16") as file:
        assert file.keys() == ["w.weight", "v"] or file.keys() == ["v", "w.weight"]
        same(file.get_tensor("w.weight"), product)
        same(file.get_tensors(["v", "w.weight"])["w.weight"], product)
        assert (file.get_slice("w.weight").get_shape(), file.get_slice("w.weight").get_dtype()) == ([3, 4], "F32")
        same(file.get_slice("w.weight")[1:, 2], product[1:, 2].contiguous())
    arrived = dict(wan_loader.iter_file(path, dtype="bf16", slices={"w.weight": (slice(1, 3), slice(0, 4, 2))}))
    same(arrived["w.weight"], product[1:3, 0:4:2].contiguous())
    with pytest.raises(wan_loader.OptionError, match=r"w\.weight"):
        wan_loader.iter_file(path, dtype="bf16", slices={"w.weight": (slice(1),) * 3})


# slices

BOUND = st.none() | st.integers(-9, 9)
DIM = st.builds(slice, BOUND, BOUND, st.none() | st.integers(1, 3)) | st.integers(-5, 4) | st.just(...)
INDEX = DIM | st.lists(DIM, max_size=4).map(tuple) | st.sampled_from([None, True, [0, 1], [True] * 5])


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The same tensors by safetensors, from there by us, and from a .pth by us, with strides."""
    directory = tmp_path_factory.mktemp("slices")
    tensors = {
        "x": random_tensor(torch.float32, (5, 4, 6)),
        "v": random_tensor(torch.bfloat16, (9,)),
        "n": torch.tensor(1.5),
        "e": torch.empty(0, 3),
    }
    save_file(tensors, directory / "m.safetensors")
    torch.save({n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in tensors.items()}, directory / "m.pth")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(safe_open(directory / "m.safetensors", "pt")),
            *(
                stack.enter_context(wan_loader.open_file(directory / name, io=mode))
                for name in ("m.safetensors", "m.pth")
                for mode in ("auto", "buffered")
            ),
        ]


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from("xvne"), index=INDEX)
def test_slices_are_those_of_safe_open(opened, name, index):
    theirs, *ours = [file.get_slice(name) for file in opened]
    try:
        expected = theirs[index]
    except Exception as error:
        for one in ours:
            with pytest.raises((type(error), IndexError)):
                one[index]
        return
    for one in ours:
        part = one[index]
        same(*(t.clone(memory_format=torch.contiguous_format) for t in (part, expected)))
        assert part.is_contiguous()


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy pickle"])
@pytest.mark.parametrize("dtype", [None, "fp16"])
@pytest.mark.usefixtures("size")
def test_slices_own_no_more_than_they_show(tmp_path, device, kind, dtype):
    whole = random_tensor(torch.bfloat16, (20, 30))
    with wan_loader.open_file(write(kind, tmp_path, {"w": whole, "x": torch.ones(1)}), device, dtype=dtype) as file:
        rows = file.get_slice("w")
        for index in (slice(3, 9), (slice(None), slice(4, 9)), (slice(1, 20, 3), slice(0, 30, 7)), (2, slice(5)), 4):
            part = rows[index]
            same(part, whole.to(device).to(torch.float16)[index] if dtype else whole[index])
            assert part.untyped_storage().nbytes() == part.nbytes


def test_of_rows_nothing_else_is_read(tmp_path, device, monkeypatch):
    # what a load to a GPU does beforehand reads, too
    monkeypatch.setattr("wan_loader.loading.load_session.get_ready", lambda n_reads: None)
    whole = random_tensor(torch.float32, (4000, 1000))
    path = write("safetensors", tmp_path, {"w": whole})
    with wan_loader.open_file(path, device, io="buffered") as file:
        rows = file.get_slice("w")
        rows[:1]
        before = read_so_far()
        part = rows[100:110]
        assert read_so_far() - before < 40_000 + (64 << 10)
        same(part, whole[100:110])


def read_so_far():
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


def test_a_slice_can_be_gone_through(path):
    with wan_loader.open_file(path) as file:
        rows = list(file.get_slice("b"))
        same(torch.stack(rows), file.get_tensor("b"))


# mistakes, changes, the end


def test_what_cannot_be_had(path):
    with wan_loader.open_file(path) as file:
        for call in (file.get_tensor, file.get_slice, lambda name: file.get_tensors([name])):
            with pytest.raises(KeyMismatchError, match="lacks") as caught:
                call("x")
            assert caught.value.missing == ("x",)
        with pytest.raises(OptionError, match="step -1"):
            file.get_slice("b")[::-1]
        for wrong in ("a", 0.5, {"a": 1}, (slice(0, 1), "a")):
            with pytest.raises(OptionError, match="tensor 'b' cannot be indexed with"):
                file.get_slice("b")[wrong]
        with pytest.raises(OptionError, match="names is the str"):
            file.get_tensors("b")
        with pytest.raises(IndexError, match="out of bounds"):
            file.get_slice("b")[7]
    with pytest.raises(FileNotFoundError):
        wan_loader.open_file(path.with_name("not there.safetensors"))
    with pytest.raises(DeviceError):
        wan_loader.open_file(path, "tpu")


def held_of(path):
    """How many descriptors and mappings of a file this process has."""
    fds = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    with open("/proc/self/maps") as maps:
        return fds.count(str(path)), sum(str(path) in line for line in maps)


def test_after_the_end(tmp_path):
    expected = {"b": random_tensor(torch.uint8, (MiB,)), "a": torch.ones(3)}
    path = write("safetensors", tmp_path, expected)
    with wan_loader.open_file(path) as file:
        kept = file.get_tensors(["b"]) | {"a": file.get_tensor("a")}
        rows = file.get_slice("b")
    assert held_of(path) == (0, 1)
    calls = [(file.get_tensor, "b"), (file.get_tensors, ["b"]), (file.get_slice, "b"), (rows.__getitem__, slice(1, 2))]
    for call, argument in calls:
        with pytest.raises(OptionError, match=r"model\.safetensors was closed: .*: open it again"):
            call(argument)
    file.close()
    assert "closed" in repr(file)
    assert set(file.keys()) == {"a", "b"}
    same_dicts(kept, expected)
    del kept, rows, file, calls, call
    assert held_of(path) == (0, 0)


def test_a_handle_that_is_forgotten_is_closed(path):
    file = wan_loader.open_file(path)
    file.get_tensor("b")
    assert held_of(path) == (1, 0)
    del file
    assert held_of(path) == (0, 0)


def test_views_keep_no_descriptor(tmp_path):
    """A process may have a thousand, and a model has more tensors."""
    tensors = {f"t{i}": torch.full((MiB // 4,), float(i)) for i in range(9)}
    path = write("safetensors", tmp_path, tensors)
    with wan_loader.open_file(path) as file:
        kept = [file.get_tensor(name) for name in tensors]
        assert held_of(path)[0] == 1
    loaded = wan_loader.load_file(path)
    assert held_of(path)[0] == 0
    same_dicts(loaded, tensors)
    del kept, loaded
    assert held_of(path) == (0, 0)


@pytest.mark.parametrize("mode", ["auto", "buffered"])
@pytest.mark.parametrize("change", ["truncated", "replaced", "written"])
@pytest.mark.usefixtures("size")
def test_a_file_that_changes_is_an_error(path, mode, change):
    with wan_loader.open_file(path, io=mode) as file:
        file.get_tensor("b")
        if change == "truncated":
            os.truncate(path, path.stat().st_size - 40)
        elif change == "replaced":
            save_file({"b": torch.zeros(7, 5)}, path.with_name("other"))
            os.replace(path.with_name("other"), path)
        else:
            os.utime(path)
        for name in ("b", "a"):
            with pytest.raises(CheckpointError, match=r"model\.safetensors"):
                file.get_tensor(name)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            file.get_tensors(["b"])


def test_a_disk_that_fails_is_named(path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    with wan_loader.open_file(path) as file:
        monkeypatch.setattr("os.preadv", fail)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: reading 140 bytes .*Input/output error"):
            file.get_tensor("b")
        monkeypatch.setattr("os.preadv", lambda *args: 0)
        with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte"):
            file.get_tensor("b")


def test_several_threads(tmp_path, device):
    tensors = weights(20)
    with wan_loader.open_file(write("safetensors", tmp_path, tensors), device, dtype="fp16") as file:
        wrong = []

        def load():
            for name, expected in tensors.items():
                if not torch.equal(file.get_tensor(name).cpu(), expected.to(torch.float16)):
                    wrong.append(name)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_large_tensor_goes_through_the_ring(tmp_path, device, monkeypatch):
    tensors = {"small": torch.ones(3), "large": random_tensor(torch.float32, (5 * MiB // 4 + 3,))}
    read_into, read = handle._read_into, []
    monkeypatch.setattr(
        handle, "_read_into", lambda fd, to, storage: read.append(storage) or read_into(fd, to, storage)
    )
    with wan_loader.open_file(write("safetensors", tmp_path, tensors), device, io="buffered") as file:
        for name, expected in tensors.items():
            same(file.get_tensor(name), expected)
    assert [storage.nbytes for storage in read] == [12]


def test_what_is_cut_is_not_mapped(tmp_path, monkeypatch):
    """This process copies it, and would be killed if the file shrank."""

    def refuse(*args):
        raise AssertionError("mapped")

    whole = random_tensor(torch.float32, (1200, 1000))
    path = write("safetensors", tmp_path, {"w": whole})
    monkeypatch.setattr("wan_loader.loading.allocate.map_private", refuse)
    for mode in ("auto", "mapped"):
        with wan_loader.open_file(path, io=mode) as file:
            same(file.get_slice("w")[:, 3:], whole[:, 3:])
            same(file.get_slice("w")[:, :3], whole[:, :3])


def test_in_a_forked_process(tmp_path):
    """Kernels of torch that divide their work wait there for threads that do not exist."""
    path = write("safetensors", tmp_path, {"w": torch.arange(400_000.0).view(1000, 400)})
    program = f"""
import os, signal, torch, wan_loader
torch.set_num_threads(2)
torch.randn(2000, 2000).to(torch.float16)
child = os.fork()
if not child:
    signal.alarm(30)
    with wan_loader.open_file({str(path)!r}, dtype="fp16") as file:
        assert file.get_tensor("w").numel() == 400_000
    with wan_loader.open_file({str(path)!r}) as file:
        assert file.get_slice("w")[:, 1:][5, 7] == 2008
    ((_, part),) = wan_loader.iter_file({str(path)!r}, slices={{"w": (slice(None), slice(1, None))}})
    assert part[5, 7] == 2008
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
