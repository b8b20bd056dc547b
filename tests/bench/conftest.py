"""A tiny checkpoint, documents made by hand, and the real command."""

import copy
import functools

import pytest
import torch
from programs import TORCH, wan_loader
from safetensors.torch import save_file

SUMMARY = {
    "n": 3,
    "median_s": 1.0,
    "min_s": 0.9,
    "max_s": 1.1,
    "spread": 0.2,
    "cpu_s": 0.5,
    "read_bytes": 10,
    "host_peak_bytes": 100,
    "pinned_bytes": None,
    "device_peak_bytes": None,
}


def sample(seconds, **other):
    good = {"status": "ok", "seconds": seconds, "call_seconds": seconds, "cpu_seconds": 0.1, "read_bytes": 0}
    peaks = {"host_peak_bytes": 1, "pinned_bytes": None, "device_peak_bytes": None}
    cache = {"resident_before": 100, "nbytes_watched": 100, "others_share": None, "phases": {}}
    return {**good, **peaks, **cache, **other}


def result(loader, median=None, **other):
    summary = None if median is None else {**SUMMARY, "median_s": median, "max_s": median}
    samples = [] if median is None else [sample(median, phases={"read": [[0.0, median / 2]]})]
    return {
        "loader": loader,
        "status": "ok",
        "reason": "",
        "summary": summary,
        "gbps": None if median is None else 2e9 / median / 1e9,
        "of_ceiling": None,
        "compared_tensors": 5,
        "conversion_s": None,
        "samples": samples,
        **other,
    }


DOCUMENT = {
    "schema_version": 1,
    "command": "bench",
    "created": "2026-01-01 00:00 UTC",
    "argv": ["wan-loader", "bench", "m"],
    "device": "cpu",
    "dtype": None,
    "machine": {"cpu": "A CPU", "cores": 2, "memory_limit_bytes": 10**10, "kernel": "6.1", "torch": "2"},
    "loaders": [
        {
            "label": "ours",
            "name": "ours",
            "version": "1",
            "packages": {"x": "1", "y": "2"},
            "how": "call",
            "io": "auto",
            "threads": None,
        }
    ],
    "cases": [
        {
            "path": "/x/m",
            "name": "m",
            "storage": {"name": "here", "label": "here", "simulated": False, "rate_bytes_per_s": None},
            "cache": "warm",
            "nbytes": 2 * 10**9,
            "n_tensors": 5,
            "n_files": 1,
            "format": "safetensors",
            "file_dtype": "bfloat16",
            "is_part": False,
            "ceilings": {},
            "ceiling_gbps": 4.0,
            "ceiling": "pinned copies",
            "notes": [],
            "failure": "",
            "results": [result("safetensors", 2.0), result("ours", 1.0)],
        }
    ],
    "warnings": ["beware"],
}


@pytest.fixture
def document():
    return copy.deepcopy(DOCUMENT)


@pytest.fixture
def make_sample():
    return sample


@pytest.fixture
def make_result():
    return result


@pytest.fixture
def checkpoint(tmp_path):
    """A component directory of 400 kB."""
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = {f"w{i}": torch.randn(64, 100 + i) for i in range(10)} | {"n": torch.arange(7), "s": torch.tensor(2.5)}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def command(python_that_forks):
    """Runs `wan-loader` without a GPU; the processes that it starts need not import torch."""
    return functools.partial(wan_loader, timeout=110, PYTHON_EXEC=str(python_that_forks(TORCH)))
