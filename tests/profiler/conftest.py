"""What the profiler's tests share: small checkpoints, ceilings that were measured once, programs that are profiled."""

import sys

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """128 MB of fp32 in one safetensors file."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({f"blocks.{i}.weight": torch.full((2048, 1024), float(i)) for i in range(16)}, path)
    return path


@pytest.fixture(scope="session")
def ceilings(checkpoint, tmp_path_factory):
    """What this machine can do, with a torch that has been imported before, and no more than a healthy load did.

    Memory that is touched for the first time costs ten times more on a shared machine when the host has to find it:
    the load at hand is what others are to be compared with.
    """
    import wan_loader
    from wan_loader.profiler.probe.ceilings import find_ceilings

    cache = tmp_path_factory.mktemp("cache") / "ceilings.json"
    values = dict(find_ceilings([str(checkpoint)], device="cpu", file=cache).values)
    report = wan_loader.load(checkpoint, io="buffered", observer=wan_loader.Recorder()).report
    reached = {phase.name: phase.gbps for phase in report.phases}
    values["copy_gbps"] = min(values["copy_gbps"], reached["read"])
    return values


@pytest.fixture
def profiled(tmp_path):
    """Run Python source as a program under the profiler; returns its session."""

    def profiled(source, *args, ceilings=None, **options):
        from wan_loader.profiler.analysis.assemble import Environment, program_session
        from wan_loader.profiler.analysis.merge import merge
        from wan_loader.profiler.program import run_program

        script = tmp_path / "program.py"
        script.write_text(source)
        recording = run_program([sys.executable, str(script), *map(str, args)], **options)
        return program_session(recording, merge(recording), Environment(ceilings=ceilings or {}))

    return profiled
