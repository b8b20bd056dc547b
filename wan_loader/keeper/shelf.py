"""What the keeper holds, for each device: who uses it, and what goes when room is needed. Pure: nothing is closed here.

What nobody uses goes first, and of that what was used longest ago. What somebody uses stays: letting go of it would
give no memory back before he does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from wan_loader.errors import KeepError
from wan_loader.sizes import format_bytes

__all__ = ["Identity", "Item", "Shelf"]


class Identity(NamedTuple):
    """What tells kept weights apart: the same key on the same device means the same bytes."""

    key: str
    """The name that the converted cache would give to an entry of them: files, tensors, dtypes."""
    device: str
    """The name of the device that every process knows it by."""
    label: str
    """The path of the checkpoint."""
    dtype: str
    """The dtypes that were asked for, in words."""


@dataclass(slots=True, eq=False)
class Item:
    """Weights that are kept, or being loaded to be."""

    identity: Identity
    nbytes: int
    used_s: float
    """The moment of the last use."""
    fds: list[int] | None = None
    """The table and the chunks; None while they are being loaded."""
    sizes: tuple[int, ...] = ()
    n_tensors: int = 0
    n_users: int = 0
    files: frozenset[str] = frozenset()
    """What tells the files apart that they were loaded from."""

    @property
    def is_idle(self) -> bool:
        """True if it could go: it is there, and nobody uses it."""
        return self.fds is not None and self.n_users == 0


@dataclass(slots=True)
class Shelf:
    """Everything that is kept, and how much may be, by device."""

    items: list[Item] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)

    def find(self, identity: Identity) -> Item | None:
        """Return what is kept or being loaded under an identity."""
        return next((item for item in self.items if item.identity[:2] == identity[:2]), None)

    def why_not(self, identity: Identity) -> str:
        """Say why nothing can be attached under an identity."""
        if self.find(identity) is not None:
            return "it is being loaded to be kept"
        same = [item.identity for item in self.items if item.identity.label == identity.label]
        here = [one for one in same if one.device == identity.device]
        if any(one.dtype == identity.dtype for one in here):
            return "its files have changed since it was kept"
        if here:
            return f"it is kept as {here[0].dtype}, and not as {identity.dtype}"
        return "it is kept on another device" if same else "it is not kept"

    def attach(self, identity: Identity, now_s: float) -> Item | None:
        """Count one more user of what is kept; None if it is not."""
        item = self.find(identity)
        if item is None or item.fds is None:
            return None
        item.n_users += 1
        item.used_s = now_s
        return item

    def leave(self, item: Item, now_s: float) -> None:
        """Count one user less; what was still being loaded is forgotten."""
        if item.fds is None:
            self.items.remove(item)
            return
        item.n_users -= 1
        item.used_s = now_s

    def reserve(self, identity: Identity, nbytes: int, free: int | None, now_s: float) -> tuple[Item, list[Item]]:
        """Make room for weights that are not there.

        Args:
            identity: What they will be.
            nbytes: The memory that they will take.
            free: What is free on the device; None: unknown.
            now_s: The moment.

        Returns:
            The new item, and those that have to go, which are no longer on the shelf.

        Raises:
            KeepError: The limit leaves no room, whatever goes.
        """
        others = [item for item in self.items if item.identity.device == identity.device]
        going = [item for item in others if _is_older_state(item.identity, identity)]
        total = sum(item.nbytes for item in others) - sum(item.nbytes for item in going)
        idle = sorted((item for item in others if item.is_idle and item not in going), key=lambda item: item.used_s)
        limit = self.limits.get(identity.device)
        over = 0 if limit is None else total + nbytes - limit
        short = 0 if free is None else nbytes - free - sum(item.nbytes for item in going if item.is_idle)
        for item in idle:
            if over <= 0 and short <= 0:
                break
            going.append(item)
            over, short = over - item.nbytes, short - item.nbytes
        if over > 0 and limit is not None:
            used = format_bytes(max(0, limit - nbytes + over))
            reason = f"{format_bytes(nbytes)} do not fit into the {format_bytes(limit)} that may be kept there"
            if nbytes <= limit:
                reason += f": {used} are in use"
            raise KeepError.because(reason, "allow more with --max-gpu, or drop something")
        self.items = [item for item in self.items if item not in going]
        made = Item(identity, nbytes, now_s)
        self.items.append(made)
        return made, going

    def of_files(self, device: str, files: frozenset[str]) -> list[Item]:
        """Return what is kept of any of these files on a device, the last used first."""
        found = [item for item in self.items if item.identity.device == device and item.files & files]
        return sorted((item for item in found if item.fds is not None), key=lambda item: -item.used_s)

    def put(self, item: Item, fds: list[int], sizes: tuple[int, ...], n_tensors: int, now_s: float) -> None:
        """Take what was loaded."""
        item.fds, item.sizes, item.n_tensors = fds, sizes, n_tensors
        item.nbytes, item.used_s = sum(sizes), now_s

    def drop(self, *, label: str | None, key: str | None) -> list[Item]:
        """Take things off the shelf, used or not; what is being loaded stays.

        Args:
            label: Of this path, or of a part of it; None: of any.
            key: With a key that begins so; None: any.
        """

        def goes(item: Item) -> bool:
            found = label is None or item.identity.label == label or item.identity.label.startswith(f"{label}, part ")
            return item.fds is not None and found and (key is None or item.identity.key.startswith(key))

        going = [item for item in self.items if goes(item)]
        self.items = [item for item in self.items if item not in going]
        return going


def _is_older_state(kept: Identity, new: Identity) -> bool:
    """Say whether kept weights are of files that have changed since: nobody can ask for them any more."""
    return kept[1:] == new[1:] and kept.key != new.key
