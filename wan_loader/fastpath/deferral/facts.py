"""Functions of torch by what they want of a tensor: what it is, or to give it all its values anew. Imports torch."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["FACTS", "overwrites"]

_T: Any = torch.Tensor
_GETTERS = """
    _base _version device dtype grad grad_fn is_cpu is_cuda is_leaf is_maia is_meta is_mkldnn is_mps is_mtia is_nested
    is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu itemsize layout names nbytes ndim output_nr
    requires_grad retains_grad shape
"""
_METHODS = """
    __dir__ __hash__ __len__ dim element_size get_device is_complex is_conj is_contiguous is_floating_point
    is_inference is_neg is_signed ndimension nelement numel requires_grad_ size stride
"""
_FUNCTIONS = "is_complex is_conj is_floating_point is_inference is_neg is_signed numel"
#: Functions that need no values, and whose outcome is none. (A dict, here and below: torch 2.7 compiles no frozenset.)
FACTS = dict.fromkeys(
    [getattr(_T, name).__get__ for name in _GETTERS.split() if hasattr(_T, name)]
    + [getattr(_T, name) for name in _METHODS.split()]
    + [getattr(torch, name) for name in _FUNCTIONS.split()]
    + [_T.requires_grad.__set__]
)

_OVERWRITE_METHODS = dict.fromkeys([_T.copy_, _T.fill_, _T.zero_, _T.normal_, _T.uniform_])
#: Those of `torch.nn.init` that ask a tensor of another class first; by name, as they may be replaced.
_OVERWRITE_INIT = dict.fromkeys(["uniform_", "normal_", "constant_", "kaiming_uniform_"])


def overwrites(func: Any) -> bool:
    """Say whether a function gives its first argument, a tensor, all its values anew."""
    is_method = func in _OVERWRITE_METHODS
    return is_method or (getattr(func, "__module__", "") == "torch.nn.init" and func.__name__ in _OVERWRITE_INIT)
