"""The lines to type are the profiled command's own words."""

import pytest

from wan_loader.profiler.analysis.commands import Program, fits, joined


def program(*argv, **changes):
    return Program(argv=argv, **changes)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/venv/bin/python", "generate.py", "--ckpt_dir", "my model"], "generate.py --ckpt_dir 'my model'"),
        (["python3", "-m", "package.serve", "--port", "8000"], "-m package.serve --port 8000"),
        (["python", "-u", "a.py"], "-- python -u a.py"),
        (["torchrun", "--nproc_per_node", "2", "a.py"], "-- torchrun --nproc_per_node 2 a.py"),
        (["python", "-c", "import torch"], "-- python -c 'import torch'"),
    ],
)
def test_under_run(argv, line):
    assert program(*argv).under_run() == f"wan-loader run {line}"


def test_another_python_is_started_as_it_is():
    assert program("/other/bin/python", "a.py", own_python=False).under_run() == (
        "wan-loader run -- /other/bin/python a.py"
    )
    assert program("/other/bin/python", "a.py", own_python=False).forked() == ""


def test_processes_that_load_are_served_where_they_are():
    assert program("python", "a.py", loads_in_children=True).under_run() == "wan-loader run -- python a.py"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["python", "a.py", "x"], "wan-loader run a.py x"),
        (["torchrun", "--standalone", "--nproc-per-node=4", "a.py", "x"], "wan-loader run --nproc 4 a.py x"),
        (["torchrun", "--nnodes", "2", "--nproc_per_node", "4", "a.py"], ""),
        (["torchrun", "--nproc_per_node", "gpu", "a.py"], ""),
        (["accelerate", "launch", "a.py"], ""),
        (["/bin/wan-pipeline", "generate", "--ckpt_dir", "m"], "/bin/wan-pipeline generate --ckpt_dir m"),
        (["wan-loader", "run", "a.py"], "wan-loader run a.py"),
        (["wan-loader", "load", "a.safetensors"], ""),
    ],
)
def test_forked(argv, line):
    assert program(*argv).forked() == line


def test_our_own_commands_are_not_run_again():
    for argv in (["wan-loader", "run", "a.py"], ["python", "-m", "wan_loader", "run", "a.py"]):
        assert program(*argv).is_ours
        assert program(*argv).under_run() == ""
    assert program("python", "-m", "wan_pipeline", "generate").generates
    assert not program("python", "generate.py").is_ours
    assert not program().is_ours


def test_a_part_of_a_process_has_no_line_to_type():
    found = program("python", "a.py", inside=True)
    assert (found.under_run(), found.forked()) == ("", "")


def test_values_and_paths_of_options():
    found = program("wan-pipeline", "generate", "--ckpt-dir", "a b", "--prompt=two cats")
    assert (found.value_of("--ckpt_dir"), found.value_of("--prompt"), found.value_of("--task")) == (
        "a b",
        "two cats",
        "",
    )
    assert found.with_path("a b", "/dev/shm/a b").count("'/dev/shm/a b'") == 1
    assert found.with_path("c", "d") == ""


def test_lines_that_fit():
    assert fits("", "wan-loader run a.py")
    assert fits("wan-loader run --keep a.py", "wan-loader run a.py")
    assert not fits("wan-loader run -- python a.py", "wan-loader run a.py")
    assert joined(["wan-loader run a.py", "wan-loader run --keep a.py", ""]) == "wan-loader run --keep a.py"
    assert joined([]) == ""
