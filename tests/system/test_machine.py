"""What the machine allows, read from made-up /proc and /sys/fs/cgroup trees and from the real ones."""

import json
import mmap
import os
import resource
import subprocess
import sys

import pytest

from wan_loader.system import machine

GiB = 1 << 30


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Write files under a made-up /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "cgroup")

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))

    write({"proc/meminfo": f"MemTotal:       {64 * 1024**2} kB\nMemAvailable:   {48 * 1024**2} kB\n"})
    return write


def test_without_cgroups_it_is_the_machine_s_memory(tree):
    assert machine.memory_limit() == 64 * GiB
    assert machine.available_memory() == 48 * GiB


def test_without_any_information_there_is_some_limit(tree, tmp_path):
    (tmp_path / "proc/meminfo").unlink()
    assert machine.memory_limit() > 0


def test_cgroup_v2(tree):
    tree(
        {
            "proc/self/cgroup": "0::/a/b\n",
            "cgroup/a/b/memory.max": "max\n",
            "cgroup/a/memory.max": 8 * GiB,
            "cgroup/a/memory.current": 6 * GiB,
            "cgroup/a/memory.stat": f"anon 5\ninactive_file {GiB}\nactive_file 7\n",
        }
    )
    assert machine.memory_limit() == 8 * GiB
    assert machine.available_memory() == 3 * GiB


def test_the_tightest_ancestor_counts(tree):
    tree(
        {
            "proc/self/cgroup": "0::/a/b\n",
            "cgroup/a/b/memory.max": 16 * GiB,
            "cgroup/a/b/memory.current": 2 * GiB,
            "cgroup/a/memory.max": 20 * GiB,
            "cgroup/a/memory.current": 19 * GiB,
        }
    )
    assert machine.memory_limit() == 16 * GiB
    assert machine.available_memory() == GiB


def test_cgroup_v2_in_a_container(tree):
    tree({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": 2 * GiB, "cgroup/memory.current": 3 * GiB})
    assert machine.memory_limit() == 2 * GiB
    assert machine.available_memory() == 0


def test_cgroup_v1(tree):
    tree(
        {
            "proc/self/cgroup": "12:cpu,cpuacct:/x\n7:memory:/docker/1\n1:name=systemd:/x\n0::/system.slice\n",
            "cgroup/memory/docker/1/memory.limit_in_bytes": 4 * GiB,
            "cgroup/memory/docker/1/memory.usage_in_bytes": 3 * GiB,
            "cgroup/memory/docker/1/memory.stat": f"inactive_file 1\ntotal_inactive_file {GiB}\n",
            "cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        }
    )
    assert machine.memory_limit() == 4 * GiB
    assert GiB < machine.available_memory() <= 2 * GiB


def test_cgroup_v1_whose_path_is_not_mounted_here(tree):
    """In a container without a cgroup namespace the limit stands at the root of the mount."""
    tree(
        {
            "proc/self/cgroup": "7:memory:/docker/1234\n",
            "cgroup/memory/memory.limit_in_bytes": 4 * GiB,
            "cgroup/memory/memory.usage_in_bytes": GiB,
        }
    )
    assert machine.memory_limit() == 4 * GiB
    assert machine.available_memory() == 3 * GiB


def test_cgroup_v1_whose_ancestors_are_hidden(tree):
    """The kernel says what they allow; how much of it is used is not known."""
    tree(
        {
            "proc/self/cgroup": "7:memory:/\n",
            "cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "cgroup/memory/memory.usage_in_bytes": GiB,
            "cgroup/memory/memory.stat": f"hierarchical_memory_limit {6 * GiB}\n",
        }
    )
    assert machine.memory_limit() == 6 * GiB
    assert machine.available_memory() == 5 * GiB


def test_memory_high_is_a_limit(tree):
    """Beyond it nothing is killed, but everything stalls."""
    tree(
        {
            "proc/self/cgroup": "0::/a\n",
            "cgroup/a/memory.max": 8 * GiB,
            "cgroup/a/memory.high": 6 * GiB,
            "cgroup/a/memory.current": 2 * GiB,
        }
    )
    assert machine.memory_limit() == 6 * GiB
    assert machine.available_memory() == 4 * GiB


def test_page_cache_that_is_used_again_gives_way_too_but_not_the_programs_pages(tree):
    tree(
        {
            "proc/self/cgroup": "0::/a\n",
            "cgroup/a/memory.max": 8 * GiB,
            "cgroup/a/memory.current": 8 * GiB,
            "cgroup/a/memory.stat": f"inactive_file {GiB}\nactive_file {3 * GiB}\nfile_mapped {GiB}\n",
        }
    )
    assert machine.available_memory() == 3 * GiB


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "directory"),
    [
        # both versions, memory managed by either
        ("1 1 0:1 / {root}/memory rw - cgroup cgroup rw,memory\n", "4:memory:/a\n0::/b\n", "memory/a"),
        ("1 1 0:1 / {root}/unified rw - cgroup2 cgroup2 rw\n", "1:name=systemd:/b\n0::/a\n", "unified/a"),
        # a container that sees its own part of the hierarchy, and the path of the whole
        ("1 1 0:1 /docker/1 {root}/memory ro - cgroup cgroup rw,memory\n", "4:memory:/docker/1\n", "memory"),
        ("1 1 0:1 /docker/1 {root} ro - cgroup2 cgroup rw\n", "0::/docker/1/x\n", "x"),
        # outside of its cgroup namespace
        ("1 1 0:1 / {root} rw - cgroup2 cgroup rw\n", "0::/../../a\n", ""),
        # mounted elsewhere
        ("1 1 0:1 / {root}/else where rw - ext4 x rw\n1 1 0:1 / {root}/there rw - cgroup2 x rw\n", "0::/\n", "there"),
        # not said
        (None, "0::/a\n", "unified/a"),
        (None, None, "memory"),
        (None, None, ""),
    ],
)
def test_wherever_the_cgroup_is_mounted(tree, tmp_path, mountinfo, cgroup, directory):
    root = tmp_path / "cgroup"
    tree({"proc/self/mountinfo": mountinfo.format(root=root)} if mountinfo else {})
    tree({"proc/self/cgroup": cgroup} if cgroup else {})
    tree({f"cgroup/{directory}/memory.max": 8 * GiB, f"cgroup/{directory}/memory.current": GiB})
    assert machine.memory_limit() == 8 * GiB
    assert machine.available_memory() == 7 * GiB


def test_names_that_are_no_text_and_lines_that_are_none(tree, tmp_path):
    tree({"cgroup/memory.max": 8 * GiB})
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_bytes(b"?\n\n0::/caf\xe9\n")
    (tmp_path / "proc/self/mountinfo").write_bytes(b"- cgroup2 x rw\n1 1 0:1 / /caf\xe9 rw - ext4 x rw\n")
    assert machine.memory_limit() == 8 * GiB


def test_a_limit_beyond_the_machine_s_memory_tells_nothing(tree, tmp_path):
    tree({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": 1 << 60, "cgroup/memory.current": GiB})
    assert machine.memory_limit() == 64 * GiB
    assert machine.available_memory() == 48 * GiB


def test_what_cannot_be_read_is_unknown_not_nothing(tree, tmp_path):
    (tmp_path / "proc/meminfo").unlink()
    assert machine.available_memory() is None
    assert machine.process_headrooms() == {}
    tree({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": GiB})
    assert machine.memory_limit() == GiB
    assert machine.available_memory() is None
    assert machine.affordable_buffers(8, GiB) == 8
    assert machine.peak_resident() > 1 << 20


def test_a_process_s_own_limits(tree, monkeypatch):
    limits = {resource.RLIMIT_AS: 5 * GiB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    tree({"proc/self/statm": f"{GiB // mmap.PAGESIZE} 10 10 10 0 {GiB // 2 // mmap.PAGESIZE} 0\n"})
    assert machine.process_headrooms() == {"ulimit -v": 4 * GiB}
    limits[resource.RLIMIT_DATA] = GiB
    assert machine.process_headrooms()["ulimit -d"] == GiB // 2


def test_fewer_buffers_where_memory_is_short(tree):
    assert machine.affordable_buffers(8, GiB) == 8
    assert machine.affordable_buffers(20, GiB) == 12
    assert machine.affordable_buffers(8, 64 * GiB) == 1


def test_this_machine():
    assert 1 <= machine.processors() <= (os.cpu_count() or 1)


V1 = {"proc/self/cgroup": "12:cpu,cpuacct:/x\n7:memory:/y\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n"}


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({}, 64),
        (V2 | {"cgroup/a/b/cpu.max": "max 100000\n"}, 64),
        (V2 | {"cgroup/a/b/cpu.max": "max 100000\n", "cgroup/a/cpu.max": "250000 100000\n"}, 3),
        (V2 | {"cgroup/a/b/cpu.max": "50000 100000\n", "cgroup/a/cpu.max": "800000 100000\n"}, 1),
        (V2 | {"cgroup/a/b/cpu.max": "9900000 100000\n"}, 64),
        (V2 | {"cgroup/a/b/cpu.max": "what\n"}, 64),
        (V1 | {"cgroup/cpu/x/cpu.cfs_quota_us": 600000, "cgroup/cpu/x/cpu.cfs_period_us": 100000}, 6),
        (V1 | {"cgroup/cpu/x/cpu.cfs_quota_us": -1, "cgroup/cpu/x/cpu.cfs_period_us": 100000}, 64),
        (V1 | {"cgroup/cpu/cpu.cfs_quota_us": 100000, "cgroup/cpu/cpu.cfs_period_us": 0}, 64),
    ],
)
def test_a_quota_counts_as_fewer_processors(tree, monkeypatch, files, allowed):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    tree(files)
    machine._cpu_quota.cache_clear()
    try:
        assert machine.processors() == allowed
    finally:
        machine._cpu_quota.cache_clear()
    assert machine.available_memory() > 0
    assert machine.memory_limit() > 64 << 20
    card = machine.machine_card()
    assert {"cpu", "cores", "memory_bytes", "memory_limit_bytes", "kernel", "python"} <= set(card)
    json.dumps(card)


_PEAKS = """
import os
from wan_loader.system import machine
machine.reset_peak_resident()
before = machine.peak_resident()
block = bytearray(os.urandom(1 << 20)) * 128
peak = machine.peak_resident()
assert peak - before > 100 << 20
del block
assert machine.peak_resident() >= peak - (1 << 20)
machine.reset_peak_resident()
assert machine.peak_resident() < peak - (64 << 20)
"""


def test_peak_resident_follows_what_is_used():
    subprocess.run([sys.executable, "-c", _PEAKS], check=True)  # whose memory other tests do not change
