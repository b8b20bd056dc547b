"""A tensor whose cast waits says what it is, and is an ordinary one as soon as anybody wants its values."""

import copy
import gc
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from multiprocessing.reduction import ForkingPickler

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from torch.utils.dlpack import to_dlpack  # noqa: E402
from waiting_tensors import defer, source_of  # noqa: E402

from wan_loader.errors import CheckpointError  # noqa: E402
from wan_loader.fastpath.deferral import deferred_tensor as tensors  # noqa: E402
from wan_loader.fastpath.deferral import waiting_cast  # noqa: E402
from wan_loader.fastpath.deferral.deferred import defer_all, is_deferred, settle, settle_all  # noqa: E402
from wan_loader.fastpath.deferral.facts import FACTS  # noqa: E402

NEW_PARAMETER = torch.nn.Parameter.__new__
LOOKED = "was cast on the CPU, as somebody looked at it"
SHAPES = {"weight": (30, 41), "bias": (30,), "scale": ()}


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(1)
    safetensors.torch.save_file({n: torch.randn(s) for n, s in SHAPES.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    if tensors.living():
        gc.collect()
    assert not tensors.living()
    assert not {"data", "_make_subclass"} & vars(torch.Tensor).keys()
    assert torch.nn.Parameter.__new__ is NEW_PARAMETER
    assert torch.utils.dlpack.to_dlpack is to_dlpack


@pytest.fixture
def plain(path):
    """What programs get without us."""
    return {name: tensor.to(torch.bfloat16) for name, tensor in safetensors.torch.load_file(path).items()}


@pytest.fixture
def waiting(path, tally):
    sources = safetensors.torch.load_file(path)
    waiting = defer_all(sources, dict.fromkeys(sources, torch.bfloat16), tally)
    yield waiting
    waiting.clear()


def same(found, expected):
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert found.requires_grad == expected.requires_grad
    assert torch.equal(found.detach().view(torch.int16), expected.detach().view(torch.int16))


def test_it_waits(waiting, plain, tally):
    assert all(map(is_deferred, waiting.values()))
    assert not any(map(is_deferred, plain.values()))
    source, dtype = source_of(waiting["weight"])
    assert (source.dtype, dtype) == (torch.float32, torch.bfloat16)
    assert not tally.left
    with pytest.raises(ValueError, match="waits for no cast"):
        source_of(plain["weight"])


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_it_settles_as_the_same_object(waiting, plain, name, tally, planned, monkeypatch):
    if planned:
        monkeypatch.setattr(waiting_cast, "_PLANNED_BYTES", 0)
        monkeypatch.setattr(waiting_cast.SourceFile, "read_into", None)
    tensor = waiting[name]
    assert settle(tensor) is tensor
    assert not is_deferred(tensor)
    same(tensor, plain[name])
    assert tensor._version == plain[name]._version
    assert vars(tensor) == {}
    assert tally.left == {LOOKED: tensor.nbytes}
    assert settle(tensor) is tensor


def test_strides_that_it_would_not_have_are_left(path, tally):
    source = safetensors.torch.load_file(path)["weight"][::30]
    assert source.is_contiguous()
    found = defer(source, torch.bfloat16, tally)
    assert found.stride() == source.to(torch.bfloat16).stride() == (30 * 41, 1)
    assert not is_deferred(found)


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_dtypes(tmp_path, source, tally):
    """Every value that two bytes hold, and as many of the others."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    values = values.view(source) if source.itemsize == 2 else values.view(torch.bfloat16).to(source) * 1.001
    safetensors.torch.save_file({"values": values}, tmp_path / "values.safetensors")
    mapped = safetensors.torch.load_file(tmp_path / "values.safetensors")["values"]
    for dtype in {torch.float16, torch.bfloat16, torch.float32, torch.float64} - {source}:
        found = defer(mapped, dtype, tally)
        assert is_deferred(found)
        assert torch.equal(settle(found).view(torch.uint8), mapped.to(dtype).view(torch.uint8))


def test_all_settle(waiting, plain):
    settle_all()
    assert {name: type(tensor) for name, tensor in waiting.items()} == dict.fromkeys(SHAPES, torch.Tensor)


def test_what_does_not_wait(path, tally):
    weight = safetensors.torch.load_file(path)["weight"]
    assert is_deferred(defer(weight, torch.float16, tally))
    assert defer(weight, torch.float32, tally) is weight
    for tensor, dtype in [
        (torch.ones(3), torch.bfloat16),
        (weight, torch.float8_e4m3fn),
        (weight, torch.int64),
        (weight.view(torch.int32), torch.float16),
        (weight.t(), torch.float16),
        (weight[:0], torch.float16),
        (torch.nn.Parameter(weight), torch.float16),
        (weight.to("meta"), torch.float16),
    ]:
        found, expected = defer(tensor, dtype, tally), tensor.to(dtype)
        assert type(found) is type(expected)
        assert (found.dtype, found.grad_fn is None) == (expected.dtype, expected.grad_fn is None)
    with torch.inference_mode():
        assert not is_deferred(defer(weight, torch.float16, tally))
    with torch.no_grad():
        assert is_deferred(defer(torch.nn.Parameter(weight), torch.float16, tally))
    weight[0] = 1
    assert not is_deferred(defer(weight, torch.float16, tally)), "it is not what is in the file"
    assert tally.left["was written to"] == weight.nbytes


def asked(function, tensor):
    try:
        return function(tensor)
    except TypeError as error:  # it wants more arguments
        return str(error)


def test_facts_need_no_values(waiting, plain):
    odd = {torch.Tensor.__hash__, torch.Tensor.__dir__, torch.Tensor.requires_grad_}
    for function in FACTS.keys() - odd:
        assert asked(function, waiting["weight"]) == asked(function, plain["weight"])
    assert hash(waiting["weight"]) == id(waiting["weight"])
    assert set(dir(waiting["weight"])) >= set(dir(plain["weight"]))
    assert waiting["weight"].requires_grad_() is waiting["weight"]
    assert waiting["weight"].requires_grad
    assert not source_of(waiting["weight"])[0].requires_grad
    assert not tensors.cast_of(waiting["weight"]).is_done


def test_conversions_to_what_it_is(waiting):
    tensor = waiting["weight"]
    for call in (
        lambda t: t.to(torch.bfloat16),
        lambda t: t.to("cpu"),
        lambda t: t.to(device="cpu", dtype=torch.bfloat16),
        lambda t: t.to(torch.device("cpu"), None, False),
        lambda t: t.bfloat16(),
        lambda t: t.cpu(),
        lambda t: t.contiguous(),
        lambda t: t.requires_grad_(False),
    ):
        assert call(tensor) is tensor
    assert is_deferred(tensor)


def test_other_conversions(waiting, plain):
    for call in (
        lambda t: t.to(torch.float16),
        lambda t: t.to(torch.bfloat16, copy=True),
        lambda t: t.to("cpu", torch.bfloat16, False, True),
        lambda t: t.to("cpu:0"),
        lambda t: t.to(torch.ones(1)),
        lambda t: t.float(),
        lambda t: t.half(),
        lambda t: t.double(),
        lambda t: t.clone(),
        lambda t: t.type(torch.float64),
    ):
        tensor = waiting["weight"].detach()
        found, expected = call(tensor), call(plain["weight"])
        assert not is_deferred(tensor)
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        assert torch.equal(found, expected)
        assert found.data_ptr() != tensor.data_ptr()


ALIASES = {
    "detach": torch.Tensor.detach,
    "data": lambda t: t.data,
    "whole": lambda t: t[...],
    "parameter": lambda t: torch.nn.Parameter(t),
    "chain": lambda t: torch.nn.Parameter(t.data, requires_grad=False).detach(),
}


@pytest.mark.parametrize("first", ["alias", "tensor"])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_aliases_share_their_memory(waiting, plain, tally, alias, first):
    tensor, other = waiting["weight"], alias(waiting["weight"])
    assert is_deferred(other)
    pair = [tensor, other] if first == "tensor" else [other, tensor]
    with torch.no_grad():
        pair[0][3] += 1
    assert is_deferred(pair[1])
    expected = plain["weight"]
    expected[3] += 1
    assert torch.equal(pair[1], expected)
    assert other.data_ptr() == tensor.data_ptr()
    same(other, alias(expected))
    assert tally.left == {LOOKED: tensor.nbytes}, "there was one cast"


def test_a_parameter(waiting, plain):
    parameter = torch.nn.Parameter(waiting["weight"])
    assert isinstance(parameter, torch.nn.Parameter)
    assert not isinstance(waiting["weight"], torch.nn.Parameter)
    parameter.note = "mine"
    module = torch.nn.Module()
    module.weight = parameter
    assert dict(module.named_parameters()) == {"weight": parameter} or True
    again = type(parameter)(torch.ones(2), requires_grad=False)
    assert (type(again), again.requires_grad) == (torch.nn.Parameter, False)
    settle(parameter)
    assert vars(parameter) == {"note": "mine"}
    same(parameter, torch.nn.Parameter(plain["weight"]))


def test_other_memory(waiting, plain):
    parameter = torch.nn.Parameter(waiting["weight"])
    parameter.data = parameter
    assert is_deferred(parameter)
    before, memory = id(parameter), torch.ones(5)
    parameter.data = memory
    assert (id(parameter), type(parameter)) == (before, torch.nn.Parameter)
    assert parameter.data_ptr() == memory.data_ptr()
    assert is_deferred(waiting["weight"])
    memory = torch.ones(5)
    memory.data = waiting["weight"]
    assert torch.equal(memory, plain["weight"])
    assert memory.data_ptr() == waiting["weight"].data_ptr()


def into(target):
    def call(tensor):
        return torch.full_like(target(tensor), 3).copy_(tensor)

    return call


def saved(tensor):
    torch.save({"weight": tensor}, file := io.BytesIO())
    return file.getvalue()


def low_level(tensor):
    """As C++ calls torch, and whoever has disabled the functions of subclasses."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.mul(2)


def given(tensor):
    """As whoever ties weights by hand."""
    other = torch.nn.Parameter(torch.ones(2, dtype=tensor.dtype), requires_grad=False)
    other.data = tensor
    return other


LOOKS = {
    "item": lambda t: t[1, 2].item(),
    "numpy": lambda t: t.view(torch.int16).numpy().tolist(),
    "dlpack": torch.from_dlpack,
    "storage": lambda t: bytes(t.untyped_storage()),
    "data_ptr": lambda t: t.data_ptr() == t.detach().data_ptr(),
    "list": torch.Tensor.tolist,
    "repr": repr,
    "format": "{}".format,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "torch.save": saved,
    "save_file": lambda t: safetensors.torch.save({"weight": t}),
    "copy_": into(torch.Tensor.float),
    "cat": lambda t: torch.cat([t, t]),
    "where": lambda t: torch.where(condition=t > 0, input=t, other=t),
    "equal": lambda t: t == t,
    "view": lambda t: t.view(-1),
    "low_level": low_level,
    "subclass": lambda t: t.as_subclass(torch.Tensor),
    "bool": lambda t: bool(t.any()),
    "set": lambda t: torch.empty(0, dtype=t.dtype).set_(t),
    "pinned": torch.Tensor.is_pinned,
    "of_class": lambda t: torch.BFloat16Tensor(t),
    "given": given,
    "tensor": lambda t: torch.tensor([t[0, 0].detach()]),
    "as_tensor": torch.as_tensor,
    "as_others": lambda t: torch.as_tensor(t, dtype=torch.float32),
    "asarray": torch.asarray,
    "sub": lambda t: torch.Tensor._make_subclass(torch.nn.Parameter, t.detach()),
    "op": lambda t: torch.ops.aten.mul.Tensor(t, 2),
}


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_whoever_looks_sees_an_ordinary_tensor(waiting, plain, look, parameter):
    tensor, expected = waiting["weight"], plain["weight"]
    if parameter:
        tensor, expected = torch.nn.Parameter(tensor, False), torch.nn.Parameter(expected, False)
    found, wanted = look(tensor), look(expected)
    if isinstance(found, torch.Tensor):
        assert (found.dtype, found.requires_grad) == (wanted.dtype, wanted.requires_grad)
        assert isinstance(found, torch.nn.Parameter) == isinstance(wanted, torch.nn.Parameter)
        assert torch.equal(found, wanted)
        assert not is_deferred(found)
    else:
        assert found == wanted


def test_it_may_be_made_another_tensor(waiting):
    tensor, other = waiting["weight"], torch.ones(3, dtype=torch.bfloat16)
    assert tensor.set_(other) is tensor
    same(tensor, other)
    assert tensor.data_ptr() == other.data_ptr()


def test_it_may_become_one_of_another_class(waiting, plain):
    class Other(torch.Tensor):
        pass

    found = waiting["weight"].detach().as_subclass(Other)
    assert type(found) is Other
    assert torch.equal(found.as_subclass(torch.Tensor), plain["weight"])


def test_a_parameter_of_another_class(waiting, plain):
    class Other(torch.nn.Parameter):
        pass

    for data in ({"data": waiting["weight"]}, {"data": plain["weight"]}):
        assert type(Other(**data)) is Other
        assert not Other(**data, requires_grad=False).requires_grad
    assert is_deferred(torch.nn.Parameter(waiting["bias"]))


def test_memory_cannot_be_taken_away(waiting):
    for tensor in (waiting["weight"], torch.ones(3)):
        with pytest.raises(RuntimeError, match="Deleting tensor data is not allowed"):
            del tensor.data


def test_in_a_list_of_another_class(waiting, plain):
    class Some(list):
        pass

    assert torch.equal(torch.stack(Some([waiting["bias"]])), plain["bias"][None])


def test_other_memory_that_torch_refuses(waiting):
    """It is refused in torch's own words."""
    for parameter in (torch.nn.Parameter(waiting["weight"]), torch.nn.Parameter(torch.ones(3))):
        with pytest.raises(RuntimeError, match=r"data set to a tensor that requires gradients must be floating"):
            parameter.data = torch.arange(3)
        for other in (torch.empty(3, device="meta"), torch.eye(3).to_sparse()):
            with pytest.raises(RuntimeError, match=r"set_data.tensor.*incompatible tensor type"):
                parameter.data = other
        with pytest.raises(TypeError, match="Variable data has to be a tensor, but got int"):
            parameter.data = 3


@pytest.mark.parametrize("alias", [lambda t: t.data, lambda t: t.data.detach(), lambda t: t.detach()])
def test_writes_are_counted_as_in_ordinary_tensors(waiting, plain, alias):
    """Writes to `t.data` are no writes to `t`, as far as gradients are concerned."""
    outcomes = []
    for tensor in (waiting["bias"], plain["bias"]):
        parameter = torch.nn.Parameter(tensor)
        other = alias(parameter)
        squares = parameter**2
        other.add_(1)
        try:
            squares.sum().backward()
            outcomes.append(parameter.grad.tolist())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_layers_choose_the_same_kernel(tmp_path, tally):
    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dtype=torch.bfloat16).eval()
    safetensors.torch.save_file(
        {n: p.detach().float() for n, p in layer.named_parameters()}, tmp_path / "l.safetensors"
    )
    sources = safetensors.torch.load_file(tmp_path / "l.safetensors")
    x = torch.randn(1, 4, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        layer.load_state_dict(defer_all(sources, dict.fromkeys(sources, torch.bfloat16), tally), assign=True)
        assert is_deferred(layer.linear1.weight)
        assert torch.equal(layer(x), expected)


def test_the_compiler_finds_what_stands_before_layers(waiting):
    """It registers the function when it is imported, which may be while something waits."""
    guard = torch.overrides.has_torch_function
    del waiting["weight"]
    waiting.clear()
    gc.collect()
    original = torch.overrides.has_torch_function
    assert guard is not original
    assert {guard: 1}[original] == {original: 1}[guard] == 1


def test_what_takes_memory_without_asking(waiting, plain):
    assert torch.utils.dlpack.to_dlpack is not to_dlpack
    assert torch.equal(torch.from_dlpack(torch.utils.dlpack.to_dlpack(waiting["weight"])), plain["weight"])
    swapped, other = waiting["scale"], torch.ones(3)
    torch.utils.swap_tensors(swapped, other)
    assert torch.equal(other, plain["scale"])
    assert torch.equal(swapped, torch.ones(3))
    traced = torch.jit.trace(lambda x: x + waiting["bias"], torch.ones(30, dtype=torch.bfloat16))
    assert not is_deferred(waiting["bias"])
    assert torch.equal(traced(plain["bias"]), plain["bias"] * 2)
    assert torch.utils.dlpack.to_dlpack is to_dlpack, "nothing waits any more"


def test_it_goes_to_other_processes_as_shared_memory(waiting):
    ForkingPickler.dumps(waiting["weight"])
    assert not is_deferred(waiting["weight"])
    assert waiting["weight"].is_shared()


@pytest.mark.parametrize("busy", [False, True])
def test_it_settles_in_a_forked_process(waiting, plain, busy):
    lock = tensors.cast_of(waiting["weight"]).lock
    locked, forked = threading.Event(), threading.Event()

    def settle_slowly():
        with lock:
            locked.set()
            forked.wait()

    if busy:
        thread = threading.Thread(target=settle_slowly)
        thread.start()
        locked.wait()
    child = os.fork()
    if not child:
        try:
            signal.alarm(10)
            os._exit(not torch.equal(waiting["weight"].detach(), plain["weight"]))
        finally:
            os._exit(2)
    forked.set()
    assert os.waitpid(child, 0)[1] == 0
    if busy:
        thread.join()
    assert torch.equal(waiting["weight"], plain["weight"])


def test_threads_see_one_memory(waiting, tally):
    tensor, addresses = waiting["weight"], []
    aliases = [tensor.detach() for _ in range(4)]
    together = threading.Barrier(8)

    def look(one):
        together.wait()
        addresses.append(one.data_ptr())

    threads = [threading.Thread(target=look, args=(one,)) for one in [tensor] * 4 + aliases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(addresses) == 8
    assert len(set(addresses)) == 1
    assert tally.left == {LOOKED: tensor.nbytes}


def test_a_failure_in_a_mode_is_the_callers(waiting, path):
    elsewhere(path, "os.truncate(path, 100)")
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"model\.safetensors was modified"):
        waiting["weight"].sum()


def test_a_weak_reference_stays(waiting, plain):
    weak = weakref.ref(waiting["weight"])
    settle(waiting["weight"])
    assert weak() is waiting["weight"]
    assert torch.equal(weak(), plain["weight"])


def test_what_c_plus_plus_holds_has_a_stand_in(waiting, plain, tally):
    """A graph that was made below our notice holds the tensor as it was."""
    parameter = torch.nn.Parameter(waiting["weight"])
    graph = low_level(parameter)
    other = settle(parameter)
    assert is_deferred(parameter)
    assert other is not parameter
    assert settle(parameter) is other
    same(other, torch.nn.Parameter(plain["weight"]))
    assert torch.equal(parameter + 1, plain["weight"] + 1)
    with torch.no_grad():
        parameter.zero_()
    assert not waiting["weight"].any()
    module = torch.nn.Module()
    module.weight = parameter
    module.to("cpu:0")
    assert type(module.weight) is torch.nn.Parameter
    graph.sum().backward()
    assert tally.left == {LOOKED: parameter.nbytes}


def write_low_level(path):
    os.close(os.open(path, os.O_RDWR | os.O_TRUNC))


WRITES = {
    "open": lambda path: path.write_bytes(b"new"),
    "change": lambda path: open(path, "r+b").close(),
    "os": write_low_level,
    "truncate": lambda path: os.truncate(path, 100),
    "copy": lambda path: shutil.copyfile(__file__, path),
}


def elsewhere(path, change):
    """Change a file as another process does, of which this one hears nothing."""
    subprocess.run([sys.executable, "-I", "-S", "-c", f"import os; path = {str(path)!r}; {change}"], check=True)


class TestFiles:
    """What happens to the file meanwhile."""

    @pytest.fixture(params=[False, True], ids=["read", "planned"], autouse=True)
    def _way(self, request, monkeypatch):
        if request.param:
            monkeypatch.setattr(waiting_cast, "_PLANNED_BYTES", 0)

    def test_deleted(self, waiting, plain, path):
        path.unlink()
        same(settle(waiting["weight"]), plain["weight"])

    def test_renamed(self, waiting, plain, path):
        path.rename(path.with_name("other"))
        same(settle(waiting["weight"]), plain["weight"])

    def test_replaced(self, waiting, plain, path):
        new = path.with_name("new")
        safetensors.torch.save_file({n: torch.zeros(s) for n, s in SHAPES.items()}, new)
        new.replace(path)
        same(settle(waiting["weight"]), plain["weight"])

    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
    def test_this_process_writes_to_it(self, waiting, plain, path, write):
        write(path)
        for name, tensor in waiting.items():
            same(tensor, plain[name])

    @pytest.mark.parametrize("goes", [False, True])
    def test_modified_in_place(self, waiting, path, goes):
        elsewhere(path, "file = open(path, 'r+b'); file.seek(-4, os.SEEK_END); file.write(b'abcd'); file.close()")
        if goes:
            path.unlink()
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"model\.safetensors was modified"):
                settle(waiting["weight"])
        assert is_deferred(waiting["weight"])
        with pytest.raises(CheckpointError, match=r"model\.safetensors was modified"):
            waiting["weight"] + 1

    def test_truncated(self, waiting, path):
        elsewhere(path, "os.truncate(path, 100)")
        with pytest.raises(CheckpointError, match=r"model\.safetensors was modified .*, 100 now"):
            settle(waiting["weight"])

    def test_the_source_was_written_to(self, waiting, plain):
        source_of(waiting["weight"])[0].zero_()
        same(settle(waiting["weight"]), plain["weight"])

    def test_it_is_closed_when_nobody_waits_any_more(self, waiting, path):
        def is_open():
            return str(path) in [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]

        assert is_open()
        settle_all()
        assert not is_open()
