"""Full-size checkpoints without weights: real headers and indexes, holes where the weights would be.

They take kilobytes on disk (ext4, xfs, tmpfs ...) and are for everything that looks at headers, never for reading.
"""

import os
import threading

from wan_pipeline.synth import plan_synth


def make_sparse(directory, **options):
    """Write the files of `plan_synth(**options)` with holes for data; return the plan."""
    plan = plan_synth(**options)
    for text in plan.texts:
        target = directory / text.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.content)
    for weights in plan.weights:
        target = directory / weights.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for segment in weights.stream(_hole):
                if isinstance(segment, int):
                    file.seek(segment, os.SEEK_CUR)
                else:
                    file.write(segment)
            file.truncate(weights.nbytes)
    return plan


def _hole(tensor):
    """Return a length instead of data; nothing at all for the thread of checksums, which nobody checks here."""
    return iter([tensor.nbytes] if threading.current_thread() is threading.main_thread() else [])
