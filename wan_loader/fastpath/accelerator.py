"""The fast path as a whole: all seams, put in and taken out together."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from wan_loader.errors import WanLoaderError
from wan_loader.fastpath.deferral.deferred import settle_all
from wan_loader.fastpath.deferral.initial import Initial
from wan_loader.fastpath.deferral.settling import Settling
from wan_loader.fastpath.libraries.copies import Copies
from wan_loader.fastpath.libraries.from_diffusers import FromDiffusers
from wan_loader.fastpath.libraries.from_safetensors import SafetensorsLoads
from wan_loader.fastpath.libraries.from_transformers import FromTransformers
from wan_loader.fastpath.libraries.read_ahead import ReadAhead
from wan_loader.fastpath.libraries.rewrites import Rewrites
from wan_loader.fastpath.libraries.torch_load import TorchLoad
from wan_loader.fastpath.moving.moves import Moves
from wan_loader.fastpath.patches import Patches
from wan_loader.fastpath.tally import Tally
from wan_loader.system.leases import Leases

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wan_loader.types import IoMode

__all__ = ["Accelerator"]


class Accelerator:
    """Our loader in the places where libraries load and move weights, for the whole process, while it is installed.

    As a context it is installed inside; `install` and `uninstall` do the same by hand. Both are counted: it is taken
    out when everybody who has put it in has taken it out. `tally` tells what it did.

    Args:
        kinds: The kinds of devices that moves and loads are planned to.
        io: How bytes travel, as for `wan_loader.load_file`.
        min_nbytes: Less than this is moved sooner than it is planned; None: 16 MiB.
    """

    def __init__(self, kinds: Sequence[str] = ("cuda",), *, io: IoMode = "auto", min_nbytes: int | None = None) -> None:
        self.tally = Tally()
        options: dict[str, Any] = {} if min_nbytes is None else {"min_nbytes": min_nbytes}
        moves = Moves(self.tally, kinds=kinds, io=io, **options)
        # what is small for a move is small for an initialisation, in fp32
        initial = Initial(self.tally, **({} if min_nbytes is None else {"min_elements": min_nbytes // 4}))
        self._moves = moves
        self._leases = Leases()
        # to the CPU, which may stand in for a GPU in tests, safetensors maps by itself
        devices = [kind for kind in kinds if kind != "cpu"]
        self._seams: list[Callable[[Patches], None]] = [
            moves.install,
            Settling().install,
            initial.install,
            SafetensorsLoads(self.tally, devices).install,
            TorchLoad(self.tally, self._leases, kinds, **options).install,
            Copies(self.tally, self._leases, **options).install,
            Rewrites(self._leases).install,
            FromDiffusers(self.tally, moves).install,
            FromTransformers(self.tally, moves).install,
            ReadAhead().install,
        ]
        self._patches: Patches | None = None
        self._n_installed = 0
        self._lock = threading.Lock()

    @property
    def is_installed(self) -> bool:
        """Whether it is in place."""
        return self._patches is not None

    @property
    def keeps(self) -> bool:
        """Whether weights that the keeper holds are used where they lie, rather than read."""
        return self._moves.keep

    def keep(self) -> Self:
        """Use what the keeper holds, until nobody has this installed any more."""
        self._moves.keep = True
        return self

    def install(self) -> Self:
        """Put our loader in. Imports nothing; what is not imported yet is replaced as soon as it is."""
        with self._lock:
            self._n_installed += 1
            if self._patches is None:
                self._patches = Patches(self.tally)
                with self._patches.in_one_search():
                    for install in self._seams:
                        install(self._patches)
        return self

    def uninstall(self) -> None:
        """Take our loader out, if this is the last of those who have put it in; what waits is settled.

        Raises:
            RuntimeError: It is not installed.
        """
        with self._lock:
            if self._patches is None:
                raise RuntimeError("wan_loader is not installed: uninstall() was called more often than install()")
            self._n_installed -= 1
            if not self._n_installed:
                self._patches.undo()
                self._patches = None
                self._moves.keep = False
                with suppress(WanLoaderError):  # whoever looks at what is left will be told
                    settle_all()
                # whoever saves over a file that is mapped has nobody now who settles it before
                self._leases.settle()

    def __enter__(self) -> Self:
        """Install."""
        return self.install()

    def __exit__(self, *exception: object) -> None:
        """Uninstall, whatever happened inside."""
        self.uninstall()
