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


@pytest.fixture(scope="session")
def tiny_comfy(tmp_path_factory):
    """form -> ComfyUI's folders with a tiny checkpoint."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from wan_pipeline.synth import synth

    root, made = tmp_path_factory.mktemp("comfy"), {}

    def get(form="fp8-scaled"):
        if form not in made:
            made[form] = synth(root / form, form=form).directory
        return made[form]

    return get
