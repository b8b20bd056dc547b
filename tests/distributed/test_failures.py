"""A process that fails takes the others down, soon and with its own error; killed ones are noticed."""

import signal
import time

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    here = tmp_path_factory.mktemp("failures")
    a, b = torch.arange(700_000.0), torch.arange(700.0)
    safetensors.torch.save_file({"a": a, "b": b}, here / "a.safetensors")
    safetensors.torch.save_file({"a": a, "c": b}, here / "b.safetensors")
    safetensors.torch.save_file({"a": a + 1, "b": b}, here / "c.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(3, 6)}, here / "columns.safetensors")
    return here


def test_one_fails_all_fail_and_the_next_load_works(ranks, checkpoints):
    for ended in ranks("worker_failures.py", 3, checkpoints, "survive"):
        assert ended.code == 0, ended.output


@pytest.mark.parametrize(
    ("case", "n", "victim", "code", "message"),
    [
        ("ends", 3, 2, 0, "process 2 ended before it came to 'headers': see its own output"),
        ("crashes", 3, 2, 1, "process 2 ended with ValueError: boom before it came to 'headers'"),
        ("ends-later", 2, 1, 0, "process 1 ended before it came to 'headers'"),
        ("ends-first", 2, 0, 0, "the process that holds the store"),
    ],
)
def test_a_process_that_ends_without_loading_ends_the_others(ranks, checkpoints, case, n, victim, code, message):
    """Within ten seconds: the worker looks at its clock."""
    ended = ranks("worker_failures.py", n, checkpoints, case)
    assert ended[victim].code == code, ended[victim].output
    for rank in {*range(n)} - {victim}:
        assert ended[rank].code == 1, ended[rank].output
        assert f"DistributedError: {message}" in ended[rank].output, ended[rank].output
        assert "Traceback" not in ended[rank].output


@pytest.mark.parametrize(
    ("case", "n", "victim", "message"),
    [
        ("kill", 3, 2, "process 2 is gone"),
        ("exchange", 2, 1, "process 1 is gone"),
        ("kill-first", 2, 0, "the process that holds the store"),
    ],
)
def test_a_killed_process_is_noticed(ranks, checkpoints, case, n, victim, message):
    start = time.monotonic()
    ended = ranks("worker_failures.py", n, checkpoints, case)
    assert time.monotonic() - start < 40
    assert ended[victim].code == -signal.SIGKILL
    for rank in {*range(n)} - {victim}:
        assert ended[rank].code == 1, ended[rank].output
        assert f"DistributedError: {message}" in ended[rank].output, ended[rank].output
