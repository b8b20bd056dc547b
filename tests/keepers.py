"""The keeper of a test, asked and ended."""

import os
import signal
import time

from wan_loader.keeper import client


def user_count(label=None):
    """How many use what is kept, as the keeper says."""
    return sum(item["n_users"] for item in client.status()["items"] if label in (None, item["label"]))


def wait_until(is_so):
    """What the keeper learns of by a closed connection, it knows a moment later."""
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def kill_keeper():
    """End the keeper as nobody should; return when it is gone."""
    pid = client.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_there())


def is_there():
    """Whether there is a keeper."""
    if (link := client.find_keeper()) is None:
        return False
    with link:
        return True
