"""What commands of `wan-pipeline` print, and those of `wan-loader` on a whole model; see `test_golden.py`."""

import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("imageio_ffmpeg")

from golden_cases import HERE, MODEL, PIPELINE, capture_pipeline
from once import made_once

# imageio's writer leaves its pipes to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(golden, now)."""
    golden = json.loads((HERE / "pipeline.json").read_text())
    return golden, made_once(tmp_path_factory, "golden-pipeline", capture_pipeline)[1]


@pytest.mark.parametrize(
    "case", [*PIPELINE, *(f"wan-loader {name}" for name in (*MODEL, "cache build, model")), "files"]
)
def test_commands(answers, case):
    golden, now = answers
    assert now[case] == golden[case]
