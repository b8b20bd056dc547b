"""Our loader for programs that know nothing of it: calls of libraries that it answers, modules whose moves it plans.

calls   `safetensors.torch.load_file` and `torch.load`
moves   `torch.nn.Module.to` and `.cuda`
"""

from wan_loader.fastpath.calls import FastPath
from wan_loader.fastpath.moves import Moves

__all__ = ["FastPath", "Moves"]
