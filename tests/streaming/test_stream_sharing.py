"""Modules that share buffers: each computes what it should, limits count all of them, and each may be closed first."""

import gc

import pytest
import torch
from streamed_models import Model, empty_model, inputs, resident_model, save_model

import wan_loader
from wan_loader import DeviceMemoryError, OptionError
from wan_loader.streaming.ledger import Held, Ledger

N, M = 7, 5


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def paths(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    return save_model(tmp_path / "a", N), save_model(tmp_path / "b", M)


def stream(path, n_blocks, device, **options):
    model = empty_model(n_blocks)
    return model, wan_loader.stream_blocks(model, path, device=device, **options)


@pytest.mark.parametrize("options", [{}, {"io": "direct"}, {"dtype": "fp32", "buffers": 2}])
def test_each_computes_what_it_should(paths, device, options):
    x = inputs(device)
    expected = [resident_model(path, n, device)(x) for path, n in zip(paths, (N, M), strict=True)]
    a, first = stream(paths[0], N, device)
    b, second = stream(paths[1], M, device, share=first, **options)
    for model, wanted in [(a, 0), (b, 1), (b, 1), (a, 0), (b, 1)]:
        assert torch.equal(model(x), expected[wanted])
    assert first.workspace is second.workspace
    assert second.report.n_late == 2  # once for each change


@pytest.mark.parametrize("closed", [0, 1])
def test_each_may_be_closed_first(paths, device, closed):
    x = inputs(device)
    expected = [resident_model(path, n, device)(x) for path, n in zip(paths, (N, M), strict=True)]
    a, first = stream(paths[0], N, device)
    b, second = stream(paths[1], M, device, share=first)
    models, handles = (a, b), (first, second)
    a(x)
    b(x)
    handles[closed].close()
    for _ in range(2):
        assert torch.equal(models[1 - closed](x), expected[1 - closed])
    with pytest.raises(OptionError, match="is streamed"):
        models[closed](x)
    handles[1 - closed].close()


def test_one_that_nobody_refers_to_is_gone_from_the_budget(paths, device):
    a, first = stream(paths[0], N, device)
    b, second = stream(paths[1], M, device, share=first)
    held = second.workspace.ledger.total()
    del a, first
    gc.collect()
    assert second.workspace.ledger.total().device < held.device
    assert torch.equal(b(inputs(device)), resident_model(paths[1], M, device)(inputs(device)))


def test_limits_count_what_all_hold_and_buffers_once(paths, device):
    a, first = stream(paths[0], N, device)
    b, second = stream(paths[1], M, device, share=first)
    least, block = second.report.device_nbytes, second.report.buffer_nbytes
    alone = stream(paths[1], M, device)[1].report
    buffers = 3 * block
    assert least == first.report.device_nbytes + alone.device_nbytes - buffers
    second.close()
    b, second = stream(paths[1], M, device, share=first, device_memory=least + 2 * block)
    assert len(second.report.streamed) == M - 2
    assert torch.equal(b(inputs(device)), resident_model(paths[1], M, device)(inputs(device)))
    second.close()
    with pytest.raises(DeviceMemoryError, match=f"allow {least} or more"):
        stream(paths[1], M, device, share=first, device_memory=least - 1)
    a(inputs(device))


def test_memory_of_the_host_is_shared_too(paths, device):
    one = stream(paths[0], N, device)[1].report
    nbytes = one.nbytes_mapped + one.nbytes_buffered
    first = stream(paths[0], N, device, host_memory=nbytes + nbytes // N)[1]
    second = stream(paths[1], M, device, share=first, host_memory=nbytes + nbytes // N)[1]
    assert first.report.n_direct == 0
    assert second.report.n_direct == M - 1


def test_everything_fits_and_there_is_nothing_to_share(paths, device):
    first = stream(paths[0], N, device, device_memory="1GB")[1]
    b, second = stream(paths[1], M, device, share=first)
    assert second.report.device_nbytes > first.report.device_nbytes
    assert torch.equal(b(inputs(device)), resident_model(paths[1], M, device)(inputs(device)))


def test_what_cannot_be_shared(paths, tmp_path):
    first = stream(paths[0], N, "cpu")[1]
    with pytest.raises(OptionError, match="share is str"):
        stream(paths[1], M, "cpu", share="first")
    wide = Model(3, 64)
    from safetensors.torch import save_file

    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(OptionError, match="stream the module with the larger blocks first"):
        wan_loader.stream_blocks(wide, tmp_path / "wide.safetensors", device="cpu", share=first)
    first.close()
    with pytest.raises(OptionError, match="are closed"):
        stream(paths[1], M, "cpu", share=first)


def test_a_forward_inside_of_another_s_is_refused_in_another_thread(paths):
    import threading

    a, first = stream(paths[0], N, "cpu")
    b, _second = stream(paths[1], M, "cpu", share=first)
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        go_on.wait(10)

    def run():
        try:
            torch.no_grad()(a)(inputs())
        except Exception as error:
            errors.append(error)

    a.blocks[1].norm.register_forward_hook(wait)
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(OptionError, match="those that share its buffers"):
        b(inputs())
    go_on.set()
    thread.join()
    assert not errors


def test_a_ledger_adds_up():
    ledger = Ledger()
    assert ledger.total() == Held()
    ledger.note("a", Held(1, 2, 3))
    ledger.note("b", Held(10, 20, 30))
    assert ledger.total() == Held(11, 22, 33)
    ledger.strike("a")
    ledger.strike("a")
    assert ledger.total() == Held(10, 20, 30)
