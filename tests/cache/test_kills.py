"""Processes that are killed, and many at once: never a wrong tensor, a stuck lock, or a stray file after the next run.

WAN_LOADER_TEST_KILLS=200 kills that many at random moments, instead of a few.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("WAN_LOADER_TEST_KILLS", "20"))


def run(directory, *words):
    script = Path(__file__).with_name("kill_processes.py")
    done = subprocess.run(
        [sys.executable, script, words[0], directory, *map(str, words[1:])],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.timeout(60 + 5 * KILLS)
def test_killed_at_random_moments(tmp_path):
    result, said = run(tmp_path, "random", KILLS)
    assert result["problems"] == [], said
    assert set(result["codes"]) <= {0, -9}, said
    assert result["kills"] == KILLS


def test_killed_before_every_step(tmp_path):
    result, said = run(tmp_path, "steps")
    assert result["problems"] == [], said
    assert result["killed"]["build"] > 20
    assert result["killed"]["remove"] > 5
    assert result["killed"]["set aside"] > 2


def test_ten_at_once_build_once(tmp_path):
    result, said = run(tmp_path, "ten")
    assert result["codes"] == [0] * 10, said
    assert (result["built"], result["entries"], result["damaged"]) == (1, 1, 0)
    assert set(result["states"]) <= {"building", "source", "hit"}
    assert result["problems"] == []
