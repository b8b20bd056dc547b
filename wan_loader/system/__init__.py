"""The operating system: files, the page cache, reads in the background, threads, what the machine has.

Public are the names below, which are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_loader.system.files import check_private, is_below, lock_or_refuse, plain_path, read_capped, write_text
    from wan_loader.system.forks import start_origin, started_process
    from wan_loader.system.machine import available_memory, machine_card, memory_limit, peak_resident
    from wan_loader.system.page_cache import describe
    from wan_loader.system.threads import StoppedError, run_all

__all__ = [
    "StoppedError",
    "available_memory",
    "check_private",
    "describe",
    "is_below",
    "lock_or_refuse",
    "machine_card",
    "memory_limit",
    "peak_resident",
    "plain_path",
    "read_capped",
    "run_all",
    "start_origin",
    "started_process",
    "write_text",
]

__getattr__ = lazy_names(
    __name__,
    {
        "StoppedError": "wan_loader.system.threads",
        "available_memory": "wan_loader.system.machine",
        "check_private": "wan_loader.system.files",
        "describe": "wan_loader.system.page_cache",
        "is_below": "wan_loader.system.files",
        "lock_or_refuse": "wan_loader.system.files",
        "machine_card": "wan_loader.system.machine",
        "memory_limit": "wan_loader.system.machine",
        "peak_resident": "wan_loader.system.machine",
        "plain_path": "wan_loader.system.files",
        "read_capped": "wan_loader.system.files",
        "run_all": "wan_loader.system.threads",
        "start_origin": "wan_loader.system.forks",
        "started_process": "wan_loader.system.forks",
        "write_text": "wan_loader.system.files",
    },
)


def __dir__() -> list[str]:
    return __all__
