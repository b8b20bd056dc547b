"""One load whose tensors are handed out as they arrive, each as soon as its bytes are in place.

    request -> open -> plan | -> step -> step -> ... -> result

What a load changes for its thread or its process while it works (the collector of cycles, the turns of threads, the
current device) it changes in each step alone: between two of them the caller works, for as long as it likes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wan_loader.devices.resolve import current
from wan_loader.engine.activity import loading
from wan_loader.errors import OptionError
from wan_loader.loading.allocate import compact
from wan_loader.loading.load_session import LoadSession
from wan_loader.loading.run import run
from wan_loader.plan.slices import narrow
from wan_loader.system.interpreter import paused_gc, short_turns
from wan_loader.system.posix import trim_heap

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from wan_loader.cancel import CancelToken
    from wan_loader.events import Observer
    from wan_loader.loading.report import LoadReport
    from wan_loader.plan.plan import LoadPlan
    from wan_loader.plan.request import LoadRequest

__all__ = ["TensorIterator", "arrivals", "iterate"]

#: So many bytes of host memory are handed out until what was let go of them is given back to the system. The C library
#: would keep nearly all of it: holes of its heap are a little too small for the next tensor of the same size.
_TRIM_BYTES = 128 << 20

#: Tensors by name, and in the end the report.
TensorIterator = Generator[tuple[str, "torch.Tensor"], None, "LoadReport"]


def iterate(
    request: LoadRequest, *, cancel: CancelToken | None = None, observer: Observer | None = None
) -> TensorIterator:
    """Plan a load; the first tensor that is asked for begins it.

    Closing the generator ends it: reading stops, and everything that was taken is given back.

    Args:
        request: Everything that was asked for; it must be piecemeal.
        cancel: Stops the load.
        observer: Is told of spans.

    Returns:
        A generator of tensors by name, each of which is the caller's alone. It returns the report.
    """
    with LoadSession(cancel=cancel, observer=observer) as session:
        checkpoint = session.open(request)
        plan = session.plan(request, narrow(checkpoint, request.slices))
    return arrivals(session, plan)


def arrivals(session: LoadSession, plan: LoadPlan) -> TensorIterator:
    """Carry out the plan of a session, as `iterate` says; the request must be piecemeal."""
    moving, process = run(plan, cancel=session.cancel, observer=session.observer), os.getpid()
    keeps_heap, handed_nbytes = plan.facts.cuda or not plan.layout.copied, 0
    try:
        while True:
            if os.getpid() != process:
                raise OptionError.because(
                    "iter_file began before this process was forked, and its reads are the parent's",
                    "begin another one in here",
                )
            with _at_work(plan):
                if handed_nbytes >= _TRIM_BYTES and not keeps_heap:
                    trim_heap()
                    handed_nbytes = 0
                try:
                    landed = next(moving)
                except StopIteration as end:
                    return session.result(plan, end.value).report
                landed = {name: _owned(plan, name, tensor) for name, tensor in landed.items()}
            # taken out one by one: what the caller lets go of is gone
            for name in list(landed):
                handed_nbytes += landed[name].nbytes
                yield name, landed.pop(name)
    finally:
        if os.getpid() == process:
            with current(plan.facts.device):
                moving.close()
        else:  # never to be closed: that would wait here for threads that stayed behind
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(moving))


@contextmanager
def _at_work(plan: LoadPlan) -> Iterator[None]:
    """Have the body be the work of a load."""
    with paused_gc(), short_turns(), current(plan.facts.device), loading():
        yield


def _owned(plan: LoadPlan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is, or the slice of it that is wanted, contiguous and with memory of its own."""
    index = plan.request.slices.get(name)
    if index is None:
        return tensor
    if not plan.through_torch and name not in plan.values:
        return compact(tensor)
    import torch

    return tensor[index].clone(memory_format=torch.contiguous_format)
