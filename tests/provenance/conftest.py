"""What the tests of provenance need where temporary files lie on an overlay, as in many a container."""

from dataclasses import replace

import pytest

from wan_loader.provenance import mapped_files


@pytest.fixture(autouse=True)
def made_in_the_upper_layer(monkeypatch):
    """Files that a test makes are never copied to another layer: they may count as those of any file system."""
    real = mapped_files.mount_of_device

    def mount_of_device(device):
        mount = real(device)
        return replace(mount, kind="ext4") if mount is not None and mount.kind in mapped_files._STACKED else mount

    monkeypatch.setattr(mapped_files, "mount_of_device", mount_of_device)
