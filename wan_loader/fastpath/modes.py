"""Modes of torch that change what a tensor is: with one active, nothing is served."""

from __future__ import annotations

__all__ = ["why_not_now"]


def why_not_now() -> str | None:
    """Say which kind of mode is active in this thread; None if none is. They hold for one thread; loads use others."""
    import torch

    count = sum(getattr(torch._C, f"_len_torch_{kind}_stack", int)() for kind in ("dispatch", "function"))
    if count or torch.is_inference_mode_enabled():
        return "a torch mode (inference, fake tensors, a default device) is active"
    return None
