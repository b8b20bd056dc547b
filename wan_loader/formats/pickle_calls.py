"""The functions that a checkpoint's pickle may call, as functions from inert values to inert values.

Each does what the function of that name does in torch, as far as facts go, and refuses arguments that torch refuses. A
function that is not here gives an `Other`, and torch has to judge it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from wan_loader.dtypes import ITEMSIZE
from wan_loader.formats.pickle_values import (
    Global,
    Ledger,
    Ordered,
    Other,
    PickledStorage,
    PickledTensor,
    PickleError,
    kind_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CALLS", "KNOWN", "STORAGE_TYPES", "check_key"]

#: The dtype of a storage that is named by its class.
STORAGE_TYPES = {
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}
_DEVICE = re.compile(r"[a-z]+(:\d{1,4})?")
_SEQUENCES = (tuple, list)
_PLAIN_KEYS = frozenset((str, int, float, bool, bytes, type(None), complex, Global))
#: Of a tuple, with those of the tuples in it.
_MAX_KEY_PARTS = 64


def check_key(ledger: Ledger, key: Any) -> None:
    """Refuse what takes long to hash: a nested tuple of a few hundred bytes can take for ever.

    Raises:
        PickleError: The key is too large, or of a type that no key has.
    """
    if type(key) in _PLAIN_KEYS:
        return
    # not recursive: tuples may nest as deep as the pickle is long
    room, parts = _MAX_KEY_PARTS, [key]
    while parts:
        part = parts.pop()
        if type(part) is tuple and len(part) <= room:
            room -= len(part)
            parts += part
        elif type(part) is Other:
            ledger.judge(f"a key of a dict is a {part.what}")
        elif type(part) not in _PLAIN_KEYS:
            raise PickleError(f"a key of a dict is, or has in it, a {kind_of(part)}")


def _rebuild_tensor(
    ledger: Ledger,
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> PickledTensor | Other:
    dtype = storage.dtype if type(storage) is PickledStorage else ""
    return _tensor(ledger, storage, dtype, offset, shape, stride, requires_grad, hooks, metadata)


def _rebuild_tensor_v3(
    ledger: Ledger,
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> PickledTensor | Other:
    name = dtype.name.removeprefix("torch.") if type(dtype) is Global else ""
    if name not in ITEMSIZE:
        raise PickleError("a tensor has no dtype")
    if requires_grad is True:  # torch cannot make such a tensor; a parameter sets it later
        raise PickleError("requires_grad is set before there are values")
    return _tensor(ledger, storage, name, offset, shape, stride, requires_grad, hooks, metadata)


def _tensor(
    ledger: Ledger,
    storage: Any,
    dtype: str,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any,
) -> PickledTensor | Other:
    if type(storage) is Other:
        return Other("torch.Tensor")
    if type(storage) is not PickledStorage:
        raise PickleError("a tensor is not built from a storage")
    if type(shape) not in _SEQUENCES or type(stride) not in _SEQUENCES:
        raise PickleError("a shape is no tuple")
    ledger.charge(8 * (len(shape) + len(stride)))
    _check_gradient(requires_grad, hooks, dtype)
    if metadata:
        if type(metadata) is not dict:
            raise PickleError("a tensor's metadata is no dict")
        ledger.judge("a tensor carries metadata, such as a conjugate bit")
    tensor = PickledTensor(storage, dtype, offset, tuple(shape), tuple(stride))
    ledger.tensors.append(tensor)
    return tensor


def _check_gradient(requires_grad: Any, hooks: Any, dtype: str) -> None:
    if type(requires_grad) is not bool:
        raise PickleError("requires_grad is no bool")
    if requires_grad and not dtype.startswith(("float", "bfloat", "complex")):
        raise PickleError(f"requires_grad is set for {dtype}")
    if hooks:
        raise PickleError("a tensor has hooks")


def _rebuild_parameter(ledger: Ledger, tensor: Any, requires_grad: Any, hooks: Any) -> PickledTensor | Other:
    if type(tensor) is Other:
        return tensor
    if type(tensor) is not PickledTensor:
        raise PickleError("a parameter is no tensor")
    _check_gradient(requires_grad, hooks, tensor.dtype)
    return tensor


def _ordered_dict(ledger: Ledger, pairs: Any = ()) -> Ordered:
    """Make an empty one, or one of a list of pairs, as Python 2 writes them."""
    if type(pairs) not in _SEQUENCES:
        raise PickleError("an OrderedDict of no pairs")
    ledger.charge(100 * len(pairs))
    ordered = Ordered()
    for pair in pairs:
        if type(pair) not in _SEQUENCES or len(pair) != 2:
            raise PickleError("an OrderedDict of no pairs")
        check_key(ledger, pair[0])
        ordered[pair[0]] = pair[1]
    return ordered


def _counter(ledger: Ledger, counts: Any = None) -> Ordered:
    if counts is None:
        return Ordered()
    if type(counts) is not dict:
        raise PickleError("a Counter of no dict")
    ledger.charge(100 * len(counts))
    # its keys were checked when they were put into the dict
    return Ordered(counts)


def _size(ledger: Ledger, sizes: Any = ()) -> tuple[int, ...]:
    if type(sizes) not in _SEQUENCES:
        raise PickleError("a torch.Size of no tuple")
    ledger.charge(8 * len(sizes))
    if any(type(size) is not int for size in sizes):
        raise PickleError("a torch.Size of other things than numbers")
    return tuple(sizes)


def _device(ledger: Ledger, kind: Any, index: Any = 0) -> Other:
    if type(kind) is not str or not _DEVICE.fullmatch(kind) or type(index) is not int:
        raise PickleError("a torch.device of no name")
    return Other("torch.device")


def _encode(ledger: Ledger, text: Any, encoding: Any) -> bytes:
    """Make bytes, as pickle protocol 2 writes them."""
    if type(text) is not str or encoding != "latin1":
        raise PickleError("bytes in an encoding that no pickler writes")
    ledger.charge(len(text))
    return text.encode("latin1")


def _set(ledger: Ledger, items: Any = ()) -> Other:
    if type(items) not in _SEQUENCES:
        raise PickleError("a set of no list")
    ledger.charge(8 * len(items))
    for item in items:
        check_key(ledger, item)
    return Other("set")


def _bytearray(ledger: Ledger, content: Any = b"") -> Other:
    if type(content) is not bytes:
        raise PickleError("a bytearray of no bytes")
    return Other("bytearray")


def _complex(ledger: Ledger, real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise PickleError("a complex number of other things than numbers")
    return complex(real, imaginary)


#: What a pickle may call, with a ledger before the arguments.
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _encode,
    "builtins.set": _set,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
}
#: Names that torch need not judge.
KNOWN = frozenset((*CALLS, *STORAGE_TYPES, *(f"torch.{dtype}" for dtype in ITEMSIZE)))
