"""What calls of libraries have in common that may be served in another way: why not, and how the arguments read."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["LeftAloneError", "device_name", "plain_path"]


class LeftAloneError(Exception):
    """A call is for the original; the message says why, and is empty where that is no loss. Never leaves this room."""


def plain_path(value: Any) -> str:
    """Return a path as text.

    Raises:
        LeftAloneError: It is something else, such as an open file.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(path := os.fspath(value), str):
        raise LeftAloneError("the file is not given by its path")
    return path


def device_name(value: Any) -> str:
    """Return cpu, cuda or cuda:N for a device as programs name it.

    Raises:
        LeftAloneError: It is none of these.
    """
    import torch

    if type(value) is int:
        return f"cuda:{value}"
    if not isinstance(value, str | torch.device):
        raise LeftAloneError("the device is not named")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise LeftAloneError("the device is not known to torch") from error
    if device.type not in ("cpu", "cuda"):
        raise LeftAloneError(f"the device is a {device.type}")
    return "cpu" if device.type == "cpu" else str(device)
