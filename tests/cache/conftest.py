"""Entries without torch: a store, and a way to put an entry of any size and age into it."""

import os
import time

import pytest

from wan_loader.cache.manifest import BLOCK_BYTES, MANIFEST_NAME, EntryFile, Manifest, digest
from wan_loader.cache.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture
def put():
    """Put an entry into a store: a file of `nbytes`, last used `age_s` seconds ago; returns its directory."""

    def put(store, key="k" * 32, nbytes=100_000, age_s=0.0, max_size=None):
        building = store.begin(key, nbytes, max_size)
        assert building is not None
        path = building.publish(write(building, nbytes))
        os.utime(path / MANIFEST_NAME, (time.time() - age_s,) * 2)
        return path

    return put


@pytest.fixture
def fill():
    """Write the file of an entry that is being built; returns its manifest."""
    return write


def write(building, nbytes):
    data = os.urandom(nbytes)
    for path in ("model.bin", "text/config.json"):
        with os.fdopen(building.create(path), "wb") as f:
            f.write(data if path == "model.bin" else b"{}")
            os.fsync(f.fileno())
    blocks = tuple(digest(data[i : i + BLOCK_BYTES]) for i in range(0, nbytes, BLOCK_BYTES))
    files = (EntryFile("model.bin", nbytes, 0, blocks), EntryFile("text/config.json", 2, 0, (digest(b"{}"),)))
    return Manifest(
        key=building.path.name, label="/models/m", dtype="bfloat16", created=time.time(), sources=(), files=files
    )
