"""Whether the path of a mapping still leads to the file that was mapped."""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from wan_loader.formats import FileFacts
from wan_loader.provenance import mapped_files as module
from wan_loader.provenance.mapped_files import MappedFiles
from wan_loader.provenance.proof import Reason
from wan_loader.system.mappings import read_mappings
from wan_loader.system.mounts import Mount
from wan_loader.system.posix import map_private


@pytest.fixture
def mapped(tmp_path):
    """A file, and its mapping as the kernel tells it."""
    path = tmp_path / "w"
    path.write_bytes(bytes(range(256)) * 100)
    fd = os.open(path, os.O_RDONLY)
    memory = map_private(fd, 0, 25600)
    os.close(fd)
    address = ctypes.addressof(memory)
    yield path, read_mappings().find(address, address + 25600)
    del memory


def identify(mapping):
    """What is found, and whether it is sure."""
    with MappedFiles() as files:
        found = files.identify(mapping)
        return found, files.is_sure(mapping.path)


@pytest.fixture
def stacked(monkeypatch):
    monkeypatch.setattr(module, "mount_of_device", lambda device: Mount("overlay", "overlay", "/"))


def test_the_same_file(mapped):
    path, mapping = mapped
    found, is_sure = identify(mapping)
    assert is_sure is (path.stat().st_dev == mapping.device)
    found.check_unchanged()
    with MappedFiles() as files:
        files.identify(mapping)
        assert files.identify(mapping) is files.identify(mapping)
        assert files.read(str(path), 250, 10) == bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3])
        assert len(files.read(str(path), 25590, 100)) == 10


def test_another_file_under_its_name(mapped):
    path, mapping = mapped
    shutil.copy(path, path.with_name("other"))
    path.with_name("other").replace(path)
    assert identify(mapping)[0] is Reason.REPLACED
    fresh = read_mappings().find(mapping.start, mapping.end)
    assert fresh.path == f"{path} (deleted)"
    assert identify(fresh)[0] is Reason.REPLACED
    path.unlink()
    assert identify(mapping)[0] is identify(fresh)[0] is Reason.DELETED
    path.mkdir()
    assert identify(mapping)[0] is Reason.UNOPENED


def test_a_file_that_is_replaced_at_that_moment(mapped, monkeypatch):
    """Between the look at its name and its opening."""
    path, mapping = mapped
    other = path.with_name("other")
    shutil.copy(path, other)
    real = os.open

    def late(name, flags):
        other.replace(path)
        return real(name, flags)

    monkeypatch.setattr(module.os, "open", late)
    assert identify(mapping)[0] is Reason.UNOPENED


@pytest.mark.parametrize("path", ["[anon]", "(unreachable)/w", ""])
def test_what_is_no_path_of_ours(mapped, path):
    assert identify(mapped[1]._replace(path=path))[0] is Reason.DELETED


def test_another_file_of_the_same_inode_on_another_device(mapped, monkeypatch):
    """The path is mapped once more: the kernel's own name for its device is another one."""
    monkeypatch.setattr(module, "mount_of_device", lambda device: Mount("btrfs", "/dev/sda", "/"))
    assert identify(mapped[1]._replace(device=98))[0] is Reason.REPLACED


def test_a_device_of_its_own_making_for_stat(mapped, monkeypatch):
    """As btrfs has: the kernel's names for both mappings are compared, and bytes have to be looked at."""
    real = module.stat_file
    monkeypatch.setattr(FileFacts, "check_opened", lambda self, fd: None)
    monkeypatch.setattr(module, "stat_file", lambda path: replace(real(path), device=99))
    found, is_sure = identify(mapped[1])
    assert found.device == 99
    assert not is_sure

    def refuse(*args):
        raise OSError("refused")

    monkeypatch.setattr(module, "map_private", refuse)
    assert identify(mapped[1])[0] is Reason.UNSURE_FILE


def test_layers_that_may_have_changed(mapped, monkeypatch, stacked):
    """A file that is younger than the container may have been copied to another layer since it was mapped."""
    path, mapping = mapped
    changed_ns = path.stat().st_ctime_ns
    for began_ns, expected in [(0, False), (changed_ns, False), (changed_ns + 2_000_000_000, True)]:
        monkeypatch.setattr(module, "_first_process_ns", lambda began_ns=began_ns: began_ns)
        found, is_sure = identify(mapping)
        assert (found is not Reason.UNSURE_FILE) is expected
        assert not is_sure


def test_a_file_system_that_is_mounted_nowhere(mapped, monkeypatch):
    monkeypatch.setattr(module, "mount_of_device", lambda device: None)
    monkeypatch.setattr(module, "_first_process_ns", lambda: 0)
    assert identify(mapped[1])[0] is Reason.UNSURE_FILE


def test_the_first_process_began_before_this_one():
    import psutil

    began_ns = module._first_process_ns()
    assert 0 < began_ns <= psutil.Process().create_time() * 1e9 + 1e9
    assert abs(began_ns - psutil.Process(1).create_time() * 1e9) < 2e9


#: Maps a file of a lower layer, writes to it, and looks: the inode is the same, and the bytes are others.
_OVERLAY = """
import mmap, os, sys
os.chdir(sys.argv[1])
from wan_loader.provenance import mapped_files as module
from wan_loader.system.mappings import read_mappings
import ctypes
with open("merged/w", "rb") as file:
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
with open("merged/w", "r+b") as file:
    file.write(b"new")
assert memory[:3] == b"old" and open("merged/w", "rb").read(3) == b"new", "this kernel keeps no trap"
mapping = read_mappings().find(address, address + 1)
with module.MappedFiles() as files:
    assert files.identify(mapping) is module.Reason.UNSURE_FILE
module._first_process_ns = lambda: 2**62
with module.MappedFiles() as files:
    assert files.identify(mapping).inode == mapping.inode, "only times tell these two apart"
    assert not files.is_sure(mapping.path)
"""


def test_a_file_that_was_copied_to_another_layer(tmp_path):
    """On a real overlay: what was mapped before the first write is another file than what the path leads to."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "w").write_bytes(b"old" * 5000)
    mount = "mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged"
    script = f'cd {tmp_path} && {mount} && mountpoint -q merged || exit 77; cd {os.getcwd()}; exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", _OVERLAY, str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("no overlay can be mounted here")
    assert done.returncode == 0, done.stderr
