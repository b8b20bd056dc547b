"""Programs that are slow for a reason that is known, each with the verdict that it deserves.

Every verdict stands here because of what the program does, not because of what a profile said of it: where the two
differ, the profile is wrong. The programs get a file of weights as their first argument, and the address of a slow
server, which is no part of them, as their second. They take a few seconds on two cores.

    Program    a program, its reason, and what a profile must say of it
    PROGRAMS   all of them, by name
    prepare    makes the files that they need
    evict      takes a file out of the page cache
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COLD", "PROGRAMS", "WEIGHTS", "Program", "evict", "prepare"]

WEIGHTS = "model.safetensors"
#: A larger file, whose pages are not in the page cache when a program starts.
COLD = "cold.safetensors"
_BIN = Path(sys.executable).parent
_TENSORS = 25
_COLD_TENSORS = 200
_SHAPE = (2048, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program and the truth about it."""

    because: str
    """The reason why it is slow."""
    phase: str
    """The phase that the verdict must name."""
    process: str = "program.py"
    """The process that sets the pace."""
    worker: bool = False
    """That process is a worker that multiprocessing or a fork made."""
    says: str = ""
    """Something that the verdict must name."""
    file: str = ""
    """The file that the process of the verdict must be known to have read."""
    ended: str = ""
    """The way in which that process ended."""
    note: str = ""
    """Something that the notes must say."""
    source: str = ""
    """What is in program.py."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Other files that it needs, by name."""
    words: tuple[str, ...] = (sys.executable, "program.py")
    """What starts it, before its two arguments."""


_HEAD = "import os, sys, time\nW, URL = sys.argv[1:]\n"
_READ = "open(W, 'rb').read()"
_EVICT = f"os.posix_fadvise(os.open('{COLD}', os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)"
_READ_COLD = f"open('{COLD}', 'rb').read()"
_READS = f"for _ in range(20): {_READ}"
_BURN = "t = time.time() + {0}\nwhile time.time() < t: pass\n"
_WORKER = "def work(path):\n    for _ in range(20): open(path, 'rb').read()\n"
_POOLS = "import multiprocessing as mp\n"
_START = "    p = mp.get_context('{0}').Process(target=work, args=(W,)); p.start(); p.join()"
_MAIN = "if __name__ == '__main__':\n"
_TORCH = "import torch\n"
_LOAD = "from safetensors.torch import load, load_file\n"

_ONE_PROCESS = {
    "slow_module": Program(
        because="a module sleeps while it is imported",
        phase="import",
        says="molasses",
        source=_HEAD + "import molasses\n" + _READ,
        more={"molasses.py": "import time; time.sleep(2)"},
    ),
    "many_modules": Program(
        because="a package imports 400 modules, each with a little work of its own",
        phase="import",
        says="crumbs",
        source=_HEAD + "import crumbs\n" + _READ,
        more={
            "crumbs/__init__.py": "".join(f"from . import part{i}\n" for i in range(400)),
            **{f"crumbs/part{i}.py": "total = sum(range(150_000))\n" for i in range(400)},
        },
    ),
    "cached_reads": Program(
        because="it reads 4 GB of weights that are in the page cache",
        phase="read",
        file=WEIGHTS,
        source=_HEAD + _READS,
    ),
    "cold_reads": Program(
        because="the pages of the file were evicted before it reads them",
        phase="read",
        file=COLD,
        source=_HEAD + _READ_COLD,
    ),
    "cold_mapping": Program(
        because="the file is mapped, its pages were evicted, and a sum is the first to touch them",
        phase="read",
        file=COLD,
        source=_HEAD + f"import numpy\nint(numpy.memmap('{COLD}', mode='r')[::4096].sum())",
    ),
    "small_reads": Program(
        because="it reads by 512 bytes at a time",
        phase="read",
        file=WEIGHTS,
        source=_HEAD
        + "fd, size = os.open(W, os.O_RDONLY), os.path.getsize(W)\n"
        + "for _ in range(4):\n    for at in range(0, size, 512): os.pread(fd, 512, at)",
    ),
    "random_init": Program(
        because="modules fill their weights with random numbers",
        phase="random_init",
        source=_HEAD + _TORCH + "torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False) for _ in range(20))",
    ),
    "cast": Program(
        because="fp32 is converted to fp16 on the CPU",
        phase="cast",
        source=_HEAD + _TORCH + "x = torch.ones(32 << 20)\nfor _ in range(60): x.to(torch.float16)",
    ),
    "cast_one_thread": Program(
        because="one thread converts the tensors of a file one by one",
        phase="cast",
        source=_HEAD
        + _TORCH
        + _LOAD
        + "torch.set_num_threads(1)\ntensors = load_file(W)\n"
        + "for _ in range(120):\n    for t in tensors.values(): t.to(torch.bfloat16)",
    ),
    "state_dict_copies": Program(
        because="a state dict is copied again and again",
        phase="h2d",
        source=_HEAD + _TORCH + _LOAD + "import copy\nstate = load_file(W)\nfor _ in range(200): copy.deepcopy(state)",
    ),
    "weights_swapped": Program(
        because="the weights of a module are replaced by another set, and back",
        phase="h2d",
        source=_HEAD
        + _TORCH
        + "net = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, device='meta') for _ in range(12))\n"
        + "net.to_empty(device='cpu')\n"
        + "a = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}\n"
        + "b = {k: torch.ones_like(v) for k, v in a.items()}\n"
        + "for _ in range(60):\n    net.load_state_dict(a)\n    net.load_state_dict(b)",
    ),
    "load_of_bytes": Program(
        because="safetensors.torch.load copies tensors out of bytes in memory",
        phase="h2d",
        source=_HEAD + _TORCH + _LOAD + "data = " + _READ + "\nfor _ in range(20): load(data)",
    ),
    "disable_mmap": Program(
        because="the whole of an evicted file is read into bytes before any tensor is made, three times",
        phase="read",
        file=COLD,
        source=_HEAD + _TORCH + _LOAD + f"for _ in range(3):\n    {_EVICT}\n    load({_READ_COLD})",
    ),
    "unpickle": Program(
        because="millions of small Python objects are unpickled",
        phase="other",
        source=_HEAD + "import pickle\nfor _ in range(4): pickle.load(open('objects.pkl', 'rb'))",
    ),
    "unzip": Program(
        because="zlib unpacks a compressed archive of arrays",
        phase="other",
        source=_HEAD + "import zlib\ndata = open('packed.bin', 'rb').read()\nfor _ in range(6): zlib.decompress(data)",
    ),
    "hash": Program(
        because="the file's SHA-512 is computed",
        phase="other",
        file=WEIGHTS,
        source=_HEAD
        + "import hashlib\nfor _ in range(8):\n    digest = hashlib.sha512()\n"
        + "    with open(W, 'rb') as file:\n        while piece := file.read(1 << 20): digest.update(piece)",
    ),
    "own_work": Program(
        because="it computes in Python",
        phase="other",
        source=_HEAD + _READ + "\n" + _BURN.format(2),
    ),
    "sleep": Program(
        because="it sleeps",
        phase="wait",
        says="sleep",
        source=_HEAD + _READ + "\nfor _ in range(4): time.sleep(0.5)",
    ),
    "lock": Program(
        because="it waits for a lock that a thread holds, and the thread waits for the network",
        phase="wait",
        says="network",
        source=_HEAD
        + "import threading, urllib.request\nlock = threading.Lock()\n"
        + "def fetch():\n    with lock: urllib.request.urlopen(URL).read()\n"
        + "threading.Thread(target=fetch).start()\ntime.sleep(0.1)\nwith lock: pass",
    ),
    "gil": Program(
        because="a thread that computes keeps the interpreter from the one that reads",
        phase="other",
        source=_HEAD
        + "import threading\n"
        + "def burn():\n    t = time.time() + 2\n    while time.time() < t: pass\n"
        + "thread = threading.Thread(target=burn)\nthread.start()\n"
        + "with open(W, 'rb', buffering=0) as file:\n    for _ in range(50): file.read(4096)\nthread.join()",
    ),
    "network": Program(
        because="it downloads from a slow server",
        phase="wait",
        says="network",
        source=_HEAD + "import urllib.request\nurllib.request.urlopen(URL).read()",
    ),
    "fromfile": Program(
        because="numpy reads the file, again and again",
        phase="read",
        file=WEIGHTS,
        source=_HEAD + "import numpy\nfor _ in range(20): numpy.fromfile(W, dtype='uint8')",
    ),
    "np_load": Program(
        because="numpy.load reads an array, again and again",
        phase="read",
        file="array.npy",
        source=_HEAD + "import numpy\nfor _ in range(30): numpy.load('array.npy')",
    ),
    "gguf": Program(
        because="blocks of a GGUF file are turned into fp32 by numpy",
        phase="cast",
        file="model.gguf",
        source=_HEAD
        + "import gguf\nreader = gguf.GGUFReader('model.gguf')\n"
        + "for _ in range(6):\n    for t in reader.tensors: gguf.dequantize(t.data, t.tensor_type)",
    ),
    "tokenizer": Program(
        because="a tokenizer of many words is built",
        phase="other",
        source=_HEAD + "import json, tokenizers\nfor _ in range(3): tokenizers.Tokenizer.from_file('tokenizer.json')",
    ),
}

_FAMILIES = {
    "subprocess": Program(
        because="a script that it starts reads the weights",
        phase="read",
        process="child.py",
        file=WEIGHTS,
        source=_HEAD + "import subprocess\nsubprocess.run([sys.executable, 'child.py', W, URL])",
        more={"child.py": _HEAD + _READS},
    ),
    "spawn": Program(
        because="a spawned process reads the weights",
        phase="read",
        worker=True,
        file=WEIGHTS,
        source=_HEAD + _POOLS + _WORKER + _MAIN + _START.format("spawn"),
    ),
    "fork_pool": Program(
        because="two forked workers of a pool read the weights",
        phase="read",
        worker=True,
        file=WEIGHTS,
        source=_HEAD
        + _POOLS
        + _WORKER
        + _MAIN
        + "    with mp.get_context('fork').Pool(2) as pool: pool.map(work, [W] * 2)",
    ),
    "forkserver": Program(
        because="a worker of a fork server reads the weights",
        phase="read",
        worker=True,
        file=WEIGHTS,
        source=_HEAD + _POOLS + _WORKER + _MAIN + _START.format("forkserver"),
    ),
    "executor": Program(
        because="a worker of an executor fills modules with random numbers",
        phase="random_init",
        worker=True,
        source=_HEAD
        + _TORCH
        + "from concurrent.futures import ProcessPoolExecutor\n"
        + "def build(n):\n    torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False) for _ in range(n))\n"
        + _MAIN
        + "    with ProcessPoolExecutor(1) as pool: list(pool.map(build, [10, 10]))",
    ),
    "killed_worker": Program(
        because="a worker reads the weights until it is killed",
        phase="read",
        worker=True,
        file=WEIGHTS,
        ended="killed by SIGKILL",
        source=_HEAD + _POOLS + _WORKER + "    os.kill(os.getpid(), 9)\n" + _MAIN + _START.format("fork"),
    ),
    "terminated_worker": Program(
        because="a worker reads the weights without end, until it is terminated",
        phase="read",
        worker=True,
        file=WEIGHTS,
        ended="killed by SIGTERM",
        source=_HEAD
        + _POOLS
        + "def work(path):\n    while True: open(path, 'rb').read()\n"
        + _MAIN
        + "    p = mp.get_context('fork').Process(target=work, args=(W,)); p.start(); time.sleep(2); p.terminate(); "
        + "p.join()",
    ),
    "exits_at_once": Program(
        because="a forked process reads the weights, and leaves by os._exit",
        phase="read",
        worker=True,
        file=WEIGHTS,
        ended="exit 7",
        source=_HEAD + f"if os.fork() == 0:\n    {_READS}\n    os._exit(7)\nos.wait()",
    ),
    "sleeping_worker": Program(
        because="the worker that the program waits for sleeps",
        phase="wait",
        worker=True,
        says="sleep",
        source=_HEAD + _POOLS + _MAIN + "    with mp.get_context('fork').Pool(1) as pool: pool.map(time.sleep, [2])",
    ),
    "locked_workers": Program(
        because="of two workers one has the lock and reads, and the other waits for it",
        phase="read",
        worker=True,
        file=WEIGHTS,
        source=_HEAD
        + _POOLS
        + "import fcntl\n"
        + "def reads(path):\n    file = open('one.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        + "    for _ in range(20): open(path, 'rb').read()\n"
        + "def waits(path):\n    time.sleep(0.3)\n    file = open('one.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        + _MAIN
        + "    ps = [mp.get_context('fork').Process(target=f, args=(W,)) for f in (reads, waits)]\n"
        + "    [p.start() for p in ps]; [p.join() for p in ps]",
    ),
    "torchrun_slow_rank": Program(
        because="one of two ranks reads while the other waits for it in a barrier",
        phase="read",
        process="rank 1",
        says="rank 0: program.py waited",
        file=WEIGHTS,
        words=(str(_BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "program.py"),
        source=_HEAD
        + "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
        + f"if dist.get_rank() == 1:\n    for _ in range(60): {_READ}\n"
        + "dist.barrier()\ndist.destroy_process_group()",
    ),
    "accelerate_launch": Program(
        because="the script that accelerate launches reads the weights",
        phase="read",
        says="accelerate launch (launcher)",
        file=WEIGHTS,
        words=(str(_BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "program.py"),
        source=_HEAD + f"for _ in range(60): {_READ}",
    ),
    "shell_script": Program(
        because="the program that a shell script starts reads the weights",
        phase="read",
        says="run.sh (launcher)",
        file=WEIGHTS,
        words=("sh", "run.sh"),
        source=_HEAD + _READS,
        more={"run.sh": f'export TOKENIZERS_PARALLELISM=false\n{sys.executable} program.py "$@"\nsleep 0.2\n'},
    ),
    "shell_exec": Program(
        because="a shell script becomes the program, which reads the weights",
        phase="read",
        file=WEIGHTS,
        words=("sh", "run.sh"),
        source=_HEAD + _READS,
        more={"run.sh": f'sleep 0.2\nexec {sys.executable} program.py "$@"\n'},
    ),
    "shell_sleep": Program(
        because="the script sleeps when the program is over",
        phase="wait",
        process="sleep",
        words=("sh", "-c", f'{sys.executable} program.py "$@"; sleep 2', "sh"),
        source=_HEAD + _READ,
    ),
    "many_dd": Program(
        because="150 processes that are no Python read the weights one after the other",
        phase="read",
        process="dd",
        note="counted from outside",
        words=("sh", "-c", 'for i in $(seq 150); do dd if="$0" of=/dev/null bs=1M 2>/dev/null; done'),
    ),
    "cat": Program(
        because="one process that is no Python reads the weights",
        phase="read",
        process="cat",
        file=WEIGHTS,
        note="counted from outside",
        source=_HEAD + "import subprocess\nsubprocess.run(['cat', *[W] * 150], stdout=subprocess.DEVNULL)",
    ),
    "curl": Program(
        because="a process that is no Python waits for a slow server",
        phase="wait",
        process="curl",
        says="network",
        source=_HEAD + "import subprocess\nsubprocess.run(['curl', '-s', '-o', '/dev/null', URL])",
    ),
    "many_starts": Program(
        because="Python is started fifty times, and has nothing to do",
        phase="import",
        process="python -c",
        source=_HEAD + "import subprocess\nfor _ in range(50): subprocess.run([sys.executable, '-c', 'import json'])",
    ),
    "daemon": Program(
        because="it reads; the process that it leaves behind goes on for longer, and does not count",
        phase="read",
        file=WEIGHTS,
        source=_HEAD
        + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(6)\n    os._exit(0)\nos.wait()\n"
        + _READS,
    ),
}

#: All programs, by name. Those of several processes come last.
PROGRAMS: dict[str, Program] = _ONE_PROCESS | _FAMILIES


def prepare(home: Path) -> None:
    """Make the files that programs read."""
    _prepare_weights(home / WEIGHTS, _TENSORS)
    _prepare_weights(home / COLD, _COLD_TENSORS)
    (home / "objects.pkl").write_bytes(pickle.dumps([{"name": f"layer {i}", "at": [i, i + 1]} for i in range(400_000)]))
    (home / "packed.bin").write_bytes(zlib.compress(bytes(range(256)) * (1 << 20), 1))
    _prepare_array(home / "array.npy")
    _prepare_gguf(home / "model.gguf")
    _prepare_tokenizer(home / "tokenizer.json")


def _prepare_weights(path: Path, n_tensors: int) -> None:
    nbytes = 4 * _SHAPE[0] * _SHAPE[1]
    offsets = [(i * nbytes, (i + 1) * nbytes) for i in range(n_tensors)]
    tensors = {f"t{i}": {"dtype": "F32", "shape": _SHAPE, "data_offsets": at} for i, at in enumerate(offsets)}
    header = json.dumps(tensors).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(n_tensors):
            file.write(bytes(nbytes))
        file.flush()
        os.fsync(file.fileno())  # pages that were not written cannot be evicted


def evict(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _prepare_array(path: Path) -> None:
    import numpy as np

    np.save(path, np.zeros(100 << 20, dtype="uint8"))


def _prepare_gguf(path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "none")
    for i in range(12):
        blocks = np.zeros((1024, 34 * 64), dtype="uint8")  # 2,048 values a row, 34 bytes for each 32 of them
        writer.add_tensor(f"t{i}", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _prepare_tokenizer(path: Path) -> None:
    vocabulary = {f"word{i}": i for i in range(400_000)} | {"[UNK]": 400_000}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    path.write_text(json.dumps({"version": "1.0", "model": model}))
