"""The CUDA driver calls that keep memory apart from addresses, by ctypes: memory that other processes map as well.

A memory object is physical memory. It lives as long as anybody has a handle to it, a mapping of it, or a descriptor
that stands for it, in whatever process: the driver counts. The calls take microseconds, but for making memory. The
caller must have made torch's context current in this thread.

Reference: CUDA Driver API, "Virtual Memory Management".
"""

from __future__ import annotations

import ctypes
import uuid
from functools import cache
from typing import Any

from wan_loader.devices.driver import result_name
from wan_loader.errors import DeviceError, DeviceMemoryError
from wan_loader.sizes import format_bytes

__all__ = [
    "allow_access",
    "create_memory",
    "device_uuid",
    "export_memory",
    "free_addresses",
    "granularity",
    "import_memory",
    "map_memory",
    "release_memory",
    "reserve_addresses",
    "synchronize",
    "unmap_memory",
    "why_not_shared",
]

# from cuda.h
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_FILE_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ, _READ_WRITE = 1, 3  # CUmemAccess_flags
_MANAGES_VIRTUAL_MEMORY, _EXPORTS_DESCRIPTORS = 102, 103  # CUdevice_attribute
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp; its last fields are for compression and the like, and stay zero."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


@cache
def _driver() -> Any:
    lib = ctypes.CDLL("libcuda.so.1")
    number, size, flags = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_ulonglong
    lib.cuDeviceGetAttribute.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int]
    lib.cuDeviceGetUuid_v2.argtypes = [ctypes.c_char * 16, ctypes.c_int]
    lib.cuMemGetAllocationGranularity.argtypes = [ctypes.POINTER(size), ctypes.POINTER(_Properties), ctypes.c_int]
    lib.cuMemCreate.argtypes = [ctypes.POINTER(number), size, ctypes.POINTER(_Properties), flags]
    lib.cuMemRelease.argtypes = [number]
    lib.cuMemExportToShareableHandle.argtypes = [ctypes.POINTER(ctypes.c_int), number, ctypes.c_int, flags]
    lib.cuMemImportFromShareableHandle.argtypes = [ctypes.POINTER(number), ctypes.c_void_p, ctypes.c_int]
    lib.cuMemAddressReserve.argtypes = [ctypes.POINTER(number), size, size, number, flags]
    lib.cuMemAddressFree.argtypes = lib.cuMemUnmap.argtypes = [number, size]
    lib.cuMemMap.argtypes = [number, size, size, number, flags]
    lib.cuMemSetAccess.argtypes = [number, size, ctypes.POINTER(_Access), size]
    return lib


def _check(result: int, what: str) -> None:
    if result:
        raise DeviceError.because(f"the driver refuses to {what}: {result_name(result)}")


def _attribute(index: int, number: int) -> int:
    value = ctypes.c_int()
    _check(_driver().cuDeviceGetAttribute(ctypes.byref(value), number, index), f"describe device {index}")
    return value.value


def why_not_shared(index: int) -> str | None:
    """Return why memory of a device cannot be given to other processes by descriptors; None: it can."""
    if not _attribute(index, _MANAGES_VIRTUAL_MEMORY):
        return "the driver keeps no memory apart from addresses on it"
    if not _attribute(index, _EXPORTS_DESCRIPTORS):
        return "the driver makes no descriptors of its memory"
    return None


def device_uuid(index: int) -> str:
    """Return the name that a device has in every process, whatever devices that sees, and in which order."""
    found = (ctypes.c_char * 16)()
    _check(_driver().cuDeviceGetUuid_v2(found, index), f"name device {index}")
    return str(uuid.UUID(bytes=bytes(found)))


def _properties(index: int) -> _Properties:
    return _Properties(type=_PINNED, handle_types=_FILE_DESCRIPTOR, location=_Location(_DEVICE, index))


@cache
def granularity(index: int) -> int:
    """Return the bytes of which memory objects of a device are multiples."""
    found = ctypes.c_size_t()
    result = _driver().cuMemGetAllocationGranularity(ctypes.byref(found), ctypes.byref(_properties(index)), 0)
    _check(result, f"describe the memory of device {index}")
    return found.value


def create_memory(index: int, nbytes: int) -> int:
    """Make a memory object that may be exported; return its handle.

    Raises:
        DeviceMemoryError: The device has no room.
        DeviceError: The driver does not make such memory.
    """
    handle = ctypes.c_uint64()
    result = _driver().cuMemCreate(ctypes.byref(handle), nbytes, ctypes.byref(_properties(index)), 0)
    if result == _OUT_OF_MEMORY:
        reason = f"device {index} has no room for {format_bytes(nbytes)} of shared memory"
        raise DeviceMemoryError.because(reason, "end what else runs there")
    _check(result, f"make {format_bytes(nbytes)} of shared memory")
    return handle.value


def release_memory(handle: int) -> None:
    """Let go of a handle. The memory stays as long as it is mapped, or anybody else holds it."""
    _driver().cuMemRelease(handle)


def export_memory(handle: int) -> int:
    """Return a new descriptor that stands for a memory object, and keeps it."""
    fd = ctypes.c_int(-1)
    result = _driver().cuMemExportToShareableHandle(ctypes.byref(fd), handle, _FILE_DESCRIPTOR, 0)
    _check(result, "make a descriptor of device memory")
    return fd.value


def import_memory(fd: int) -> int:
    """Return a handle to the memory object of a descriptor, which may be closed then."""
    handle = ctypes.c_uint64()
    result = _driver().cuMemImportFromShareableHandle(ctypes.byref(handle), fd, _FILE_DESCRIPTOR)
    _check(result, "take device memory from a descriptor")
    return handle.value


def reserve_addresses(nbytes: int) -> int:
    """Return the start of device addresses that nothing else will be mapped to."""
    address = ctypes.c_uint64()
    _check(_driver().cuMemAddressReserve(ctypes.byref(address), nbytes, 0, 0, 0), "reserve device addresses")
    return address.value


def free_addresses(address: int, nbytes: int) -> None:
    """Give reserved addresses back, to which nothing is mapped any more."""
    _driver().cuMemAddressFree(address, nbytes)


def map_memory(address: int, nbytes: int, handle: int) -> None:
    """Map a whole memory object to reserved addresses; nobody may use them yet (`allow_access`)."""
    _check(_driver().cuMemMap(address, nbytes, 0, handle, 0), "map device memory")


def allow_access(address: int, nbytes: int, index: int, *, writable: bool) -> bool:
    """Let a device use mapped addresses. Return whether it may also write there: a driver may know no other access."""
    for flags in (_READ_WRITE,) if writable else (_READ, _READ_WRITE):
        access = _Access(_Location(_DEVICE, index), flags)
        result = _driver().cuMemSetAccess(address, nbytes, ctypes.byref(access), 1)
        if result == 0:
            return flags == _READ_WRITE
    _check(result, "allow access to device memory")
    raise AssertionError


def unmap_memory(address: int, nbytes: int) -> bool:
    """Undo `map_memory`, once no work that uses it is left; return whether that was done."""
    return bool(_driver().cuMemUnmap(address, nbytes) == 0)


def synchronize() -> bool:
    """Wait for all work of the current context; return False where that is not possible."""
    return bool(_driver().cuCtxSynchronize() == 0)
