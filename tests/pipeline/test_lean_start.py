"""A start that imports what it needs: the rest is there when it is used, and videos are the same."""

import hashlib
import json
import subprocess
import sys
from importlib import metadata

import pytest

pytest.importorskip("diffusers")

from programs import PIPELINE

from wan_pipeline.lean.import_times import import_seconds
from wan_pipeline.lean.installed import needed_by, packages_distributions

LEAN = """
import hashlib, sys
from wan_pipeline import WanT2V
with WanT2V.from_checkpoint(sys.argv[1], device="cpu", size=(32, 32), frame_num=5) as pipe:
    frames = pipe("two cats", size=(32, 32), frame_num=5, steps=2).frames_THWC
    print(hashlib.sha256(frames.tobytes()).hexdigest())
    assert not {"scipy.stats._stats_py", "torch._dynamo.symbolic_convert"} & {*sys.modules}
    assert pipe.report()["pipeline"]["imports"]["torch"] > 0

    # what waited is used, and is all there
    from diffusers import UniPCMultistepScheduler
    UniPCMultistepScheduler(use_beta_sigmas=True).set_timesteps(3)
    assert "scipy.stats._stats_py" in sys.modules
    import torch
    assert not isinstance(pipe.pipe.transformer, torch._dynamo.eval_frame.OptimizedModule)
    assert "torch._dynamo.symbolic_convert" not in sys.modules
    compiled = torch.compile(pipe.pipe.transformer, backend="eager")
    assert isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule)
    from diffusers.models import attention
    from torch._dynamo import trace_rules
    assert id(attention.BasicTransformerBlock) in trace_rules._allowed_callable_ids.function_ids
"""


def test_the_same_video_and_what_waited_can_be_used(tiny_wan):
    from wan_pipeline import WanT2V

    lean = subprocess.run([sys.executable, "-c", LEAN, tiny_wan()], capture_output=True, text=True)
    assert lean.returncode == 0, lean.stderr
    with WanT2V.from_checkpoint(tiny_wan(), device="cpu", size=(32, 32), frame_num=5, full_imports=True) as pipe:
        frames = pipe("two cats", size=(32, 32), frame_num=5, steps=2).frames_THWC
    assert lean.stdout.split() == [hashlib.sha256(frames.tobytes()).hexdigest()]


def test_needed_is_what_is_required_and_no_extra():
    needed = needed_by(["diffusers", "nobody-has-this"])
    assert {"diffusers", "PIL", "numpy", "huggingface_hub", "yaml"} - needed <= {"yaml"}
    assert not {"scipy", "pytest"} & needed


def test_records_say_the_same_as_the_standard_library():
    """Which names beside packages it gives, of data and byte code, differs between versions of Python."""
    found, expected = packages_distributions(), metadata.packages_distributions()
    assert {name: sorted(set(who)) for name, who in found.items()} == {
        name: sorted(set(expected[name])) for name in found
    }
    assert {"torch", "numpy", "PIL", "yaml", "safetensors"} <= found.keys()


def test_a_package_has_the_time_of_its_own_modules():
    s = 1_000_000_000
    imports = [
        ("b.x", 3 * s, 4 * s),
        ("b", 2 * s, 5 * s),
        ("a.y", 6 * s, 7 * s),
        ("a", 1 * s, 9 * s),
        ("c", 9 * s, 9 * s),
    ]
    assert import_seconds(imports) == {"a": 5, "b": 3, "others": 0}
    assert import_seconds(imports, least_s=4) == {"a": 5, "others": 3}
    assert import_seconds([]) == {}


def test_benchmark_runs(tiny_wan, tmp_path, benchmark_main, capsys):
    """Tiny, so that it cannot rot; in forks of a process that has imported everything."""
    words = ["--samples", "1", "--ckpt", tiny_wan(), "--device", "cpu", "--size", "32*32", "--frames", "5"]
    benchmark_main("imports", *words, "--output", tmp_path / "out.json", modules=PIPELINE)
    samples = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert [s["kind"] for s in samples] == ["python", "torch", "full", "lean", "first step full", "first step lean"]
    assert samples[-1]["seconds"] > 0
    assert "3.5 times that + 0.6 s" in capsys.readouterr().out
