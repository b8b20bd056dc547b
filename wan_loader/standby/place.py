"""Where the stand-by server of this user and this environment listens. Imports little: each program asks."""

from __future__ import annotations

import os
import sys
from binascii import crc32

from wan_loader.system.peers import own_directory

__all__ = ["environment_key", "lock_path", "log_path", "package_root", "socket_path"]


def package_root() -> str:
    """Return the directory that this package lies in."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def environment_key() -> str:
    """Name this environment: the interpreter, what is installed for it, and this package."""
    return f"{crc32(chr(0).join((sys.prefix, sys.version, package_root())).encode('utf-8', 'surrogateescape')):08x}"


def socket_path() -> str:
    """Return where the server listens, if there is one."""
    return os.path.join(own_directory(), f"{environment_key()}.socket")


def lock_path() -> str:
    """Return the file that a server holds locked as long as it lives, with its process id in it."""
    return os.path.join(own_directory(), f"{environment_key()}.lock")


def log_path() -> str:
    """Return the file that takes what imports print."""
    return os.path.join(own_directory(), f"{environment_key()}.log")
