"""What is dear to make, made by one of the processes that run tests, and read by all."""

import fcntl
import json
import os


def made_once(tmp_path_factory, name, make):
    """Make something in a directory of its own, unless another process has; return the directory and what was made.

    What `make` returns is written as JSON. Nobody changes the directory: who must, copies it.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place, answer = root / name, root / f"{name}.json"
        if not answer.exists():
            place.mkdir()
            beside = root / f"{name}.making"
            beside.write_text(json.dumps(make(place)))
            beside.rename(answer)
        return place, json.loads(answer.read_text())
