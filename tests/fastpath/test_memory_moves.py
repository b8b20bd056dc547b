"""Memory that is in no file moves by one load as well, and becomes what `.to` makes of it."""

import ctypes
import os
import warnings

import pytest

torch = pytest.importorskip("torch")

from wan_loader.engine import read_backend  # noqa: E402
from wan_loader.errors import DeviceMemoryError  # noqa: E402
from wan_loader.fastpath import Moves, Tally  # noqa: E402
from wan_loader.fastpath.moving import memory_moves  # noqa: E402
from wan_loader.fastpath.moving.memory_moves import fetch_memory, load_memory  # noqa: E402
from wan_loader.provenance.tensor_memory import memory_of  # noqa: E402
from wan_loader.system.posix import PAGE, map_file, unmap  # noqa: E402

BIG = 3 << 18


@pytest.fixture
def tensors():
    torch.manual_seed(1)
    return {
        "large": torch.randn(BIG // 512, 512),
        "turned": torch.randn(300, 70).t(),
        "half": torch.randn(33).to(torch.bfloat16),
        "counts": torch.arange(1000),
        "number": torch.tensor(7.5),
        "small": torch.randn(5),
    }


def fetch(tensors, device, dtype=None, ties=None, tally=None, min_nbytes=0):
    tally = tally or Tally()
    return fetch_memory("X", tensors, ties or {}, torch.device(device), dtype, min_nbytes=min_nbytes, tally=tally)


def assert_same(found, expected):
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(found.cpu().flatten().view(torch.uint8), expected.cpu().flatten().view(torch.uint8))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_each_becomes_what_a_plain_move_makes_of_it(tensors, device, dtype):
    expected = {n: t.to(device, dtype if t.is_floating_point() else None, copy=True) for n, t in tensors.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    tally = Tally()
    found = fetch(tensors, device, dtype, tally=tally)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert_same(tensor, expected[name])
        assert tensor.device.type == device
        assert tensor.data_ptr() != addresses[name]
    assert tally.components["X, from memory"].nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert not tally.left


def test_memory_counts_as_resident(tensors, device):
    """Else the ring would be made for a disk."""
    memory = memory_of(tensors["large"])
    assert load_memory({"x": memory}, {}, torch.device(device), None).plan.resident == memory.nbytes


def test_memory_is_copied_and_not_read(tensors, device, monkeypatch):
    """A read of /proc/self/mem would be right as well, and several times as slow."""
    plain, copied = read_backend.copy_memory, []

    def copy(fd, address, nbytes, offset):
        copied.append(nbytes)
        return plain(fd, address, nbytes, offset)

    monkeypatch.setattr(read_backend, "copy_memory", copy)
    fetch({"large": tensors["large"]}, device)
    assert sum(copied) == tensors["large"].nbytes


def test_two_views_of_one_memory_become_two_and_one_object_stays_one(tensors, device):
    whole = tensors["large"]
    found = fetch({"a": whole, "b": whole[:100], "c": whole[50:], "d": whole}, device, ties={"d": "a"})
    assert found["d"].data_ptr() == found["a"].data_ptr()
    assert len({found[name].data_ptr() for name in "abc"}) == 3
    for name, expected in {"a": whole, "b": whole[:100], "c": whole[50:], "d": whole}.items():
        assert_same(found[name], expected)


def test_elements_that_lie_apart_are_left(tensors, device):
    assert fetch({"columns": tensors["large"][:, :7], "every second": tensors["large"][::2]}, device) == {}
    assert fetch({"none": torch.empty(0)}, device) == {}


def test_little_is_left(tensors, device):
    nbytes = tensors["large"].nbytes
    assert fetch({"large": tensors["large"]}, device, min_nbytes=nbytes + 1) == {}
    assert fetch({"a": tensors["large"], "b": tensors["large"]}, device, ties={"b": "a"}, min_nbytes=nbytes + 1) == {}
    assert fetch({"large": tensors["large"]}, device, min_nbytes=nbytes).keys() == {"large"}


@pytest.mark.gpu
def test_pinned_memory_is_left(tensors):
    assert fetch({"pinned": tensors["large"].pin_memory()}, "cuda") == {}


@pytest.fixture
def pages():
    """Tensors that are the first and the last of three pages; the second is not there, as a freed block leaves it."""
    fd = os.memfd_create("pages", os.MFD_CLOEXEC)
    os.write(fd, torch.randn(3 * PAGE // 4).numpy().tobytes())
    address = map_file(fd, 0, 3 * PAGE)
    os.close(fd)
    unmap(address + PAGE, PAGE)
    parts = [(ctypes.c_char * PAGE).from_address(address + start) for start in (0, 2 * PAGE)]
    with warnings.catch_warnings(action="ignore"):  # that it is not writable
        yield [torch.frombuffer(part, dtype=torch.float32) for part in parts]
    unmap(address, PAGE)
    unmap(address + 2 * PAGE, PAGE)


def test_pages_between_tensors_need_not_be_there(pages, device):
    found = fetch({"first": pages[0], "last": pages[1]}, device)
    assert_same(found["first"], pages[0])
    assert_same(found["last"], pages[1])


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), DeviceMemoryError("no room")])
def test_what_fails_is_left_with_the_reason(tensors, device, monkeypatch, error):
    def fail(*args, **options):
        raise error

    tally = Tally()
    monkeypatch.setattr(memory_moves, "load_memory", fail)
    assert fetch(tensors, device, tally=tally) == {}
    assert tally.components == {}
    assert [reason.partition(":")[0] for reason in tally.left] == [type(error).__name__]


def test_a_child_moves_its_own_memory(tensors):
    """Not that of the process that it was forked from."""
    expected = tensors["large"] + 1
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            tensors["large"] += 1
            found = fetch({"large": tensors["large"]}, "cpu")
            code = 0 if torch.equal(found["large"], expected) else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


class TestModules:
    """Round trips of modules, as offloading makes them."""

    @pytest.fixture
    def module(self):
        torch.manual_seed(2)
        module = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 300))
        module.register_buffer("scale", torch.randn(7))
        module[1].weight = module[0].weight
        return module

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_a_module_moves_by_one_load(self, module, device, dtype):
        expected = {name: tensor.to(device, dtype, copy=True).cpu() for name, tensor in module.state_dict().items()}
        objects = [id(parameter) for parameter in module.parameters()]
        addresses = {tensor.data_ptr() for tensor in module.state_dict().values()}
        moves = Moves(kinds=(device,), min_nbytes=0, min_memory_nbytes=0)
        moves.fetch(module, torch.device(device), dtype)
        assert moves.tally.total.n_plans == 1
        assert not moves.tally.left
        assert [id(parameter) for parameter in module.parameters()] == objects
        assert module[1].weight is module[0].weight
        for name, tensor in module.state_dict().items():
            assert_same(tensor, expected[name])
            assert tensor.device.type == device
            assert tensor.data_ptr() not in addresses

    def test_little_memory_is_left_with_the_reason(self, module, device):
        moves = Moves(kinds=(device,), min_nbytes=0)
        moves.fetch(module, torch.device(device), None)
        assert moves.tally.total.n_plans == 0
        assert moves.tally.left["does not lie in the mapping of a file"] > 0

    def test_a_load_that_fails_changes_nothing(self, module, device, monkeypatch):
        def interrupted(*args, **options):
            raise KeyboardInterrupt

        before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
        monkeypatch.setattr(memory_moves, "load_memory", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Moves(kinds=(device,), min_nbytes=0, min_memory_nbytes=0).fetch(module, torch.device(device), None)
        assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before
