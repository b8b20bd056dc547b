"""Our loader for programs that know nothing of it: calls of libraries that it answers, modules whose moves it plans.

accelerator   all of it, put in and taken out together
patches       functions of other libraries, replaced while it is in
tally         what it did, and what it left and why
moves         `torch.nn.Module.to` and `.cuda`
calls         `safetensors.torch.load_file` and `torch.load`
"""

from wan_loader.fastpath.accelerator import Accelerator
from wan_loader.fastpath.calls import FastPath
from wan_loader.fastpath.moves import Moves
from wan_loader.fastpath.tally import Tally

__all__ = ["Accelerator", "FastPath", "Moves", "Tally"]
