"""What a start changes for its imports, and that all of it is put back."""

import gc
import subprocess
import sys
import time
from importlib import metadata

import pytest

from wan_loader.devices.driver import start_device
from wan_pipeline.short_imports import short_imports


def settings():
    return sys.getswitchinterval(), gc.isenabled(), metadata.packages_distributions


def test_inside_no_garbage_is_looked_for():
    before = settings()
    with short_imports():
        assert not gc.isenabled()
    assert settings() == before


def test_everything_is_put_back_after_a_failure():
    before = settings()
    with pytest.raises(ImportError), short_imports():
        raise ImportError
    assert settings() == before


def test_what_was_chosen_before_stays():
    gc.disable()
    try:
        with short_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_packages_are_listed_once():
    expected = metadata.packages_distributions()
    with short_imports():
        first = metadata.packages_distributions()
        assert first == expected
        assert metadata.packages_distributions() is first


def test_a_start_puts_everything_back(tiny_wan):
    pytest.importorskip("diffusers")
    import wan_pipeline

    before = settings()
    with wan_pipeline.WanT2V.from_checkpoint(tiny_wan(), device="cpu", size=(32, 32), frame_num=5) as pipe:
        pipe.wait()
        deadline = time.monotonic() + 10  # what loads in the background changes some, too, until it has ended
        while settings() != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert settings() == before


def test_making_a_context_needs_neither_torch_nor_a_device():
    code = (
        "import sys; from wan_loader.devices.driver import start_device; "
        "start_device(99); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert start_device(99) is None
