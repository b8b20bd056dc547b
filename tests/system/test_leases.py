"""A mapping with a lease shows what the file held, whatever becomes of the file, in this process or by another."""

import ctypes
import errno
import fcntl
import gc
import os
import resource
import subprocess
import sys
import threading
import time

import pytest
from programs import run

from wan_loader.system import leases as module
from wan_loader.system.leases import Leases
from wan_loader.system.mappings import read_mappings
from wan_loader.system.mounts import Mount
from wan_loader.system.own_pages import PAGE

NBYTES = 40 * PAGE + 100
CONTENT = bytes(range(251)) * (NBYTES // 251 + 1)
CONTENT = CONTENT[:NBYTES]


def leases_work(directory):
    path = directory / "probe"
    path.write_bytes(b"x")
    try:
        Leases().lease(str(path))
    except OSError as error:
        return error.strerror
    return None


@pytest.fixture
def path(tmp_path):
    if (reason := leases_work(tmp_path)) is not None:
        pytest.skip(f"no leases here: {reason}")
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def leases():
    return Leases()


@pytest.fixture
def file(leases, path):
    return leases.lease(str(path))


def is_of_file(memory):
    address = ctypes.addressof(memory)
    return read_mappings().find(address, address + 1) is not None


def by_shell(command, path):
    start = time.monotonic()
    subprocess.run(["sh", "-c", command, "sh", str(path)], check=True)
    assert time.monotonic() - start < 10, "a writer is not kept waiting"


def by_open(path):
    with path.open("r+b") as file:
        file.write(b"new")


def in_place(path):
    path.write_bytes(b"new")


WRITERS = {
    "truncated by another": lambda path: by_shell(': > "$1"', path),
    "rewritten by another": lambda path: by_shell('dd if=/dev/zero of="$1" bs=4096 count=50 conv=notrunc 2>&1', path),
    "written to": by_open,
    "rewritten": in_place,
    "truncated": lambda path: os.truncate(path, 10),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_mapping_outlives_its_file(file, path, write):
    whole, part = file.map(0, NBYTES), file.map(2 * PAGE, 3 * PAGE)
    whole[PAGE + 7] = b"\xff"
    address = ctypes.addressof(whole)
    expected = bytearray(CONTENT)
    expected[PAGE + 7] = 0xFF
    write(path)
    assert path.read_bytes() != CONTENT
    assert bytes(whole) == expected
    assert bytes(part) == CONTENT[2 * PAGE : 5 * PAGE]
    assert ctypes.addressof(whole) == address
    assert not is_of_file(whole)
    assert not is_of_file(part)
    whole[3 * PAGE] = b"\xfe"
    assert bytes(part) == CONTENT[2 * PAGE : 5 * PAGE], "each mapping is its own memory"


def test_nothing_is_copied_before_somebody_writes(file, path, tmp_path):
    memory = file.map(0, NBYTES)
    assert path.read_bytes() == CONTENT
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "other").rename(path)
    by_shell(': > "$1"', path)
    path.unlink()
    assert is_of_file(memory)
    assert bytes(memory) == CONTENT


def test_settled_at_once(leases, file, path, tmp_path):
    memory = file.map(0, NBYTES)
    leases.settle(tmp_path / "none")
    leases.settle(tmp_path)
    assert is_of_file(memory)
    leases.settle(path)
    assert not is_of_file(memory)
    assert bytes(memory) == CONTENT
    leases.settle(path)
    with pytest.raises(OSError, match="lease on the file is gone"):
        file.map(0, NBYTES)


def test_the_lease_ends_with_the_last_mapping(leases, path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    file = leases.lease(str(path))
    first, second = file.map(0, NBYTES), file.map(0, PAGE)
    del file, first
    gc.collect()
    assert fcntl.fcntl(next(iter(leases._files)).fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    assert bytes(second) == CONTENT[:PAGE]
    del second
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not list(leases._files)


def test_the_thread_ends_when_there_is_nothing_to_watch(leases, path, monkeypatch):
    monkeypatch.setattr(module, "_TICK_S", 0.01)
    file = leases.lease(str(path))
    thread = leases._thread
    time.sleep(0.05)
    assert thread.is_alive()
    del file
    thread.join(5)
    assert not thread.is_alive()
    memory = leases.lease(str(path)).map(0, NBYTES)
    in_place(path)
    assert bytes(memory) == CONTENT


def test_a_signal_that_is_lost_does_no_harm(leases, path, monkeypatch):
    """As where the queue of signals is full: the thread looks by itself."""
    monkeypatch.setattr(module, "_TICK_S", 0.01)
    monkeypatch.setattr(module, "_F_SETSIG", fcntl.F_GETFL)
    memory = leases.lease(str(path)).map(0, NBYTES)
    in_place(path)
    assert bytes(memory) == CONTENT


def test_a_forked_process_keeps_what_it_has(leases, file, path):
    memory = file.map(0, NBYTES)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go[0], 1)
        mine = leases.lease(str(path)).map(0, 3)
        in_place(path)
        os._exit(0 if (bytes(memory), bytes(mine)) == (CONTENT, b"new") else 1)
    try:
        in_place(path)
        assert bytes(memory) == CONTENT
    finally:
        os.write(go[1], b"x")
        status = os.waitpid(child, 0)[1]
        for fd in (*ready, *go):
            os.close(fd)
    assert status == 0


def test_whoever_reads_meanwhile_sees_nothing(leases, path):
    stop, wrong = threading.Event(), []

    def read(memory):
        while not stop.is_set():
            if bytes(memory) != CONTENT:
                wrong.append(1)

    memories = [leases.lease(str(path)).map(0, NBYTES) for _ in range(5)]
    threads = [threading.Thread(target=read, args=(memory,)) for memory in memories]
    for thread in threads:
        thread.start()
    in_place(path)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(bytes(memory) == CONTENT for memory in memories)


def refused(leases, path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as error:
        leases.lease(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
    return error.value.strerror


def test_no_lease_is_to_be_had(leases, path, monkeypatch):
    with path.open("r+b"):
        assert refused(leases, path) == "somebody has it open for writing"
    with monkeypatch.context() as patch:
        patch.setattr(module, "mount_of", lambda fd: Mount("nfs4", "server:/", "/"))
        assert refused(leases, path) == "its file system is not known to see all writers"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_COPIED_PER_S", 10)
        assert refused(leases, path) == "it is too large to be copied while a writer waits"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_MAX_FILES", 1)
        file = leases.lease(str(path))
        assert refused(leases, path) == "many files have leases already"
        assert file.is_leased
    assert refused(leases, path.parent / "none") == os.strerror(errno.ENOENT)


def test_the_program_needs_descriptors_too(leases, path, monkeypatch):
    # told, and not set: the process of these tests has more files open than that
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2 * 16, 1024))
    files = [leases.lease(str(path)) for _ in range(2)]
    assert refused(leases, path) == "many files have leases already"
    assert all(file.is_leased for file in files)


@pytest.mark.parametrize("write", [lambda path: None, by_open, in_place, os.remove])
def test_a_program_closes_all_descriptors(leases, path, tmp_path, write):
    file = leases.lease(str(path))
    memory = file.map(0, NBYTES)
    memory[5] = b"\xff"
    os.close(file.fd)
    other = tmp_path / "other"
    other.write_bytes(b"x" * NBYTES)
    with other.open("rb") as reader:
        assert reader.fileno() == file.fd, "its number is somebody else's now"
        write(path)
        if path.exists():
            leases.settle()
            assert not is_of_file(memory)
        leases._serve(file)
        assert bytes(memory) == CONTENT[:5] + b"\xff" + CONTENT[6:]
        del file, memory
        gc.collect()
        assert reader.read(1) == b"x", "and was not closed"


def test_a_file_of_another_user(leases, path, unprivileged, open_dir, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("nobody's file can be made here")
    other = open_dir / "weights"
    other.write_bytes(CONTENT)
    other.chmod(0o644)
    monkeypatch.setattr(module, "written_pages", lambda ranges: [])  # not told to one who has changed its user
    with unprivileged():
        assert refused(leases, other) == "it belongs to another user"


def test_no_memory_to_settle_in(leases, file, path, monkeypatch):
    def full(nbytes):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    memory = file.map(0, NBYTES)
    with monkeypatch.context() as patch:
        patch.setattr(module, "map_anonymous", full)
        with pytest.raises(OSError, match="memory"):
            leases.settle(path)
    assert is_of_file(memory)
    in_place(path)
    assert bytes(memory) == CONTENT


@pytest.mark.parametrize("size", [0, NBYTES], ids=["shortened", "rewritten"])
def test_the_kernel_does_not_wait_for_ever(path, size):
    """A process that came too late ends when it uses what it cannot know any more."""
    script = f"""
        import fcntl, sys
        from wan_loader.system.leases import Leases
        leases = Leases()
        file = leases.lease({str(path)!r})
        memory = file.map(0, {NBYTES})
        fcntl.fcntl(file.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # as the kernel does it
        open({str(path)!r}, "wb").write(bytes({size}))
        leases._serve(file)
        print("served", file.is_leased, flush=True)
        print(memory[5])
        """
    script = "\n".join(line.strip() for line in script.splitlines())
    done = run("-c", script, modules=("wan_loader.system.leases",))
    assert done.stdout == "served False\n", done.stderr
    assert done.returncode == -11


def test_a_process_that_ends_keeps_nobody_waiting(path):
    script = f"""
import os, sys
from wan_loader.system.leases import Leases
memory = Leases().lease({str(path)!r}).map(0, {NBYTES})
sys.stdout.write("mapped")
sys.stdout.flush()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("mapped", "", 0)
    start = time.monotonic()
    in_place(path)
    assert time.monotonic() - start < 5


_AT_EXIT = """
import atexit, sys

@atexit.register
def save():
    leases.settle(path)
    open(path, "wb").close()
    print(bytes(memory) == content)

from wan_loader.system.leases import Leases

leases, path = Leases(), sys.argv[1]
content = open(path, "rb").read()
memory = leases.lease(path).map(0, len(content))
"""


def test_a_program_saves_in_an_exit_handler_that_is_older_than_we(path, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_AT_EXIT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert path.read_bytes() == b""
