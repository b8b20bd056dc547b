"""Our loader for programs that know nothing of it: calls of libraries that it answers, modules whose moves it plans.

process       the one accelerator of this process: `accelerate`, `install`, `uninstall`
launch        whole programs with it inside: `wan-loader run`, `enable`
accelerator   all of it, put in and taken out together
patches       functions of other libraries, replaced while it is in
tally         what it did, and what it left and why
moves         `torch.nn.Module.to` and `.cuda`
returns       `torch.nn.Module.to` the CPU and `.cpu`, of what still is in its files
torch_load, from_safetensors, copies, rewrites    functions that read files, fill modules, and write files
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_loader.system.lazy import lazy_names

if TYPE_CHECKING:
    from wan_loader.fastpath.accelerator import Accelerator
    from wan_loader.fastpath.moves import Moves
    from wan_loader.fastpath.tally import Tally

__all__ = ["Accelerator", "Moves", "Tally"]

# a program that never loads a model is not to wait for these
__getattr__ = lazy_names(
    __name__,
    {
        "Accelerator": "wan_loader.fastpath.accelerator",
        "Moves": "wan_loader.fastpath.moves",
        "Tally": "wan_loader.fastpath.tally",
    },
)


def __dir__() -> list[str]:
    return __all__
