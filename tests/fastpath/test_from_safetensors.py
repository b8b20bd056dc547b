"""Files of safetensors that are opened for a GPU give what the originals give; the CPU stands in for one."""

import gc
import pickle
import sys
import types

import pytest

torch = pytest.importorskip("torch")

import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
from versions import needs_offset_keys  # noqa: E402

from wan_loader.errors import DeviceMemoryError  # noqa: E402
from wan_loader.fastpath.libraries import open_on_device  # noqa: E402
from wan_loader.fastpath.libraries.from_safetensors import SafetensorsLoads  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402
from wan_loader.loading.handle import CheckpointHandle  # noqa: E402
from wan_loader.verify import same_bits  # noqa: E402

#: In a tuple, for as names of this module they would be replaced, too.
ORIGINALS = (safetensors.safe_open, safetensors.torch.load_file)


def original_open(*args, **kwargs):
    return ORIGINALS[0](*args, **kwargs)


@pytest.fixture
def fast(tally):
    patches = Patches(tally)
    SafetensorsLoads(tally, kinds=("cpu",)).install(patches)
    yield patches
    patches.undo()
    assert (safetensors.safe_open, safetensors.torch.load_file) == ORIGINALS
    assert safetensors.torch.safe_open is ORIGINALS[0]


TENSORS = {
    "b": torch.randn(30, 20),
    "a": torch.arange(12).reshape(3, 4),
    "d": torch.randn(7, 6).to(torch.bfloat16),
    "e": torch.empty(0, 3),
    "c": torch.randn(5, dtype=torch.float64),
    "s": torch.tensor(True),
}


@pytest.fixture
def path(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor)
        assert (ours[name].dtype, ours[name].shape, ours[name].device) == (tensor.dtype, tensor.shape, tensor.device)


def test_load_file_is_one_plan(fast, tally, path):
    ours = safetensors.torch.load_file(path)
    assert tally.total.n_plans == 1
    assert tally.total.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    fast.undo()
    assert type(ours) is dict
    assert_same(ours, safetensors.torch.load_file(path))


def test_load_file_of_a_version_that_asks_for_each(fast, tally, path):
    """As safetensors did until 0.7."""

    def load_file(filename):
        with safetensors.torch.safe_open(filename, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    seam = SafetensorsLoads(tally, kinds=("cpu",))
    fast.undo()
    patches = Patches(tally)
    seam.install(patches)
    ours = seam._instead_of_load_file(load_file)(path)
    patches.undo()
    assert tally.total.n_plans == 1
    assert_same(ours, load_file(path))


def test_a_shard_is_the_file_that_was_named(fast, tally, tmp_path):
    for number in (1, 2):
        tensors = {f"w{number}": torch.full((3,), number)}
        safetensors.torch.save_file(tensors, tmp_path / f"x-0000{number}-of-00002.safetensors")
    assert list(safetensors.torch.load_file(tmp_path / "x-00001-of-00002.safetensors")) == ["w1"]
    assert tally.total.n_plans == 1


def test_the_content_says_what_a_file_is(fast, tally, path, tmp_path):
    path.rename(tmp_path / "blob")
    assert_same(safetensors.torch.load_file(tmp_path / "blob"), ORIGINALS[1](tmp_path / "blob"))
    assert tally.total.n_plans
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(path)


@pytest.mark.parametrize("order", ["keys", pytest.param("offset_keys", marks=needs_offset_keys)])
def test_a_loop_reads_ahead(fast, tally, path, order):
    with safetensors.safe_open(path, "pt") as ours, original_open(path, "pt") as theirs:
        names = getattr(ours, order)()
        assert names == getattr(theirs, order)()
        assert_same({name: ours.get_tensor(name) for name in names}, {name: theirs.get_tensor(name) for name in names})
        assert tally.total.n_plans == 2, "the first one alone, then all others"
        assert not ours._ahead._loaded


@needs_offset_keys
def test_little_is_read_ahead(fast, tally, path, monkeypatch):
    monkeypatch.setattr(open_on_device, "_AHEAD_BYTES", 100)
    with safetensors.safe_open(path, "pt") as file:
        for name in file.offset_keys():
            file.get_tensor(name)
            assert sum(tensor.nbytes for tensor in file._ahead._loaded.values()) <= 100
    assert 2 < tally.total.n_plans < 6


def test_what_is_out_of_order_is_read_alone(fast, tally, path):
    with safetensors.safe_open(path, "pt") as file:
        for name in ("s", "b", "a", "d", "b"):
            assert same_bits(file.get_tensor(name), TENSORS[name])
            assert not file._ahead._loaded
    assert tally.total.nbytes == sum(TENSORS[name].nbytes for name in ("s", "b", "a", "d", "b"))


def test_what_was_read_ahead_is_dropped(fast, path):
    with safetensors.safe_open(path, "pt") as file:
        file.get_tensor("a")
        file.get_tensor("b")
        assert file._ahead._loaded
        file.get_tensor("a")
        assert not file._ahead._loaded
        file.get_tensor("b")
        assert file._ahead._loaded
    assert not file._ahead._loaded


def test_each_tensor_is_the_program_s_own(fast, path):
    with safetensors.safe_open(path, "pt") as file:
        first = file.get_tensor("b")
        first.zero_()
        assert same_bits(file.get_tensor("b"), TENSORS["b"])


INDICES = [
    0,
    -1,
    slice(0, 2),
    slice(None, None, 2),
    (slice(None), 1),
    (slice(1, 3), slice(None, None, 3)),
    ...,
    (0, ...),
    (..., slice(2)),
    None,
    [0, 2],
    torch.tensor(1),
    (1, 1),
]


def test_slices(fast, path):
    with safetensors.safe_open(path, "pt") as ours, original_open(path, "pt") as theirs:
        mine, its = ours.get_slice("b"), theirs.get_slice("b")
        assert (mine.get_shape(), mine.get_dtype()) == (its.get_shape(), its.get_dtype())
        for index in INDICES:
            assert same_bits(mine[index], its[index]), index


def test_slices_that_make_no_sense(fast, path):
    with safetensors.safe_open(path, "pt") as ours, original_open(path, "pt") as theirs:
        for index in (99, "x", (0, 0, 0), slice(0, 5, -1), 1.5):
            errors = []
            for file in (ours, theirs):
                with pytest.raises(Exception) as error:
                    file.get_slice("b")[index]
                errors.append((type(error.value), str(error.value)))
            assert errors[0] == errors[1]


def test_only_the_bytes_of_a_slice_are_read(fast, path, monkeypatch):
    read, load = [], CheckpointHandle._read

    def noted(self, storage, facts):
        read.append(storage.nbytes)
        return load(self, storage, facts)

    monkeypatch.setattr(CheckpointHandle, "_read", noted)
    with safetensors.safe_open(path, "pt") as file:
        file.get_slice("b")[3:5]
    assert read == [2 * 20 * 4]


def no_such_name(file):
    return file.get_tensor("none")


def no_such_slice(file):
    return file.get_slice("none")


def no_such_method(file):
    return file.nonsense()


def closed(file):
    file.__exit__(None, None, None)
    return file.get_tensor("a")


def closed_keys(file):
    file.__exit__(None, None, None)
    return file.keys()


def closed_slice(file):
    part = file.get_slice("a")
    file.__exit__(None, None, None)
    return part[1:2]


def metadata(file):
    return file.metadata()


@pytest.mark.parametrize(
    "use", [no_such_name, no_such_slice, no_such_method, closed, closed_keys, closed_slice, metadata]
)
def test_the_rest_is_the_original_s(fast, path, use):
    outcomes = []
    for opened in (safetensors.safe_open, original_open):
        file = opened(path, "pt").__enter__()
        try:
            outcomes.append(str(use(file)))
        except Exception as error:
            outcomes.append((type(error), str(error).replace("OpenOnDevice", "builtins.safe_open")))
    assert outcomes[0] == outcomes[1]


def test_errors_of_opening_are_the_original_s(fast, path, tmp_path):
    (tmp_path / "text").write_text("no safetensors file at all")
    for arguments in (
        (),
        (path,),
        (path, "pt", "nonsense"),
        (tmp_path / "none", "pt"),
        (tmp_path / "text", "pt"),
        (path, "xx"),
        (7, "pt"),
    ):
        errors = []
        for opened in (safetensors.safe_open, original_open):
            with pytest.raises(Exception) as error:
                opened(*arguments)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]


def test_the_class_looks_like_the_original(fast, path):
    ours, theirs = safetensors.safe_open(path, "pt"), original_open(path, "pt")
    for kind in (safetensors.safe_open, safetensors.torch.safe_open):
        assert isinstance(ours, kind)
        assert isinstance(theirs, kind)
        assert issubclass(type(theirs), kind)
        assert issubclass(type(ours), kind)
        assert not isinstance("text", kind)
        assert kind.__name__ == "safe_open"
        assert kind.__doc__ == ORIGINALS[0].__doc__
    with pytest.raises(TypeError):
        pickle.dumps(ours)


def test_everything_else_gets_the_original_s_object(fast, tally, path):
    assert type(safetensors.safe_open(path, "np")) is ORIGINALS[0]
    with torch.inference_mode():
        assert type(safetensors.safe_open(path, "pt")) is ORIGINALS[0]
    assert len(tally.left) == 1
    name = safetensors.safe_open
    fast.undo()
    assert type(name(path, "pt")) is ORIGINALS[0], "after it was taken out, the class only passes calls on"


def test_to_the_cpu_the_originals_map(tally, path):
    patches = Patches(tally)
    SafetensorsLoads(tally).install(patches)
    try:
        assert type(safetensors.safe_open(path, framework="pt", device="cpu")) is ORIGINALS[0]
        assert_same(safetensors.torch.load_file(path), ORIGINALS[1](path))
    finally:
        patches.undo()
    assert tally == Tally()


def test_a_load_that_fails_is_the_original_s(fast, tally, path, monkeypatch):
    def fail(self, names):
        raise DeviceMemoryError("no room")

    monkeypatch.setattr(CheckpointHandle, "get_tensors", fail)
    with safetensors.safe_open(path, "pt") as file:
        assert same_bits(file.get_tensor("b"), TENSORS["b"])
    assert_same(safetensors.torch.load_file(path), ORIGINALS[1](path))
    assert tally.left == {"safe_open: DeviceMemoryError: no room": 0}


def test_files_are_closed(fast, path, open_files):
    gc.collect()
    before = open_files(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        tensors["again"] = file.get_tensor("a")
    opened = safetensors.safe_open(path, "pt")
    opened.get_tensor("a")
    del tensors, file, opened
    gc.collect()
    assert open_files(path) == before


def test_names_that_were_imported_before(path):
    """`from safetensors import safe_open` in a module is replaced, too."""
    module = types.ModuleType("some_program")
    module.safe_open = safetensors.safe_open
    sys.modules["some_program"] = module
    patches = Patches(Tally())
    try:
        SafetensorsLoads(Tally(), kinds=("cpu",)).install(patches)
        assert type(module.safe_open(path, "pt")) is open_on_device.OpenOnDevice
        patches.undo()
        assert module.safe_open is ORIGINALS[0]
    finally:
        patches.undo()
        del sys.modules["some_program"]


@pytest.mark.gpu
def test_on_a_gpu(tally, path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    patches = Patches(tally)
    SafetensorsLoads(tally).install(patches)
    try:
        assert_same(safetensors.torch.load_file(path, device="cuda"), ORIGINALS[1](path, device="cuda"))
        for device in ("cuda", "cuda:0", 0):
            with safetensors.safe_open(path, "pt", device=device) as ours, original_open(path, "pt", device) as theirs:
                names = ours.keys()
                assert_same(
                    {name: ours.get_tensor(name) for name in names}, {name: theirs.get_tensor(name) for name in names}
                )
                for index in (0, slice(3, 5), (slice(None), slice(2, 4))):
                    assert same_bits(ours.get_slice("b")[index], theirs.get_slice("b")[index])
    finally:
        patches.undo()
    assert tally.total.n_plans
    assert not tally.left
