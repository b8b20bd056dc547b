"""Kills processes that use the cache, and counts wrong tensors: a program of its own, run by test_kills.py.

    python kill_processes.py random DIRECTORY KILLS    at random moments, with and without loaders beside
    python kill_processes.py steps DIRECTORY           before every step of building and of removing
    python kill_processes.py ten DIRECTORY             kills nobody: ten at once ask for the same entry

Children are forked from a process that has everything imported, so that they begin at once. Prints a line of JSON.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import wan_loader
from wan_loader import api, spans  # noqa: F401 - imported before the forks
from wan_loader.cache import cached_load  # noqa: F401
from wan_loader.cache.checksums import check_entry
from wan_loader.cache.store import Store
from wan_loader.system.interpreter import freeze_all

FP32 = {"big": (600, 1024), "odd": (1023,), "empty": (0, 3), "scalar": ()}


def make_sources(directory, n):
    sources = []
    for i in range(n):
        torch.manual_seed(i)
        tensors = {name: torch.randn(shape) for name, shape in FP32.items()}
        path = directory / f"source-{i}.safetensors"
        save_file(tensors, path)
        sources.append((path, {name: t.bfloat16() for name, t in tensors.items()}))
    return sources


def load(source, cache):
    """Load, and end with code 3 if a bit is wrong or anything is raised; the report, and the build if any."""
    path, expected = source
    loaded = wan_loader.load(path, dtype="bf16", cache=True, cache_dir=cache)
    for name, tensor in expected.items():
        actual = loaded.tensors[name]
        if actual.dtype != tensor.dtype or not torch.equal(actual.view(torch.int16), tensor.view(torch.int16)):
            print(f"WRONG {path} {name} {loaded.report.cache}", file=sys.stderr, flush=True)
            os._exit(3)
    if loaded.report.warnings:
        print(f"WARNED {loaded.report.warnings}", file=sys.stderr, flush=True)
        os._exit(4)
    return loaded


def fork(work):
    pid = os.fork()
    if pid == 0:
        code = 5
        try:
            torch.set_num_threads(1)
            code = work() or 0
        finally:
            if sys.exc_info()[0] is not None:
                sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(code)
    return pid


def end_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left_over(cache):
    return [str(p) for room in ("building", "trash") if (cache / room).exists() for p in (cache / room).iterdir()]


def check(cache, sources):
    """After the next run there is no stray, and every entry is sound; every key can be built."""
    store = Store(cache)
    problems = left_over(cache)
    for listed in store.listed():
        problems += [listed.state] if listed.manifest is None else check_entry(listed.path, listed.manifest)
    for source in sources:
        loaded = load(source, cache)
        if loaded.build is not None and (not loaded.build.wait(30) or loaded.build.path is None):
            problems.append(f"not built: {loaded.build.failure}")
        elif loaded.build is None and loaded.report.cache.state != "hit":
            problems.append(f"stuck: {loaded.report.cache}")
    return problems


def build_and_prune(sources, cache, seed):
    chosen = random.Random(seed)
    while True:
        build = load(chosen.choice(sources), cache).build
        if build is not None and chosen.random() < 0.7:
            build.wait()
        if chosen.random() < 0.7:
            Store(cache).prune(max_size=1)


def keep_loading(sources, cache, stop):
    n = 0
    while not stop.exists():
        build = load(sources[n % len(sources)], cache).build
        if build is not None:
            build.wait()
            if build.path is None:
                print(f"FAILED {build.failure}", file=sys.stderr, flush=True)
                return 6
        n += 1
    return 0


def kill_at_random(directory, kills):
    sources, cache, stop = make_sources(directory, 2), directory / "cache", directory / "stop"
    problems, codes, dice = [], [], random.Random(kills)
    loaders = [fork(lambda: keep_loading(sources, cache, stop)) for _ in range(2)]
    for i in range(kills):
        if i == kills // 2:  # from here on nobody else cleans up
            stop.touch()
            codes += map(end_of, loaders)
            problems += check_in_child(cache, sources)
        victim = fork(lambda seed=i: build_and_prune(sources, cache, seed))
        time.sleep(dice.uniform(0, 0.15))
        os.kill(victim, signal.SIGKILL)
        codes.append(end_of(victim))
        if i >= kills // 2:
            problems += check_in_child(cache, sources)
    return {"kills": codes.count(-signal.SIGKILL), "codes": sorted(set(codes)), "problems": problems}


def check_in_child(cache, sources):
    """In a process of its own, as whoever comes next; it ends, and with it whatever it holds."""
    reading, writing = os.pipe()
    pid = fork(lambda: os.write(writing, json.dumps(check(cache, sources)).encode()) * 0)
    os.close(writing)
    with os.fdopen(reading) as f:
        text = f.read()
    return (json.loads(text) if text else ["the check failed"]) + ([] if end_of(pid) == 0 else ["wrong tensors"])


STEPS = [
    (os, ["mkdir", "rename", "replace", "fsync", "chmod", "unlink", "rmdir", "utime", "close"]),
    (fcntl, ["flock"]),
]


def die_at(step):
    """Kill this process when it is about to make its call number `step`, in any thread."""
    left = [step]

    def watched(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for module, names in STEPS:
        for name in names:
            setattr(module, name, watched(getattr(module, name)))


def kill_at_every_step(directory):
    sources, cache = make_sources(directory, 1), directory / "cache"
    problems, killed = [], {}

    def build():
        load(sources[0], cache).build.wait()

    def remove():
        Store(cache).prune(max_size=1)

    def set_aside():
        store = Store(cache)
        store.set_aside(store.listed()[0].key)

    for name, work in (("build", build), ("remove", remove), ("set aside", set_aside)):
        for step in range(1, 400):
            shutil.rmtree(cache, ignore_errors=True)
            if work is not build:
                end_of(fork(build))

            def dying(work=work, step=step):
                die_at(step)
                work()

            code = end_of(fork(dying))
            problems += [f"{name}, step {step}: {p}" for p in check_in_child(cache, sources)]
            if code == 0:
                killed[name] = step - 1
                break
            if code != -signal.SIGKILL:
                problems.append(f"{name}, step {step}: ended with {code}")
    return {"killed": killed, "problems": problems}


def ten_at_once(directory):
    (source,), cache = make_sources(directory, 1), directory / "cache"
    start_reading, start_writing = os.pipe()
    reading, writing = os.pipe()

    def one():
        os.close(start_writing)
        os.read(start_reading, 1)  # ends when the parent closes its side
        loaded = load(source, cache)
        if loaded.build is not None:
            loaded.build.wait()
        built = loaded.build is not None and loaded.build.path is not None
        os.write(writing, f"{loaded.report.cache.state} {int(built)}\n".encode())

    children = [fork(one) for _ in range(10)]
    os.close(writing)
    os.close(start_writing)
    with os.fdopen(reading) as f:
        lines = f.read().split("\n")[:-1]
    return {
        "codes": [end_of(child) for child in children],
        "built": sum(int(line.split()[1]) for line in lines),
        "states": sorted(line.split()[0] for line in lines),
        "entries": len(list((cache / "entries").iterdir())),
        "damaged": len(list((cache / "damaged").iterdir())),
        "problems": check_in_child(cache, [source]),
    }


def main():
    what, directory = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warm = fork(lambda: load(make_sources(directory, 1)[0], directory / "warm").build.wait() * 0)
    assert end_of(warm) == 0
    freeze_all()  # what all children share is nothing for them to look at, or to copy
    match what:
        case "random":
            result = kill_at_random(directory, int(sys.argv[3]))
        case "steps":
            result = kill_at_every_step(directory)
        case "ten":
            result = ten_at_once(directory)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
