"""Questions about devices are answered in other processes, and have the same answers."""

import os
import pickle

import pytest

from wan_loader.standby.elsewhere import Elsewhere
from wan_loader.standby.variables import recorded_reads

torch = pytest.importorskip("torch")


@pytest.fixture
def asked(monkeypatch):
    """What torch asks, answered by the number of the process that was asked."""
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", os.getpid)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", os.getpid, raising=False)
    elsewhere = Elsewhere()
    yield elsewhere
    elsewhere.close()


def test_each_question_is_asked_once_and_in_a_process_of_its_own(asked):
    asked.begin()
    asked.begin()
    one, other = torch.cuda._device_count_nvml(), torch._C._cuda_getDeviceCount()
    assert len({one, other, os.getpid()}) == 3
    assert (torch.cuda._device_count_nvml(), torch._C._cuda_getDeviceCount()) == (one, other)


def test_afterwards_torch_asks_for_itself(asked):
    asked.begin()
    asked.close()
    assert torch.cuda._device_count_nvml() == torch._C._cuda_getDeviceCount() == os.getpid()


def test_the_accelerator_is_the_one_that_there_is(asked):
    expected = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    asked.begin()
    assert expected == (torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None)


def test_the_variable_that_answers_depend_on_counts_as_read(asked):
    asked.begin()
    with recorded_reads() as reads:
        torch.cuda._device_count_nvml()
    assert "CUDA_VISIBLE_DEVICES" in reads


def test_a_process_that_dies_is_an_error(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: os._exit(3))
    asked.begin()
    with pytest.raises(RuntimeError, match="without an answer"):
        torch.cuda._device_count_nvml()


def test_an_error_of_the_answer_is_an_error(asked, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: pickle.loads(b""))
    asked.begin()
    with pytest.raises(RuntimeError, match="without an answer"):
        torch.cuda._device_count_nvml()
