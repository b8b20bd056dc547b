"""One process of test_parallel.py: `wan-pipeline` with a mishap, or a delay, in a certain process."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta

from wan_loader.distributed import liveness as liveness
from wan_loader.distributed import processes, shard_group
from wan_loader.errors import KeyMismatchError
from wan_pipeline import pipeline, startup
from wan_pipeline.commands.app import main

CASE = sys.argv.pop(1)
RANK = int(os.environ["RANK"])

if CASE == "killed" and RANK == 1:
    pipeline.WanT2V._denoise = lambda *parts: os.kill(os.getpid(), signal.SIGKILL)
if CASE == "hangs":  # as in NCCL, which does not notice
    liveness.SILENCE_S = 3.0
    pipeline.WanT2V._denoise = lambda *parts: time.sleep(60) if RANK == 0 else os.kill(os.getpid(), signal.SIGKILL)
if CASE == "slow":  # decoding takes longer than collectives may
    processes.COLLECTIVE_TIMEOUT = timedelta(seconds=4)
    decode = pipeline.WanT2V._decode
    pipeline.WanT2V._decode = lambda *parts: (time.sleep(6), decode(*parts))[1]
if CASE == "missing" and RANK == 1:
    sys.argv[sys.argv.index("--ckpt_dir") + 1] = "/nowhere"

if CASE == "cancels":  # loading is under way when something else fails
    loading = threading.Event()
    check = shard_group._GroupToken.check

    def slowly(self):
        loading.set()
        time.sleep(0.3)
        check(self)

    def failing(*parts):
        assert loading.wait(30)
        raise KeyMismatchError("the module and the checkpoint disagree")

    if RANK == 1:
        shard_group._GroupToken.check = slowly
        startup._settle = failing

main()
