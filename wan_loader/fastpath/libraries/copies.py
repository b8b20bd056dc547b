"""The seam of `torch.nn.Module.load_state_dict`: a parameter whose values come from a file is mapped, not copied.

The original copies each value into the parameter. Where the value is proven to be bytes of a file, and the parameter
alone has its memory, the parameter gets a mapping of those bytes instead: private and of its own, so that what is later
written to one of both is not seen in the other, and with a lease (`system/leases.py`), so that it stays as it is
whatever becomes of the file. The original is called all the same. For such a name it finds the parameter itself in the
dict, which it copies onto itself: torch sees that at once, and only counts it as a write, as ever.

    candidates -> proof -> lease -> mappings -> bind -> the original

A parameter that waits for its initialisation (`waiting_init`) has no values yet, and never gets those.

All names, errors and hooks are the original's. A module with code of its own on the way (an overridden
`_load_from_state_dict`, or hooks before it) would see what is in the dict, so it is left alone.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from wan_loader.fastpath.deferral.deferred import awaits_initialisation, is_sole
from wan_loader.fastpath.libraries.left_alone import LeftAloneError
from wan_loader.fastpath.libraries.torch_load import ALIGNMENT
from wan_loader.fastpath.modes import why_not_now
from wan_loader.fastpath.ours import ours
from wan_loader.formats.checkpoint_facts import contiguous_strides
from wan_loader.provenance.tensor_memory import is_sole_memory
from wan_loader.system.mappings import read_mappings
from wan_loader.system.own_pages import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from wan_loader.fastpath.patches import Patches
    from wan_loader.fastpath.tally import Tally
    from wan_loader.formats.checkpoint_facts import FileFacts
    from wan_loader.provenance.proof import FileRange, Proof
    from wan_loader.system.leases import LeasedFile, Leases

__all__ = ["Copies"]

#: Smaller tensors are copied: each one would need a mapping of its own.
_MIN_BYTES = 1 << 20


class _Copy(NamedTuple):
    """A copy that the original would make."""

    parameter: torch.Tensor
    value: torch.Tensor


class Copies:
    """The replacement of `load_state_dict`. The tally counts the copies that were spared."""

    def __init__(self, tally: Tally, leases: Leases, min_nbytes: int = _MIN_BYTES) -> None:
        self._tally = tally
        self._leases = leases
        self._min_nbytes = min_nbytes

    def install(self, patches: Patches) -> None:
        """Replace the method, for all modules of the process."""
        parameters = ("state_dict", "strict", "assign")
        patches.replace("torch.nn.modules.module", "Module.load_state_dict", self._instead_of, parameters)

    def _instead_of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(
            module: torch.nn.Module, state_dict: Any, strict: bool = True, assign: bool = False, **options: Any
        ) -> Any:
            if not assign and not options:
                with ours():
                    state_dict = self._with_mappings(module, state_dict)
            return original(module, state_dict, strict, assign, **options)

        return loaded

    def _with_mappings(self, module: torch.nn.Module, state_dict: Any) -> Any:
        """Map what can be mapped, and return the dict for the original."""
        try:
            copies = _find_copies(module, state_dict, self._min_nbytes)
            if not _is_any_of_a_file(copies):
                return state_dict
            _check_bare(module, state_dict)
            done = self._map(copies)
        except LeftAloneError as reason:
            self._tally.leave(f"load_state_dict: {reason}")
            return state_dict
        except Exception as error:  # modules are of many kinds; the original knows its own
            self._tally.leave_after(error, doing="load_state_dict: ")
            return state_dict
        given = copy(state_dict)  # with its `_metadata`
        given.update((name, copies[name].parameter) for name in done)
        return given

    def _map(self, copies: dict[str, _Copy]) -> list[str]:
        """Give the parameters mappings of what their values are proven to be; return the names of those."""
        import torch

        from wan_loader.provenance.prove import prove

        proof = prove({name: pair.value for name, pair in copies.items()})
        names = self._choose(copies, proof)
        leased: dict[int, LeasedFile] = {}
        mapped = {}
        for name in names:
            place = proof.ranges[name]
            if place.file not in leased:
                leased[place.file] = _lease(self._leases, proof.files[place.file])
            mapped[name] = _mapping(leased[place.file], place, copies[name].value)
        with torch.no_grad():
            for name, tensor in mapped.items():
                copies[name].parameter.data = tensor
        if names:
            nbytes = sum(tensor.nbytes for tensor in mapped.values())
            self._tally.saved("copies by load_state_dict", len(names), nbytes)
        return names

    def _choose(self, copies: dict[str, _Copy], proof: Proof) -> list[str]:
        """Return the names that are mapped, in the order of their bytes."""
        from wan_loader.provenance.proof import Reason
        from wan_loader.provenance.prove import prove

        # of what may be somebody else's as well, the original writes into that memory
        found = [name for name in proof.ranges if _is_sole(copies[name].parameter)]
        empty = {name for name in found if awaits_initialisation(copies[name].parameter)}
        memory = prove({name: copies[name].parameter for name in found if name not in empty}).reasons
        found = [name for name in found if name in empty or memory.get(name) is Reason.NO_FILE]
        aligned = [name for name in found if proof.ranges[name].start % ALIGNMENT == 0]
        if shared := proof.ranges.keys() - set(found):
            self._leave("what others refer to is copied", copies, shared)
        if odd := set(found) - set(aligned):
            self._leave("bytes that are not aligned in their file are copied", copies, odd)
        return sorted(aligned, key=lambda name: proof.ranges[name][:2])

    def _leave(self, reason: str, copies: dict[str, _Copy], names: Iterable[str]) -> None:
        self._tally.leave(f"load_state_dict: {reason}", sum(copies[name].value.nbytes for name in names))


def _find_copies(module: torch.nn.Module, state_dict: Any, min_nbytes: int) -> dict[str, _Copy]:
    """Return the copies of plain tensors that the original would make, but for what is one object under two names."""
    if type(state_dict) not in (dict, OrderedDict):
        return {}
    places = list(_places(module))
    counts = Counter(id(tensor) for _, tensor in places)
    return {
        name: _Copy(tensor, state_dict[name])
        for name, tensor in places
        if counts[id(tensor)] == 1 and name in state_dict and _is_plain_copy(tensor, state_dict[name], min_nbytes)
    }


def _is_any_of_a_file(copies: dict[str, _Copy]) -> bool:
    """Say whether a value may come from a file, at little cost: of most programs that load a state, none does."""
    if not copies:
        return False
    mappings = read_mappings()
    addresses = (copy.value.data_ptr() for copy in copies.values())
    return any(mappings.find(address, address + 1) is not None for address in addresses)


def _places(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names that the original looks for in a dict, and the parameters and buffers that it fills."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = prefix and "."
        for key, parameter in part._parameters.items():
            if parameter is not None:
                yield f"{prefix}{dot}{key}", parameter
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set:
                yield f"{prefix}{dot}{key}", buffer


def _is_plain_copy(to: Any, value: Any, min_nbytes: int) -> bool:
    """Say whether one dense tensor on the CPU is copied to another of its kind, byte by byte."""
    import torch

    plain = (torch.Tensor, torch.nn.Parameter)
    return (
        (type(to) in plain or awaits_initialisation(to))
        and type(value) in plain
        and to is not value
        and to.device.type == value.device.type == "cpu"
        and to.layout == value.layout == torch.strided
        and to.dtype == value.dtype
        and to.shape == value.shape
        and value.nbytes >= min_nbytes
        # not only contiguous: kernels are chosen by the strides, too, be it those of a size of one
        and to.stride() == value.stride() == contiguous_strides(tuple(to.shape))
        and to.is_leaf
        and not to.is_inference()
    )


def _check_bare(module: torch.nn.Module, state_dict: Any) -> None:
    """Leave alone whatever may see the dict on the way, or does not copy."""
    import torch

    if (why := why_not_now()) is not None:
        raise LeftAloneError(why)
    if torch.__future__.get_swap_module_params_on_conversion():
        raise LeftAloneError("torch.__future__ asks for parameters that are swapped")
    # the original notes it there, for all later calls with the same dict
    if any("assign_to_params_buffers" in notes for notes in getattr(state_dict, "_metadata", {}).values()):
        raise LeftAloneError("the dict is to be assigned")
    plain = torch.nn.Module._load_from_state_dict
    for part in module.modules():
        own = part._load_from_state_dict
        if getattr(own, "__func__", None) is not plain or part._load_state_dict_pre_hooks:
            raise LeftAloneError(f"{type(part).__name__} has code of its own for it")


def _is_sole(tensor: torch.Tensor) -> bool:
    """Say whether nobody else refers to a tensor's memory: no view, no array, no storage object."""
    if awaits_initialisation(tensor):
        return is_sole(tensor)
    if "torch.cuda" in sys.modules and sys.modules["torch.cuda"].is_initialized() and tensor.is_pinned():
        return False
    return is_sole_memory(tensor, _reach)


def _reach(tensor: torch.Tensor, storage: torch.UntypedStorage) -> int:
    """Return how many bytes of its memory a tensor leaves out."""
    return storage.nbytes() - tensor.nbytes


def _lease(leases: Leases, facts: FileFacts) -> LeasedFile:
    try:
        file = leases.lease(facts.path)
    except OSError as error:
        raise LeftAloneError(f"the file is not mapped: {error.strerror or error}") from error
    facts.check_opened(file.fd)
    return file


def _mapping(file: LeasedFile, place: FileRange, like: torch.Tensor) -> torch.Tensor:
    """Return a private mapping of a tensor's bytes, as a tensor of the same kind."""
    import torch

    start = place.start // PAGE * PAGE
    memory = file.map(start, place.start + place.nbytes - start)
    flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=place.start - start)
    return flat.view(like.shape)
