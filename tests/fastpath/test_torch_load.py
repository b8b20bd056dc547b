"""`torch.load` gives what the original gives, to a device by one plan, to the CPU without copying the file."""

import gc
import os
import subprocess
import threading
import zipfile
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")

from wan_loader.fastpath.libraries import torch_files, torch_load  # noqa: E402
from wan_loader.fastpath.libraries.torch_load import TorchLoad  # noqa: E402
from wan_loader.fastpath.moving.moves import Moves  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402
from wan_loader.provenance.prove import prove  # noqa: E402
from wan_loader.verify import same_bits  # noqa: E402

#: In a tuple, for as a name of this module it would be replaced, too.
ORIGINALS = (torch.load,)
COPIES = "copies of files into memory"


def original(*args, **kwargs):
    return ORIGINALS[0](*args, **kwargs)


@pytest.fixture
def fast(tally, leases):
    """Installed, and taken out again."""
    yield from installed(TorchLoad(tally, leases, min_nbytes=0))


@pytest.fixture
def planned(tally):
    """The same, with the CPU for a GPU."""
    yield from installed(TorchLoad(tally, None, kinds=("cpu",), min_nbytes=0))


def installed(seam):
    patches = Patches(Tally())
    seam.install(patches)
    yield patches
    patches.undo()
    assert torch.load is torch.serialization.load is ORIGINALS[0]
    assert "from_file" not in vars(torch.UntypedStorage)


@pytest.fixture
def state():
    base = torch.randn(60, 800)
    state = OrderedDict(
        w=torch.randn(300, 500), view=base[2:4], same=base, turned=base.t(), n=torch.arange(3), s=torch.ones(())
    )
    state["tied"] = state["w"]
    state["empty"] = torch.empty(0, 3)
    state._metadata = {"": {"version": 1}}
    return state


@pytest.fixture
def path(tmp_path, state):
    return saved(tmp_path, state)


def saved(tmp_path, value, **options):
    path = tmp_path / "x.pth"
    torch.save(value, path, **options)
    return path


def is_mapped(tensor):
    return bool(prove({"tensor": tensor}).ranges)


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    assert ours._metadata == theirs._metadata
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        mine = ours[name]
        assert type(mine) is type(tensor)
        assert same_bits(mine, tensor)
        assert (mine.stride(), mine.storage_offset(), mine.requires_grad) == (
            tensor.stride(),
            tensor.storage_offset(),
            tensor.requires_grad,
        )
        assert mine._version == tensor._version
        assert mine.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
        assert mine.untyped_storage().resizable() == tensor.untyped_storage().resizable()
        assert mine.is_shared() == tensor.is_shared()
    assert ours["tied"] is ours["w"]
    assert ours["view"].untyped_storage().data_ptr() == ours["same"].untyped_storage().data_ptr()


@pytest.mark.parametrize("options", [{}, {"weights_only": True}, {"weights_only": False}], ids=str)
@pytest.mark.parametrize("map_location", [None, "cpu", torch.device("cpu")], ids=str)
def test_to_the_cpu_nothing_is_copied(fast, tally, path, options, map_location):
    ours = torch.load(path, map_location, **options)
    assert_same(ours, original(path, map_location, **options))
    assert is_mapped(ours["w"])
    assert tally.spared == {COPIES: 1}
    assert tally.spared_nbytes == {COPIES: path.stat().st_size}
    assert not tally.left


def test_to_a_device_one_plan(planned, tally, path):
    ours = torch.load(path, map_location="cpu")
    theirs = original(path)
    assert tally.total.n_plans == 1
    assert not is_mapped(ours["w"])
    assert type(ours) is type(theirs)
    assert ours._metadata == theirs._metadata
    assert list(ours) == list(theirs)
    assert all(same_bits(ours[name], tensor) for name, tensor in theirs.items())
    assert ours["tied"] is ours["w"]
    ours["view"].zero_()
    assert not ours["same"][2:4].any(), "what shares memory in the file shares it here"


def test_a_shard_is_the_file_that_was_named(planned, tally, tmp_path):
    for number in (1, 2):
        torch.save({f"w{number}": torch.ones(3)}, tmp_path / f"x-0000{number}-of-00002.bin")
    assert list(torch.load(tmp_path / "x-00001-of-00002.bin", map_location="cpu")) == ["w1"]
    assert tally.total.n_plans == 1


def test_a_module_that_is_assigned_moves_by_one_plan(fast, path):
    """As the official program loads its VAE: built on meta, assigned, moved."""
    with torch.device("meta"):
        module = torch.nn.Linear(500, 300, bias=False)
    state = torch.load(path, map_location="cpu")
    module.load_state_dict({"weight": state["w"]}, assign=True)
    expected = state["w"].clone()
    moves = Moves(kinds=("cpu",), io="buffered", min_nbytes=0)
    moves.fetch(module, torch.device("cpu:0"), None)
    assert moves.tally.total.n_plans == 1
    assert not is_mapped(module.weight)
    assert torch.equal(module.weight, expected)


@pytest.mark.gpu
def test_to_a_gpu_one_plan(fast, tally, path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ours, theirs = torch.load(path, map_location="cuda"), original(path, map_location="cuda")
    assert tally.total.n_plans == 1
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor)
        assert ours[name].device == tensor.device


def truncates(state, path):
    os.truncate(path, 10)


def rewrites_in_place(state, path):
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def rewrites_by_another(state, path):
    subprocess.run(["dd", "if=/dev/zero", f"of={path}", "bs=4096", "count=99"], check=True, capture_output=True)


def deletes(state, path):
    path.unlink()


def replaces(state, path):
    path.with_name("new").write_bytes(b"new")
    path.with_name("new").rename(path)


@pytest.mark.parametrize(
    "change",
    [
        truncates,
        rewrites_in_place,
        rewrites_by_another,
        deletes,
        replaces,
    ],
)
def test_a_program_may_do_anything_with_the_file(fast, path, change):
    expected = original(path)
    state = torch.load(path)
    change(state, path)
    assert_same(state, expected)


def write_in_place(tensor):
    tensor.add_(1)


def write_by_data(tensor):
    tensor.data[5] = 7


def write_by_numpy(tensor):
    tensor.numpy()[3] = 9


@pytest.mark.parametrize("write", [write_in_place, write_by_data, write_by_numpy])
def test_writes_are_the_program_s_own(fast, path, write):
    content = path.read_bytes()
    ours, theirs, other = torch.load(path), original(path), torch.load(path)
    write(ours["w"])
    write(theirs["w"])
    os.truncate(path, 10)
    assert_same(ours, theirs)
    assert not torch.equal(other["w"], ours["w"])
    path.write_bytes(content)
    assert_same(original(path), other)


def test_the_file_is_let_go_with_the_last_tensor(fast, leases, path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    state = torch.load(path)
    part = state["w"][5:7]
    expected = part.clone()
    del state
    gc.collect()
    assert len(leases._files) == 1
    assert torch.equal(part, expected)
    del part
    gc.collect()
    assert len(leases._files) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_that_map_files_themselves_get_those(fast, path, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(100))
    seen = []

    def by_another():
        thread = threading.Thread(
            target=lambda: seen.append(torch.UntypedStorage.from_file(str(other), False, 100).nbytes())
        )
        thread.start()
        thread.join()

    mapping = torch_load._Mapping()
    memory = bytearray(7)
    with mapping.shows(memory):
        by_another()
        assert torch.UntypedStorage.from_file(str(other), False, 100).nbytes() == 7
    assert seen == [100]
    assert torch.UntypedStorage.from_file(str(other), False, 100).nbytes() == 100


def test_what_is_read_later_is_in_the_page_cache(fast, path, evict, resident):
    evict(path)
    torch.load(path)
    assert resident(path) == path.stat().st_size


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ({"a": {"b": torch.ones(2)}}, {}),
        ([torch.ones(2)], {}),
        ({"a": torch.ones(2), "step": 3}, {}),
        ({"a": torch.ones(2)}, {"_use_new_zipfile_serialization": False}),
    ],
)
@pytest.mark.parametrize("way", ["fast", "planned"])
def test_other_contents_go_to_the_original(request, tally, tmp_path, value, options, way):
    request.getfixturevalue(way)
    path = saved(tmp_path, value, **options)
    ours, theirs = torch.load(path, map_location="cpu"), original(path, map_location="cpu")
    assert repr(ours) == repr(theirs)
    assert not tally.spared
    assert not tally.components
    assert len(tally.left) == 1


@pytest.mark.parametrize("attribute", [{"extra": torch.ones(3)}, {"_metadata": {"": {"scale": torch.ones(3)}}}])
def test_tensors_in_a_dict_s_attributes(planned, tally, state, tmp_path, attribute):
    vars(state).update(attribute)
    path = saved(tmp_path, state)
    ours = torch.load(path, map_location="cpu")
    assert tally.left == {"torch.load: a dict with attributes of its own": 0}
    assert "device='meta'" not in repr(vars(ours))
    assert repr(vars(ours)) == repr(vars(original(path)))


@pytest.mark.parametrize(
    "options",
    [
        {"map_location": "meta"},
        {"map_location": {"cuda": "cpu"}},
        {"map_location": lambda storage, _: storage},
        {"mmap": True},
        {"mmap": False},
        {"weights_only": False, "errors": "strict"},
    ],
)
def test_other_arguments_go_to_the_original(fast, tally, path, options):
    assert torch.load(path, **options)["w"].shape == (300, 500)
    assert not tally.components
    assert not tally.spared


def test_files_modes_and_errors_go_to_the_original(fast, tally, path, tmp_path):
    with path.open("rb") as file:
        assert not is_mapped(torch.load(file)["w"])
    with torch.inference_mode():
        assert torch.load(path, map_location="cpu")["w"].is_inference()
    with torch.device("meta"):
        torch.load(path, map_location="cpu")
    with pytest.raises(FileNotFoundError) as error:
        torch.load(tmp_path / "none.pth", map_location="cpu")
    assert "wan_loader" not in type(error.value).__module__
    with pytest.raises(TypeError):
        torch.load()
    path.write_bytes(path.read_bytes()[:1000])
    for load in (torch.load, original):
        with pytest.raises(RuntimeError, match="PytorchStreamReader failed"):
            load(path)
    assert not tally.components
    assert not tally.spared


def test_what_cannot_be_leased_is_copied(fast, tally, path):
    with path.open("r+b"):
        state = torch.load(path)
    assert not is_mapped(state["w"])
    assert_same(state, original(path))
    assert tally.left == {"torch.load: the file is not mapped: somebody has it open for writing": 0}


@pytest.mark.parametrize("packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_file_that_another_program_has_packed(fast, tally, path, packed):
    """Records may be compressed, or lie where torch would not have put them."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert_same(torch.load(path), original(path))
    assert not tally.spared
    assert len(tally.left) == 1


def test_what_is_small_is_read(tally, leases, path):
    patches = Patches(tally)
    TorchLoad(tally, leases).install(patches)
    try:
        assert not is_mapped(torch.load(path)["w"])
    finally:
        patches.undo()
    assert tally == Tally()


def test_a_file_that_is_replaced_meanwhile(fast, tally, path, monkeypatch):
    fetch = torch_files.fetch_pages

    def replaced(name, file):
        fetch(name, file)
        torch.save(original(path), path.with_name("new"))
        path.with_name("new").rename(path)

    monkeypatch.setattr(torch_files, "fetch_pages", replaced)
    assert_same(torch.load(path), original(path))
    assert tally.left == {"torch.load: the file was replaced meanwhile": 0}
