"""Stand-ins for parameters that are not on the device: they have a shape, a dtype and a device, and no values.

Moving such a parameter to where it is does nothing; everything else that would need its values, or change them, is an
error that says so. So a merge of other weights into it, a `state_dict` or a copy cannot go wrong unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch

from wan_loader.errors import OptionError

__all__ = ["AwayParameter", "stand_in"]


class AwayParameter(torch.Tensor):
    """A parameter whose values are in a file. Made by `stand_in`."""

    _is_param = True  # what isinstance(..., torch.nn.Parameter) asks for
    full_name: str

    @property
    def data(self) -> Any:  # type: ignore[override]
        """Raise: there is no data."""
        raise self._refusal()

    @data.setter
    def data(self, value: object) -> None:
        if value is not self:  # else the module was moved to where it is
            raise self._refusal()

    def share_memory_(self) -> Any:
        """Raise: there is no memory. torch's own would end the process."""
        raise self._refusal()

    def _refusal(self) -> OptionError:
        return OptionError(
            f"{self.full_name} is streamed: its values are on the device only while its block runs. Take them from the "
            f"checkpoint with load_file; to change or train them, load the module with load_into",
            tensor=self.full_name,
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for one in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(one, AwayParameter):
                raise one._refusal()
        raise AssertionError("called without a stand-in")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AwayParameter({self.full_name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._refusal()

    def __deepcopy__(self, memo: Any) -> Any:
        raise self._refusal()


def stand_in(parameter: torch.Tensor, name: str) -> AwayParameter:
    """Return a stand-in for a parameter.

    Args:
        parameter: What it stands for, which need not live on.
        name: Its name in the module, for errors.
    """
    made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        AwayParameter, parameter.shape, dtype=parameter.dtype, device=parameter.device
    )
    made.full_name = name
    return made  # type: ignore[no-any-return]
