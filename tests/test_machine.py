"""What the machine allows, read from made-up /proc and /sys/fs/cgroup trees and from the real ones."""

import json
import os

import pytest

from wan_loader import machine

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


def test_peak_resident_follows_what_is_used():
    machine.reset_peak_resident()
    before = machine.peak_resident()
    block = bytearray(os.urandom(1 << 20)) * 128
    peak = machine.peak_resident()
    assert peak - before > 100 << 20
    del block
    assert machine.peak_resident() >= peak - (1 << 20)
    machine.reset_peak_resident()
    assert machine.peak_resident() < peak - (64 << 20)
