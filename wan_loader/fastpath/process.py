"""The one accelerator of this process, which all who install it hold together."""

from __future__ import annotations

from wan_loader.arguments import check_flag
from wan_loader.fastpath.accelerator import Accelerator

__all__ = ["accelerate", "install", "uninstall"]

#: Functions of libraries are replaced for a whole process, so there is one.
_ACCELERATOR = Accelerator()


def accelerate(*, keep: bool = False) -> Accelerator:
    """Return a context in which programs that know nothing of us load and move weights at our speed.

    Inside, for the whole process and all of its threads, models that `from_pretrained` or `load_state_dict` has made of
    files are fetched from there by one plan each when they move to a GPU. Everything is what it would be without: bits,
    objects, random numbers, errors; what cannot be proven to be the same is left to the libraries. On leaving, after an
    exception too, all of it is taken out again; models that were loaded stay as they are.

    Args:
        keep: What moves to a device and is kept there (`wan_loader.keep`: the same bytes of the same files, as the same
            dtype) is not read, but used where it lies: it takes no memory. Others use it, too, so the program must not
            write to these weights; see `load_file`. Until the last context ends.

    Returns:
        The accelerator of this process, always the same one, as a context manager. Contexts may be nested and overlap
        in several threads: it is in place until the last one ends. Its `tally` says what was done, and what was left
        and why: `tally.summary()` in one line, `tally.report()` as a table.

    Examples:
        In a notebook, or around the start of a service::

            import torch, wan_loader
            from diffusers import WanPipeline

            with wan_loader.accelerate() as fast:
                pipe = WanPipeline.from_pretrained("model", torch_dtype=torch.bfloat16).to("cuda")
            print(fast.tally.report())
    """
    check_flag(keep, "keep")
    return _ACCELERATOR.keep() if keep else _ACCELERATOR


def install(*, keep: bool = False) -> Accelerator:
    """Do from now on, for the whole process, what `accelerate` does in its context.

    Imports no other library: what is replaced in those that are not imported yet is replaced when they are.

    Args:
        keep: As for `accelerate`.

    Returns:
        The accelerator of this process, whose `tally` says what it did.

    Examples:
        At the top of a service that loads models when they are asked for::

            import wan_loader

            wan_loader.install()
    """
    return accelerate(keep=keep).install()


def uninstall() -> None:
    """Take back one `install`. When as many were taken back as made, and no `accelerate` is open, all is as before.

    Raises:
        RuntimeError: It is not installed.

    Examples:
        Once everything has been loaded::

            wan_loader.uninstall()
    """
    _ACCELERATOR.uninstall()
