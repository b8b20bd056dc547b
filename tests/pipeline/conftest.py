"""Tiny checkpoints, made once for all tests of the pipeline; tests must not change them."""

import pytest


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory):
    """(layout, task) -> the directory of a tiny checkpoint."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from wan_pipeline.synth import synth

    root = tmp_path_factory.mktemp("wan")
    made = {}

    def get(layout="native", task="t2v-A14B"):
        if (layout, task) not in made:
            made[layout, task] = synth(root / f"{layout}-{task}", layout=layout, task=task).directory
        return made[layout, task]

    return get
