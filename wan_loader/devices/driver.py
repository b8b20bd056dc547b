"""The few CUDA driver calls that torch does not offer, by ctypes.

The driver library is the same for every CUDA version that torch may be built with. ctypes releases the interpreter
lock during a call. Where no context is given, the caller must have made torch's current in this thread
(`torch.cuda.set_device`).

Reference: CUDA Driver API, "Memory Management": cuMemHostRegister, cuMemHostUnregister, cuMemHostGetDevicePointer,
cuMemGetAddressRange, cuMemcpyHtoDAsync; "Stream Management": cuStreamCreate, cuStreamDestroy;
"Context Management": cuCtxGetCurrent, cuCtxPushCurrent, cuCtxPopCurrent; "Primary Context Management":
cuDevicePrimaryCtxRetain.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from wan_loader.devices.writer import PinError
from wan_loader.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "allocation",
    "copy_to_device",
    "current_context",
    "destroy_stream",
    "device_address",
    "make_stream",
    "register",
    "start_device",
    "unregister",
]

# from cuda.h: flags of cuStreamCreate and of cuMemHostRegister, and a result of the latter
_NON_BLOCKING = 0x01
_PORTABLE = 0x01
_READ_ONLY = 0x08
_ALREADY_REGISTERED = 712
#: Success, deinitialized, context destroyed, not registered.
_UNREGISTERED = (0, 4, 709, 713)


@cache
def _driver() -> Any:
    # the names with _v2 are those that cuda.h gives to the plain ones: without it, addresses would be of 32 bits
    lib = ctypes.CDLL("libcuda.so.1")
    lib.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    lib.cuMemHostUnregister.argtypes = [ctypes.c_void_p]
    lib.cuMemHostGetDevicePointer_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint]
    lib.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    lib.cuCtxGetCurrent.argtypes = lib.cuCtxPopCurrent_v2.argtypes = [ctypes.POINTER(ctypes.c_void_p)]
    lib.cuMemGetAddressRange_v2.argtypes = [
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_uint64,
    ]
    lib.cuMemcpyHtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    lib.cuStreamCreate.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint]
    lib.cuStreamDestroy_v2.argtypes = [ctypes.c_void_p]
    lib.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return lib


def _name(result: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorName(result, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA error {result}"


def start_device(index: int) -> None:
    """Make the context that torch will use on a device, for the rest of the process; needs no torch.

    Takes as long as torch's own start-up of the device, which then finds it made. Nothing happens where there is no
    such device: torch will say so.
    """
    try:
        lib = _driver()
    except OSError:  # no driver here
        return
    device = ctypes.c_int()
    # never released: torch counts on the primary context for as long as the process lives
    if lib.cuInit(0) == 0 and lib.cuDeviceGet(ctypes.byref(device), index) == 0:
        lib.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), device)


def current_context() -> int:
    """Return the context that is current in this thread, for use in another."""
    context = ctypes.c_void_p()
    _driver().cuCtxGetCurrent(ctypes.byref(context))
    return context.value or 0


@contextmanager
def _within(context: int) -> Iterator[None]:
    """Make a context current in this thread, whichever it is. 0, or one that is gone: nothing changes."""
    lib = _driver()
    pushed = bool(context) and lib.cuCtxPushCurrent_v2(context) == 0
    try:
        yield
    finally:
        if pushed:
            lib.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def register(address: int, nbytes: int, context: int, *, read_only: bool) -> None:
    """Pin host memory for the GPU.

    Args:
        address: The first byte.
        nbytes: The length.
        context: The context to register it with, of `current_context`.
        read_only: Allow pages of a read-only file mapping.

    Raises:
        PinError: The driver refuses.
        DeviceError: Memory at this address was registered and is gone: copies would read its old pages.
    """
    with _within(context):
        result = _driver().cuMemHostRegister_v2(address, nbytes, _READ_ONLY if read_only else _PORTABLE)
    if result == _ALREADY_REGISTERED:
        raise DeviceError.because(
            "host memory overlaps memory that is still registered with CUDA", "start the process again"
        )
    if result:
        raise PinError(f"cuMemHostRegister of {nbytes} bytes: {_name(result)}")


def device_address(address: int) -> int:
    """Return the address at which kernels find registered memory."""
    pointer = ctypes.c_uint64()
    if result := _driver().cuMemHostGetDevicePointer_v2(ctypes.byref(pointer), address, 0):
        raise DeviceError.because(f"registered host memory is not visible to the device: {_name(result)}")
    return pointer.value


def allocation(address: int) -> tuple[int, int]:
    """Return start and end of the device memory that was allocated at once around an address: no copy may go beyond.

    Empty where the driver cannot say.
    """
    start, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    if _driver().cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(nbytes), address):
        return address, address
    return start.value, start.value + nbytes.value


def unregister(address: int, context: int) -> bool:
    """Undo `register`, in any thread. Return True unless the memory is still registered.

    What never was registered counts as done, and so does a context that is gone, as it is at exit.
    """
    with _within(context):
        result = _driver().cuMemHostUnregister(address)
    return result in _UNREGISTERED


def make_stream() -> int:
    """Make a stream that does not wait for the default one; the caller destroys it. Raises `DeviceError`.

    torch's first `Stream` makes dozens at once, which takes 5 ms.
    """
    stream = ctypes.c_void_p()
    if result := _driver().cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING):
        raise DeviceError.because(f"no stream could be made on the device: {_name(result)}")
    return stream.value or 0


def destroy_stream(stream: int) -> None:
    """Give a stream back; what is queued on it still runs."""
    _driver().cuStreamDestroy_v2(stream)


def copy_to_device(copies: Iterable[tuple[int, int, int]], stream: int) -> None:
    """Queue copies (destination, source, nbytes) on a stream.

    Asynchronous from registered memory; from other memory the driver stages the bytes before it returns.
    """
    copy = _driver().cuMemcpyHtoDAsync_v2
    for destination, source, nbytes in copies:
        if result := copy(destination, source, nbytes, stream):
            raise DeviceError.because(f"copy of {nbytes} bytes to the device failed: {_name(result)}")
