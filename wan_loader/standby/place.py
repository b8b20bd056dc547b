"""Where the stand-by server of this user and this environment listens. Imports little: each program asks."""

from __future__ import annotations

import os
import stat
import sys
from binascii import crc32

__all__ = ["directory", "environment_key", "lock_path", "log_path", "not_private", "package_root", "socket_path"]


def package_root() -> str:
    """Return the directory that this package lies in."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def environment_key() -> str:
    """Name this environment: the interpreter, what is installed for it, and this package."""
    return f"{crc32(chr(0).join((sys.prefix, sys.version, package_root())).encode('utf-8', 'surrogateescape')):08x}"


def directory() -> str:
    """Return the directory of this user's servers, which need not be there: below what the session gives, or /tmp."""
    user = os.geteuid()
    for path in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"):
        if path and os.path.isabs(path) and not not_private(path):
            return os.path.join(path, "wan-loader")
    return f"/tmp/wan-loader-{user}"


def socket_path() -> str:
    """Return where the server listens, if there is one."""
    return os.path.join(directory(), f"{environment_key()}.socket")


def lock_path() -> str:
    """Return the file that a server holds locked as long as it lives, with its process id in it."""
    return os.path.join(directory(), f"{environment_key()}.lock")


def log_path() -> str:
    """Return the file that takes what imports print."""
    return os.path.join(directory(), f"{environment_key()}.log")


def not_private(path: str) -> str:
    """Say why a directory is not this user's alone; nothing if it is."""
    try:
        facts = os.lstat(path)
    except OSError as error:
        return error.strerror or "cannot be looked at"
    if not stat.S_ISDIR(facts.st_mode):
        return "is no directory"
    if facts.st_uid != os.geteuid():
        return "is somebody else's"
    return "others may enter it" if facts.st_mode & 0o077 else ""
