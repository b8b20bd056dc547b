"""Whoever saves over a file whose tensors are alive gets along with himself."""

import io
import time

import pytest

torch = pytest.importorskip("torch")

import safetensors.numpy  # noqa: E402
import safetensors.torch  # noqa: E402
from waiting_tensors import defer  # noqa: E402

from wan_loader.fastpath.deferral.deferred import is_deferred  # noqa: E402
from wan_loader.fastpath.libraries.rewrites import Rewrites  # noqa: E402
from wan_loader.fastpath.libraries.torch_load import TorchLoad  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402
from wan_loader.provenance.prove import prove  # noqa: E402
from wan_loader.system.leases import Leases  # noqa: E402


@pytest.fixture(autouse=True)
def installed():
    tally, leases = Tally(), Leases()
    patches = Patches(tally)
    Rewrites(leases).install(patches)
    TorchLoad(tally, leases, min_nbytes=0).install(patches)
    yield
    patches.undo()
    assert not tally.left


@pytest.fixture
def path(tmp_path):
    torch.save({"w": torch.arange(10000.0)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def scripted():
    return torch.jit.script(torch.nn.Linear(2, 2))


WRITERS = {
    "torch.save": lambda state, path: torch.save(state, path),
    "torch.save of a name": lambda state, path: torch.save(obj=state, f=str(path)),
    "torch.save, legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "torch.save to an open file": lambda state, path: torch.save(state, path.open("wb")),
    "torch.jit.save": lambda state, path: torch.jit.save(scripted(), path),
    "ScriptModule.save": lambda state, path: scripted().save(str(path)),
    "safetensors.torch": lambda state, path: safetensors.torch.save_file(state, path),
    "safetensors.numpy": lambda state, path: safetensors.numpy.save_file({"w": state["w"].numpy()}, path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_a_file_is_saved_over_itself(path, write):
    state = torch.load(path)
    assert prove(state).ranges
    start = time.monotonic()
    write(state, path)
    assert time.monotonic() - start < 10, "it does not wait for itself"
    assert torch.equal(state["w"], torch.arange(10000.0))


def test_a_file_is_saved_over_whose_cast_waits(path, tmp_path):
    state = torch.load(path)
    cast, other = (defer(state["w"], dtype, Tally()) for dtype in (torch.bfloat16, torch.float16))
    torch.save({"w": cast}, tmp_path / "y.pth")
    assert not is_deferred(cast), "somebody has looked"
    assert is_deferred(other)
    torch.save({"w": torch.zeros(10000)}, path)
    assert not is_deferred(other)
    assert torch.equal(other, torch.arange(10000.0).half())


def test_a_converted_state_is_saved_over_its_own_file(path):
    state = torch.load(path)
    torch.save({"w": defer(state["w"], torch.float64, Tally())}, path)
    assert torch.equal(torch.load(path)["w"], torch.arange(10000.0).double())


def test_what_is_saved_elsewhere_settles_nothing(path, tmp_path):
    state = torch.load(path)
    torch.save(state, tmp_path / "y.pth")
    torch.save(state, io.BytesIO())
    safetensors.torch.save_file(state, tmp_path / "y.safetensors")
    assert prove(state).ranges
    cast = defer(state["w"], torch.bfloat16, Tally())
    torch.save({"n": 1}, tmp_path / "y.pth")
    assert is_deferred(cast)
    with pytest.raises(TypeError):
        torch.save(state)
