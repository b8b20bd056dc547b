"""Our loader for programs that know nothing of it: calls of libraries that it answers, modules whose moves it plans.

process       the one accelerator of this process: `accelerate`, `install`, `uninstall`
launch        whole programs with it inside: `wan-loader run`, `enable`
accelerator   all of it, put in and taken out together
patches       functions of other libraries, replaced while it is in
tally         what it did, and what it left and why
moving        modules that move to a GPU, by one plan each, and back
deferral      tensors whose casts or initialisation wait until somebody looks
libraries     functions of diffusers, transformers, safetensors and torch that read and write files
ours, modes   whether this thread is inside our own code, or torch in a mode of its own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_loader.fastpath.accelerator import Accelerator
    from wan_loader.fastpath.moving.moves import Moves
    from wan_loader.fastpath.tally import Tally

__all__ = ["Accelerator", "Moves", "Tally"]

# a program that never loads a model is not to wait for these
__getattr__ = lazy_names(
    __name__,
    {
        "Accelerator": "wan_loader.fastpath.accelerator",
        "Moves": "wan_loader.fastpath.moving.moves",
        "Tally": "wan_loader.fastpath.tally",
    },
)


def __dir__() -> list[str]:
    return __all__
