"""What `wan-pipeline` prints, on terminals of 80, 100 and 120 columns."""

import re

import pytest

pytest.importorskip("diffusers")

from wan_pipeline.commands.app import main
from wan_pipeline.commands.load_report import print_load_report

LOAD = {"start_s": 3.5, "nbytes": 28 * 10**9, "nbytes_device": 28 * 10**9, "seconds": 12.5, "gbps": 2.24}
REPORT = {
    "seconds": 40.0,
    "phases": [{"name": "import", "busy_s": 6.0}],
    "bottleneck": {"why": "reading the files set the pace for 11.20 s of 12.50 s (90%), at 2.50 GB/s " * 2},
    "pipeline": {
        "imports": {"torch": 2.0, "transformers": 1.5, "diffusers": 1.2, "others": 1.0},
        "loads": [
            {**LOAD, "name": "transformer", "io": "mapped+direct+buffered"},
            {**LOAD, "name": "transformer_2", "io": "direct", "start_s": 17.0},
            {**LOAD, "name": "vae", "io": "none", "start_s": 30.0, "kept": {"state": "attached"}},
        ],
    },
}


def check(printed, action, width):
    text, wide = printed(action, width), printed(action, 1000)
    assert wide
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    said = re.sub(r"^no room for: .*$", "", text, flags=re.M)
    assert set(re.findall(r"[\w-]+", said)) <= set(re.findall(r"[\w-]+", wide))
    return text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_load(printed, width):
    text = check(printed, lambda: print_load_report(REPORT), width)
    assert "high-noise expert" in text
    assert re.search(r"loads took most of it \(\d+%\); of the longest load:\s+reading", text)


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("command", [[], ["generate"], ["load"], ["synth"]], ids=" ".join)
def test_help(printed, call_main, command, width):
    text = check(printed, lambda: call_main(main, *command, "--help"), width)
    assert "Usage: " in text
    assert ("Examples:" in text) is bool(command)
