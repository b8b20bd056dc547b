"""The few CUDA driver calls that torch does not offer, by ctypes.

The driver library is the same for every CUDA version that torch may be built with. Calls that may take long give up the
interpreter meanwhile. Those of a microsecond do not, since getting it back takes 0.1 to 5 ms beside a thread that
runs Python. Where no context is given, the caller must have made torch's current in this thread
(`torch.cuda.set_device`).

Reference: CUDA Driver API, "Memory Management": cuMemHostRegister, cuMemHostUnregister, cuMemGetAddressRange,
cuMemcpyHtoDAsync, cuMemcpyBatchAsync; "Stream Management": cuStreamCreate, cuStreamSynchronize,
cuStreamWaitEvent; "Event Management": cuEventCreate, cuEventRecord, cuEventQuery, cuEventSynchronize,
cuEventElapsedTime, cuEventDestroy; "Context Management": cuCtxGetCurrent, cuCtxPushCurrent, cuCtxPopCurrent; "Primary
Context Management": cuDevicePrimaryCtxRetain.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from wan_loader.devices.writer import PinError
from wan_loader.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "allocation",
    "copy_to_device",
    "current_context",
    "destroy_event",
    "elapsed_ns",
    "give_stream_back",
    "is_over",
    "make_event",
    "record",
    "register",
    "result_name",
    "start_device",
    "take_stream",
    "unregister",
    "wait_for",
    "wait_for_stream",
    "wait_in_stream",
    "within",
]

# from cuda.h: flags of cuStreamCreate, cuEventCreate and of cuMemHostRegister, results
_NON_BLOCKING = 0x01
_WITHOUT_TIMING = 0x02
_BLOCKING_SYNC = 0x01
_NOT_READY = 600
_PORTABLE = 0x01
_READ_ONLY = 0x08
_ALREADY_REGISTERED = 712
#: Success, deinitialized, context destroyed, not registered.
_UNREGISTERED = (0, 4, 709, 713)


@cache
def _driver() -> Any:
    """Return the driver for calls that may take long: other Python threads run meanwhile."""
    return _declared(ctypes.CDLL("libcuda.so.1"))


@cache
def _quick() -> Any:
    """Return the driver for calls of a microsecond, which keep the interpreter."""
    return _declared(ctypes.PyDLL("libcuda.so.1"))


def _declared(lib: Any) -> Any:
    # the names with _v2 are those that cuda.h gives to the plain ones: without it, addresses would be of 32 bits
    lib.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    lib.cuMemHostUnregister.argtypes = [ctypes.c_void_p]
    lib.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    lib.cuCtxGetCurrent.argtypes = lib.cuCtxPopCurrent_v2.argtypes = [ctypes.POINTER(ctypes.c_void_p)]
    lib.cuMemGetAddressRange_v2.argtypes = [
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_uint64,
    ]
    lib.cuMemcpyHtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    lib.cuStreamCreate.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint]
    lib.cuStreamSynchronize.argtypes = [ctypes.c_void_p]
    lib.cuStreamWaitEvent.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    lib.cuEventCreate.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint]
    lib.cuEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    lib.cuEventQuery.argtypes = lib.cuEventSynchronize.argtypes = [ctypes.c_void_p]
    lib.cuEventDestroy_v2.argtypes = [ctypes.c_void_p]
    lib.cuEventElapsedTime.argtypes = [ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p]
    lib.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return lib


def result_name(result: int) -> str:
    """Return what the driver calls one of its results."""
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
def within(context: int) -> Iterator[None]:
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
    with within(context):
        result = _driver().cuMemHostRegister_v2(address, nbytes, _READ_ONLY if read_only else _PORTABLE)
    if result == _ALREADY_REGISTERED:
        raise DeviceError.because(
            "host memory overlaps memory that is still registered with CUDA", "start the process again"
        )
    if result:
        raise PinError(f"cuMemHostRegister of {nbytes} bytes: {result_name(result)}")


def allocation(address: int) -> tuple[int, int]:
    """Return start and end of the device memory that was allocated at once around an address: no copy may go beyond.

    Empty where the driver cannot say.
    """
    start, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    if _quick().cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(nbytes), address):
        return address, address
    return start.value, start.value + nbytes.value


def unregister(address: int, context: int) -> bool:
    """Undo `register`, in any thread. Return True unless the memory is still registered.

    What never was registered counts as done, and so does a context that is gone, as it is at exit.
    """
    with within(context):
        result = _driver().cuMemHostUnregister(address)
    return result in _UNREGISTERED


#: Streams that nobody uses, by their context. Making one takes milliseconds while memory is being registered.
_spare_streams: dict[int, list[int]] = {}


def take_stream(context: int) -> int:
    """Return a stream that does not wait for the default one, to be given back. Raises `DeviceError`.

    torch's first `Stream` makes dozens at once, which takes 5 ms.
    """
    with suppress(KeyError, IndexError):
        return _spare_streams[context].pop()
    stream = ctypes.c_void_p()
    if result := _driver().cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING):
        raise DeviceError.because(f"no stream could be made on the device: {result_name(result)}")
    return stream.value or 0


def give_stream_back(stream: int, context: int) -> None:
    """Let others use a stream on which nothing is left to do."""
    _spare_streams.setdefault(context, []).append(stream)


def wait_for_stream(stream: int) -> None:
    """Return when everything on a stream is done."""
    _check(_driver().cuStreamSynchronize(stream))


def make_event(*, timed: bool = False, sleeps: bool = False) -> int:
    """Make an event; the caller destroys it.

    Args:
        timed: Times can be asked for, which makes copies beside it slower by some percent.
        sleeps: Whoever waits for it leaves the processor to others, and goes on some microseconds later.
    """
    event = ctypes.c_void_p()
    flags = (0 if timed else _WITHOUT_TIMING) | (_BLOCKING_SYNC if sleeps else 0)
    _check(_quick().cuEventCreate(ctypes.byref(event), flags))
    return event.value or 0


def destroy_event(event: int) -> None:
    """Give an event back."""
    _quick().cuEventDestroy_v2(event)


def record(event: int, stream: int) -> None:
    """Have an event happen once everything on a stream until now is done."""
    _check(_quick().cuEventRecord(event, stream))


def is_over(event: int) -> bool:
    """Return whether an event has happened since it was last recorded."""
    result = _quick().cuEventQuery(event)
    if result == _NOT_READY:
        return False
    _check(result)
    return True


def wait_for(event: int) -> None:
    """Return when an event has happened."""
    _check(_driver().cuEventSynchronize(event))


def wait_in_stream(stream: int, event: int) -> None:
    """Have a stream go on only once an event has happened, as it was last recorded. Returns at once."""
    _check(_quick().cuStreamWaitEvent(stream, event, 0))


def elapsed_ns(start: int, end: int) -> int:
    """Return the time between two timed events that have happened."""
    milliseconds = ctypes.c_float()
    _check(_quick().cuEventElapsedTime(ctypes.byref(milliseconds), start, end))
    return int(milliseconds.value * 1e6)


def _check(result: int) -> None:
    if result:
        raise DeviceError.because(f"work on the device failed: {result_name(result)}")


def copy_to_device(copies: Iterable[tuple[int, int, int]], stream: int, *, quick: bool) -> None:
    """Queue copies (destination, source, nbytes) on a stream.

    Asynchronous from registered memory; from other memory the driver stages the bytes before it returns.

    Args:
        copies: None of them empty.
        stream: The stream.
        quick: The memory is registered and the stream has room for them all.
    """
    wanted = list(copies)
    if quick and len(wanted) > 1 and (copy_batch := _batch_call()) is not None:
        code = copy_batch(wanted, stream)
        if code == 0:
            return
        if code not in _NOT_SUPPORTED:
            nbytes = sum(nbytes for _, _, nbytes in wanted)
            raise DeviceError.because(f"copies of {nbytes} bytes to the device failed: {result_name(code)}")
    copy = (_quick() if quick else _driver()).cuMemcpyHtoDAsync_v2
    for destination, source, nbytes in wanted:
        if result := copy(destination, source, nbytes, stream):
            raise DeviceError.because(f"copy of {nbytes} bytes to the device failed: {result_name(result)}")


class _Location(ctypes.Structure):
    """CUmemLocation: only for managed memory."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes: how the copies of a batch read their sources."""

    _fields_ = (("order", ctypes.c_int), ("source", _Location), ("destination", _Location), ("flags", ctypes.c_uint))


#: CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: after what was queued before, as single copies do.
_IN_STREAM_ORDER = 1
#: Not supported by the driver, or not on this device.
_NOT_SUPPORTED = (801, 803)


@cache
def _batch_call() -> Callable[[list[tuple[int, int, int]], int], int] | None:
    """Return a function that queues several copies with one call and returns the driver's result.

    Copies of 4 MiB come to 0.98 of what large ones reach where four go together, and to 0.95 one by one
    (docs/design/mapped-and-staged.md). None: the driver is older than CUDA 12.8.
    """
    lib = _quick()
    # CUDA 13 left one argument out
    call, has_index = getattr(lib, "cuMemcpyBatchAsync_v2", None), False
    if call is None:
        call, has_index = getattr(lib, "cuMemcpyBatchAsync", None), True
    if call is None:
        return None
    attributes = (_CopyAttributes * 1)(_CopyAttributes(order=_IN_STREAM_ORDER))
    first, failed = (ctypes.c_size_t * 1)(0), ctypes.c_size_t()

    def copy_batch(copies: list[tuple[int, int, int]], stream: int) -> int:
        count = len(copies)
        destinations, sources, sizes = zip(*copies, strict=True)
        return int(
            call(
                (ctypes.c_uint64 * count)(*destinations),
                (ctypes.c_uint64 * count)(*sources),
                (ctypes.c_size_t * count)(*sizes),
                ctypes.c_size_t(count),
                attributes,
                first,
                ctypes.c_size_t(1),
                *((ctypes.byref(failed),) if has_index else ()),
                ctypes.c_void_p(stream),
            )
        )

    return copy_batch
