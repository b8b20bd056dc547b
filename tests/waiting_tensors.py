"""One tensor that waits for a cast, as the fast path makes many at a time."""

from wan_loader.fastpath.deferral.deferred import cast_of, defer_all


def defer(source, dtype, tally):
    """Return `source.to(dtype)`, deferred if that is safe."""
    return defer_all({"": source}, {"": dtype}, tally)[""]


def source_of(tensor):
    """Return the view of a file whose cast a tensor waits for, and the dtype that it is cast to."""
    if (cast := cast_of(tensor)) is None or cast.source is None:
        raise ValueError("this tensor waits for no cast of a view")
    return cast.source, cast.dtype
