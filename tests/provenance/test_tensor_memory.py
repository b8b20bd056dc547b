"""Where tensors lie, and which of them are not simply their bytes."""

import pytest

torch = pytest.importorskip("torch")

from wan_loader.provenance.proof import Reason  # noqa: E402
from wan_loader.provenance.tensor_memory import TensorMemory, memory_of  # noqa: E402

BASE = torch.arange(60, dtype=torch.float32).reshape(6, 10)

VIEWS = {
    "whole": (BASE, 0, 240),
    "rows": (BASE[2:4], 80, 80),
    "a column": (BASE[:, 3], 12, 204),
    "every second row": (BASE[1::2], 40, 200),
    "transposed": (BASE.T, 0, 240),
    "one element": (BASE[5, 9], 236, 4),
    "expanded": (BASE[1, :1].expand(1000), 40, 4),
    "a view of a view": (BASE[1:].view(-1)[7:].view(torch.uint8)[1:], 69, 171),
    "a parameter": (torch.nn.Parameter(BASE), 0, 240),
    "detached": (torch.nn.Parameter(BASE)[3:].detach(), 120, 120),
    "one row of odd stride": (BASE.as_strided((1, 3), (99, 1), 4), 16, 12),
    "bits": (BASE.view(torch.int16), 0, 240),
    "complex": (BASE.view(torch.complex64), 0, 240),
}


@pytest.mark.parametrize(("tensor", "start", "nbytes"), VIEWS.values(), ids=VIEWS.keys())
def test_from_the_first_element_to_the_last(tensor, start, nbytes):
    memory = memory_of(tensor)
    assert memory == TensorMemory(
        BASE.data_ptr() + start,
        nbytes,
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        tensor.stride(),
    )
    assert memory.end == memory.address + nbytes


class Other(torch.Tensor):
    pass


def wrapped():
    """What a function sees that vmap calls: of the plain type, without memory."""
    seen = []
    torch.vmap(lambda row: seen.append((type(row), memory_of(row))) or row)(BASE)
    assert seen[0][0] is torch.Tensor
    return seen[0][1]


ODD = {
    "meta": lambda: memory_of(torch.empty(3, device="meta")),
    "a subclass": lambda: memory_of(BASE.as_subclass(Other)),
    "a parameter of a subclass": lambda: memory_of(torch.nn.Parameter(BASE.as_subclass(Other))),
    "sparse": lambda: memory_of(torch.eye(3).to_sparse()),
    "compressed": lambda: memory_of(torch.eye(3).to_sparse_csr()),
    "quantised": lambda: memory_of(torch.quantize_per_tensor(BASE, 0.1, 0, torch.qint8)),
    "conjugated": lambda: memory_of(BASE.view(torch.complex64).conj()),
    "negated": lambda: memory_of(BASE.view(torch.complex64).conj().imag),
    "zeros without memory": lambda: memory_of(torch._efficientzerotensor(3)),
    "batched": wrapped,
    "uninitialised": lambda: memory_of(torch.nn.parameter.UninitializedParameter()),
    "no tensor": lambda: memory_of(None),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse .* beta state:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("judge", ODD.values(), ids=ODD.keys())
def test_values_that_are_not_the_bytes(judge):
    assert judge() is Reason.NOT_PLAIN


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_without_elements(shape):
    assert memory_of(torch.empty(shape)) is Reason.EMPTY
