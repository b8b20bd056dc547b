"""Proofs for tensors of real files, as programs and libraries make them; never a proof for what was written."""

import ctypes
import os
import shutil
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_cases import random_tensor, same, storable, zoo
from proven import check_proof, from_file

import wan_loader
from wan_loader.provenance import prove as module
from wan_loader.provenance.proof import Reason
from wan_loader.provenance.prove import prove
from wan_loader.system import own_pages
from wan_loader.system.own_pages import PAGE, read_entries, scan_pages

LOOKS = [scan_pages, read_entries] if own_pages._honest_look() is scan_pages else [read_entries]
pytestmark = pytest.mark.skipif(own_pages._honest_look() is None, reason="the kernel does not tell")

ROWS, COLUMNS = 64, 1000


def make():
    """Tensors of some pages each, none of which begins where a page does, and small ones beside them."""
    return {
        "big": random_tensor(torch.float32, (ROWS, COLUMNS), 1).nan_to_num(),
        "half": random_tensor(torch.bfloat16, (20, COLUMNS + 1), 2),
        "small": random_tensor(torch.float32, (5,), 3),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture(params=LOOKS, ids=lambda look: look.__name__)
def both_looks(request, monkeypatch):
    """Each way to look that this kernel has."""
    monkeypatch.setattr(own_pages, "_honest_look", lambda: request.param)


def saved(directory, tensors=None):
    path = directory / "w.safetensors"
    safetensors.torch.save_file(tensors or make(), path)
    return path


def only(tensor):
    """The range of one tensor, or the reason against it; what has a range is checked."""
    proof = prove({"t": tensor})
    check_proof(proof, {"t": tensor})
    return proof.ranges.get("t") or proof.reasons["t"]


# --- what libraries and views make ---


def by_safe_open(path):
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def by_slice(path):
    with safetensors.safe_open(path, "pt") as file:
        return {"big": file.get_slice("big")[3:7], "half": file.get_slice("half")[...]}


def by_torch(path):
    torch.save(safetensors.torch.load_file(path), path.with_suffix(".pth"))
    return torch.load(path.with_suffix(".pth"), mmap=True)


def by_numpy(path):
    data = numpy.memmap(path, mode="c")
    return {"bytes": torch.from_numpy(data)[8:], "floats": torch.from_numpy(data[8:408].view(numpy.float32))}


LIBRARIES = {
    "load_file": safetensors.torch.load_file,
    "safe_open": by_safe_open,
    "get_slice": by_slice,
    "torch.load": by_torch,
    "numpy.memmap": by_numpy,
    "ours": wan_loader.load_file,
    "ours, mapped": lambda path: wan_loader.load_file(path, io="mapped"),
    "ours, one by one": lambda path: dict(wan_loader.iter_file(path)),
}


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES.keys())
def test_tensors_that_libraries_map(both_looks, disk_or_memory, library):
    tensors = library(saved(disk_or_memory))
    proof = prove(tensors)
    check_proof(proof, tensors)
    assert proof.ranges.keys() == {name for name in tensors if name != "empty"}
    assert set(proof.reasons.values()) <= {Reason.EMPTY}
    assert [Path(file.path).parent for file in proof.files] == [disk_or_memory]


def test_every_dtype_and_shape(tmp_path):
    tensors = storable(zoo())
    path = saved(tmp_path, tensors)
    read = safetensors.torch.load_file(path)
    proof = prove(read)
    check_proof(proof, read)
    assert all(proof.reasons.get(name, Reason.EMPTY) is Reason.EMPTY for name in read)
    assert len(proof.ranges) == sum(tensor.numel() > 0 for tensor in tensors.values())


def test_views_of_views(tmp_path):
    big = safetensors.torch.load_file(saved(tmp_path))["big"]
    start = only(big).start
    views = {
        "rows": big[10:20],
        "column": big[:, 7],
        "steps": big[3::5, 1::2],
        "transposed": big.T,
        "of a view": big[10:].view(-1)[5:].view(torch.int16)[1:],
        "bytes": big.view(torch.uint8)[1:, 3:],
        "expanded": big[3, 4].expand(9, 2),
        "parameter": torch.nn.Parameter(big[1]),
        "detached": torch.nn.Parameter(big)[2:].detach(),
        "element": big[5, 5],
    }
    proof = prove(views)
    check_proof(proof, views)
    assert not proof.reasons
    assert proof.ranges["rows"].start == start + 10 * COLUMNS * 4
    assert proof.ranges["element"].nbytes == 4
    assert proof.ranges["expanded"].nbytes == 4
    assert proof.ranges["column"].nbytes == ((ROWS - 1) * COLUMNS + 1) * 4


def test_mappings_that_begin_within_a_file(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(500_000.0), "b": -torch.arange(500_000.0)})
    tensors = {
        **wan_loader.load_file(path),
        "numpy": torch.from_numpy(numpy.memmap(path, mode="c", offset=3 * PAGE + 64, dtype=numpy.float32)),
    }
    proof = prove(tensors)
    check_proof(proof, tensors)
    assert not proof.reasons
    assert proof.ranges["numpy"].start == 3 * PAGE + 64


def test_one_object_with_two_names_is_tied_and_views_are_not(tmp_path):
    big = safetensors.torch.load_file(saved(tmp_path))["big"]
    written = big.clone()
    tensors = {"a": big, "b": big, "c": big.view_as(big), "d": written, "e": written}
    proof = prove(tensors)
    assert proof.ties == {"b": "a", "e": "d"}
    assert proof.ranges.keys() == {"a", "b", "c"}
    assert proof.reasons == {"d": Reason.NO_FILE, "e": Reason.NO_FILE}
    assert prove({}).ranges == {}


def test_two_files_and_two_mappings_of_one(tmp_path):
    (tmp_path / "2").mkdir()
    path, other = saved(tmp_path), saved(tmp_path / "2")
    first, again, second = map(safetensors.torch.load_file, (path, path, other))
    tensors = {"first": first["big"], "again": again["big"], "second": second["big"]}
    proof = prove(tensors)
    check_proof(proof, tensors)
    assert [file.path for file in proof.files] == [str(path), str(other)]
    assert proof.ranges["first"] == proof.ranges["again"]


# --- writes, by whatever means ---


def by_data(tensor):
    tensor.data[0] += 1


def by_numpy_array(tensor):
    tensor.numpy()[1] = 3


def by_address(tensor):
    ctypes.memset(tensor.data_ptr() + 4, 1, 1)


def by_kernel(tensor):
    tensor.mul_(2)


def by_copy(tensor):
    tensor.copy_(torch.zeros_like(tensor))


def by_out(tensor):
    torch.zeros(tensor.shape, out=tensor)


def by_parameter(tensor):
    with torch.no_grad():
        torch.nn.Parameter(tensor).add_(1)


def by_the_same_value(tensor):
    tensor.data[7] = tensor.data[7].clone()


def by_reading_a_file(tensor):
    with open("/dev/zero", "rb") as zeros:
        zeros.readinto(tensor.numpy().view(numpy.uint8).reshape(-1)[8000:8010])


WRITES = [by_data, by_numpy_array, by_address, by_kernel, by_copy, by_out, by_parameter, by_the_same_value]


@pytest.mark.parametrize("write", [*WRITES, by_reading_a_file], ids=lambda write: write.__name__)
def test_what_was_written_is_not_proven(both_looks, disk_or_memory, write):
    tensors = safetensors.torch.load_file(saved(disk_or_memory))
    big, untouched = tensors["big"], tensors["half"]
    if write is by_the_same_value:  # a whole page of it, so that no neighbour can have been meant
        big[4:10].data.copy_(big[4:10].clone())
    write(big)
    proof = prove(tensors)
    check_proof(proof, tensors)
    assert proof.reasons == {"big": Reason.WRITTEN, "empty": Reason.EMPTY}
    assert "half" in proof.ranges
    same(from_file(proof, "half"), untouched)


def test_an_equal_proof_says_that_nothing_was_written_meanwhile(tmp_path):
    tensors = safetensors.torch.load_file(saved(tmp_path))
    before = prove(tensors)
    assert prove(tensors) == before
    tensors["half"].data[3] = 1
    assert prove(tensors) != before


def test_a_neighbour_on_the_same_page(both_looks, tmp_path):
    """Its write makes a copy of the page, which holds some of our bytes as well, as they were."""
    tensors = {"a": torch.arange(1500.0), "b": torch.arange(1500.0) + 1, "c": torch.arange(9.0)}
    read = safetensors.torch.load_file(saved(tmp_path, tensors))
    read["b"][0] = -1
    read["b"][-1] = -1
    proof = prove(read)
    check_proof(proof, read)
    assert proof.reasons == {"b": Reason.WRITTEN}
    assert proof.ranges.keys() == {"a", "c"}
    read["c"][2] = -1
    assert prove(read).reasons == {"b": Reason.WRITTEN, "c": Reason.WRITTEN}
    read["c"][2] = tensors["c"][2]  # small ones are compared, so what was put back is right
    read["a"][-1] += 0
    assert prove(read).reasons == {"b": Reason.WRITTEN}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6000), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 24000), st.integers(1, 5000), st.booleans()), max_size=4),
    st.integers(0, 100),
)
def test_proven_is_what_no_write_has_touched(tmp_path_factory, sizes, writes, lead):
    """Proven iff no whole page of it was written, and what else was written to its pages is what was there."""
    path = tmp_path_factory.mktemp("w") / "w.bin"
    content = random_tensor(torch.uint8, (lead + sum(sizes),)).numpy()
    content.tofile(path)
    memory = numpy.memmap(path, mode="c")
    starts = [lead + sum(sizes[:i]) for i in range(len(sizes))]
    tensors = {str(i): torch.from_numpy(memory[a : a + n]) for i, (a, n) in enumerate(zip(starts, sizes, strict=True))}
    pages = set()
    for start, count, same_value in writes:
        end = min(start + count, len(content))
        if start < end:
            memory[start:end] = content[start:end] if same_value else 255 - content[start:end]
            pages |= set(range(start // PAGE, (end - 1) // PAGE + 1))
    expected = set()
    for i, (start, count) in enumerate(zip(starts, sizes, strict=True)):
        whole = range(-(-start // PAGE), (start + count) // PAGE)
        if not pages & set(whole) and (memory[start : start + count] == content[start : start + count]).all():
            expected.add(str(i))
    proof = prove(tensors)
    check_proof(proof, tensors)
    assert proof.ranges.keys() == expected


def test_a_parent_and_its_child(tmp_path):
    tensors = safetensors.torch.load_file(saved(tmp_path))
    tensors["small"] += 1
    pid = os.fork()
    if pid == 0:
        try:
            inherited = prove(tensors)
            ctypes.memset(tensors["half"].data_ptr() + 9000, 1, 9000)
            written = prove(tensors)
            check_proof(written, tensors)
            right = [
                inherited.reasons.keys() == {"small", "empty"},
                written.reasons.keys() == {"small", "half", "empty"},
            ]
            os._exit(0 if all(right) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert prove(tensors).reasons == {"small": Reason.WRITTEN, "empty": Reason.EMPTY}


def test_a_written_page_that_was_swapped_out(tmp_path):
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("there is no swap")
    big = safetensors.torch.load_file(saved(tmp_path))["big"]
    big[:] = 1
    start = -(-big.data_ptr() // PAGE) * PAGE
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(10 * PAGE), 21) == 0  # MADV_PAGEOUT
    assert only(big) is Reason.WRITTEN


def test_unwritten_pages_that_were_dropped(disk_or_memory, evict):
    path = saved(disk_or_memory)
    tensors = safetensors.torch.load_file(path)
    assert isinstance(only(tensors["big"]), tuple)
    big = tensors["big"]
    start, libc = -(-big.data_ptr() // PAGE) * PAGE, ctypes.CDLL(None)
    assert libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(10 * PAGE), 4) == 0  # MADV_DONTNEED
    assert isinstance(only(big), tuple)
    big[:] = 1
    assert libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(10 * PAGE), 4) == 0
    assert only(big) is Reason.WRITTEN  # those around them are still written


# --- files that change ---


def test_a_file_that_was_replaced_or_deleted(disk_or_memory):
    path = saved(disk_or_memory)
    tensors = safetensors.torch.load_file(path)
    shutil.copy(path, disk_or_memory / "new")
    os.replace(disk_or_memory / "new", path)
    assert only(tensors["big"]) is Reason.REPLACED
    path.unlink()
    assert only(tensors["big"]) is Reason.DELETED


def test_a_file_that_was_moved_is_found(disk_or_memory):
    path = saved(disk_or_memory)
    tensors = safetensors.torch.load_file(path)
    path.rename(disk_or_memory / "elsewhere (deleted)")
    proof = prove(tensors)
    check_proof(proof, tensors)
    assert proof.files[0].path == str(disk_or_memory / "elsewhere (deleted)")
    assert proof.ranges.keys() == tensors.keys() - {"empty"}


def test_a_file_that_was_modified_in_place(disk_or_memory):
    """Unwritten pages show the file as it is now; copies show it as it was."""
    tensors = safetensors.torch.load_file(path := saved(disk_or_memory, {"a": torch.ones(4000), "b": torch.ones(4000)}))
    tensors["a"][3000] = 2
    with path.open("r+b") as file:
        file.seek(-16000 - 4 * 900, 2)  # 900 elements before the end of a: on the page that is a's alone
        file.write(torch.full((100,), 5.0).numpy().tobytes())
        file.seek(-8, 2)
        file.write(torch.full((1,), 6.0).numpy().tobytes())
    proof = prove(tensors)
    check_proof(proof, tensors)
    assert proof.reasons == {"a": Reason.WRITTEN}
    assert tensors["b"][-2] == 6


def test_a_file_that_was_truncated(disk_or_memory):
    path = saved(disk_or_memory)
    tensors = {n: t for n, t in safetensors.torch.load_file(path).items() if n != "empty"}
    ranges = prove(tensors).ranges
    tensors["half"].view(torch.uint8)[-1, -1] = 1  # pages beyond the end are not even asked for
    end = max(place.start + place.nbytes for place in ranges.values())
    last = [name for name, place in ranges.items() if place.start + place.nbytes == end]
    os.truncate(path, end - 1)
    proof = prove(tensors)
    assert [name for name, reason in proof.reasons.items() if reason is Reason.TRUNCATED] == last
    os.truncate(path, 100)
    assert set(prove(tensors).reasons.values()) == {Reason.TRUNCATED}


def test_a_page_beyond_the_end_is_no_crash(tmp_path):
    """The file is cut and grows again while it is mapped: what was copied is gone, and so is what was written."""
    path = saved(tmp_path)
    big = safetensors.torch.load_file(path)["big"]
    size = path.stat().st_size
    big[:] = 1
    os.truncate(path, 0)
    os.truncate(path, size)
    assert isinstance(only(big), tuple)
    assert not big.any()


# --- what is no proof at all ---


def test_memory_that_is_no_private_file(tmp_path):
    path = saved(tmp_path)
    shared = torch.from_file(str(path), shared=True, size=100, dtype=torch.uint8)
    assert only(shared) is Reason.SHARED
    assert only(torch.from_numpy(numpy.memmap(path, mode="r+"))) is Reason.SHARED
    assert only(torch.ones(5000)) is Reason.NO_FILE
    assert only(torch.ones(5000).share_memory_()) is Reason.SHARED
    assert only(safetensors.torch.load_file(path)["big"].clone()) is Reason.NO_FILE
    assert only(safetensors.torch.load_file(path)["big"].to(torch.float16)) is Reason.NO_FILE
    with safetensors.safe_open(path, "pt") as file:
        assert only(file.get_slice("big")[:, 1:3].contiguous()) is Reason.NO_FILE


def test_a_file_without_a_name():
    fd = os.memfd_create("weights")
    os.truncate(fd, 5 * PAGE)
    with os.fdopen(fd, "r+b") as file:
        data = numpy.memmap(file, mode="c")
    assert only(torch.from_numpy(data)) is Reason.DELETED


def test_memory_that_may_not_be_read(tmp_path):
    big = safetensors.torch.load_file(saved(tmp_path))["big"]
    start, libc = -(-big.data_ptr() // PAGE) * PAGE, ctypes.CDLL(None)
    protect = [ctypes.c_void_p(start), ctypes.c_size_t(PAGE)]
    assert libc.mprotect(*protect, 0) == 0
    assert prove({"t": big}).reasons == {"t": Reason.NO_FILE}
    page = torch.frombuffer((ctypes.c_char * PAGE).from_address(start), dtype=torch.uint8)
    assert prove({"t": page}).reasons == {"t": Reason.NOT_READABLE}
    assert libc.mprotect(*protect, 1) == 0
    assert isinstance(only(big), tuple)
    assert isinstance(only(page), tuple)


def test_a_file_that_may_not_be_opened(open_dir, unprivileged):
    path = saved(open_dir)
    big = safetensors.torch.load_file(path)["big"]
    path.chmod(0)
    with unprivileged():
        assert prove({"t": big}).reasons == {"t": Reason.UNOPENED}


@pytest.mark.parametrize("call", ["written_pages", "read_mappings"])
def test_a_system_that_does_not_tell(tmp_path, monkeypatch, call):
    tensors = safetensors.torch.load_file(saved(tmp_path))

    def refuse(*args):
        raise PermissionError("refused")

    monkeypatch.setattr(module, call, refuse)
    proof = prove({"t": tensors["big"], "u": torch.ones(3)})
    assert not proof.ranges
    assert proof.reasons["t"] is Reason.UNSURE_PAGES


def test_memory_that_cannot_be_compared(tmp_path, monkeypatch):
    tensors = safetensors.torch.load_file(saved(tmp_path, {"a": torch.ones(3), "b": torch.ones(3)}))
    tensors["a"][0] = 2
    assert prove(tensors).ranges.keys() == {"b"}

    def refuse(*args):
        raise PermissionError("refused")

    monkeypatch.setattr(module, "read_memory", refuse)
    assert set(prove(tensors).reasons.values()) == {Reason.WRITTEN}


def test_a_file_system_that_does_not_tell_files_apart(tmp_path, monkeypatch):
    """Some bytes are looked at then: at the beginning, in the middle and at the end of what would be proven."""
    path = saved(tmp_path, {str(i): torch.full((5000,), float(i)) for i in range(5)})
    tensors = safetensors.torch.load_file(path)
    (tmp_path / "other").mkdir()
    other = safetensors.torch.load_file(saved(tmp_path / "other", {"a": torch.ones(9)}))
    tensors |= {"other": other["a"]}
    looked = []
    read = module.MappedFiles.read
    monkeypatch.setattr(module.MappedFiles, "is_sure", lambda self, path_: path_ != str(path))

    def changed(self, path, start, nbytes):
        looked.append((start, nbytes))
        return read(self, path, start, nbytes) if wrong != len(looked) else b"x" * nbytes

    monkeypatch.setattr(module.MappedFiles, "read", changed)
    for wrong in (0, 1, 2, 3):
        looked.clear()
        proof = prove(tensors)
        if wrong:
            assert proof.reasons == dict.fromkeys(map(str, range(5)), Reason.REPLACED)
            assert proof.ranges.keys() == {"other"}
        else:
            check_proof(proof, tensors)
            first, middle, last = (proof.ranges[name].start for name in ("0", "2", "4"))
            assert looked == [(first, PAGE), (middle + 10_000, PAGE), (last + 20_000 - PAGE, PAGE)]


def test_no_weight_is_read(tmp_path, evict, resident):
    path = saved(tmp_path)
    evict(path)
    whole = torch.from_numpy(numpy.memmap(path, mode="c"))
    tensors = {"whole": whole, "part": whole[100:-5000]}
    proof = prove(tensors)
    assert resident(path) == 0
    assert not proof.reasons
    check_proof(proof, tensors)


def test_nothing_stays_open(tmp_path, open_files):
    tensors = safetensors.torch.load_file(saved(tmp_path))
    prove(tensors)
    before = open_files(tmp_path)
    prove(tensors)
    assert open_files(tmp_path) == before
