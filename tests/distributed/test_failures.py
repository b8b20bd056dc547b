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
    many = {f"t{i}": torch.randn(300_000) for i in range(6)} | {f"s{i}": torch.randn(50) for i in range(20)}
    safetensors.torch.save_file(many, here / "many.safetensors")
    return here


def test_one_fails_all_fail_and_the_next_load_works(ranks, checkpoints):
    ended = ranks("worker_failures.py", 3, checkpoints, "survive")
    assert [process.code for process in ended] == [0, 0, 0], "\n".join(process.output for process in ended)


@pytest.mark.parametrize(
    ("case", "n", "victim", "code", "message"),
    [
        ("ends", 3, 2, 0, "process 2 ended before it came to 'headers': see its own output"),
        ("crashes", 3, 2, 1, "process 2 ended with ValueError: boom before it came to 'headers'"),
        ("ends-later", 2, 1, 0, "process 1 ended before it came to 'headers'"),
        ("ends-first", 2, 0, 0, "the process that holds the store"),
        ("ends-later-first", 2, 0, 0, "the process that holds the store"),
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


needs_two_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")]


@pytest.mark.parametrize(
    ("device", "victim", "at"),
    [
        ("cpu", 0, 0),
        ("cpu", 1, 6),
        *(pytest.param("cuda", *which, marks=needs_two_gpus) for which in ((0, 0), (1, 0), (0, 3), (1, 6))),
    ],
)
def test_an_exchange_that_fails_in_one_process_ends_in_all(ranks, checkpoints, device, victim, at):
    """Before its first collective, between those of large tensors, and before the message with the small ones."""
    for ended in ranks("worker_failures.py", 2, checkpoints, f"exchange-fails-{victim}-{at}", device, timeout=60):
        assert ended.code == 0, ended.output
        assert "one reason" in ended.output


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("case", ["any-thread", "one-gpu", "exchange-fails-unbound"])
def test_groups_and_gpus(ranks, checkpoints, case):
    """Each process loads to its own, whatever thread it does that in, and a group that is bound to none ends, too."""
    for ended in ranks("worker_failures.py", 2, checkpoints, case, "cuda", timeout=60):
        assert ended.code == 0, ended.output


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_without_the_file_ends_a_command_on_all(ranks, tmp_path, present):
    """Without torchrun, too: process 0, which holds the store then, stays until the others know."""
    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / f"{present}.safetensors")
    ended = ranks("worker_cli.py", 2, "load", tmp_path / "RANK.safetensors", "--device", "cpu")
    absent = 1 - present
    assert [process.code for process in ended] == [1, 1]
    assert ended[absent].output.startswith(f"error: {tmp_path / f'{absent}.safetensors'} does not exist")
    assert ended[present].output.startswith(f"error: process {absent} failed: MissingFileError: "), ended
    assert all(process.output.count("\n") == 1 for process in ended), ended


def test_a_failure_of_all_together_is_told_by_all(ranks, checkpoints):
    words = ("load", checkpoints / "a.safetensors", "--device", "cpu", "--cache", "--cache-dir", checkpoints / "cache")
    for process in ranks("worker_cli.py", 2, *words):
        assert process.code == 1
        assert process.output.startswith("error: the converted cache is for one process"), process.output


def test_bench_is_for_one_process(ranks, checkpoints):
    for process in ranks("worker_cli.py", 2, "bench", checkpoints / "a.safetensors", "--device", "cpu"):
        assert process.code == 1
        assert process.output.startswith("error: 2 processes would disturb"), process.output
