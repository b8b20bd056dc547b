"""A streamed module computes what the resident one does, bit for bit; everything else is a clear error."""

import gc
import os
import sys
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch
from programs import DISTRIBUTED, run
from safetensors.torch import load_file, save_file
from streamed_models import Model, empty_model, inputs, resident_model, save_model
from versions import needs_torch

import wan_loader
from wan_loader import CheckpointError, DeviceMemoryError, KeyMismatchError, LoadCancelledError, OptionError
from wan_loader.streaming import handle
from wan_loader.system.posix import PAGE

N = 7


@pytest.fixture
def path(tmp_path):
    return save_model(tmp_path, N)


@pytest.fixture
def expected(path, device):
    """What the resident module makes of the inputs."""
    with torch.no_grad():
        return resident_model(path, N, device)(inputs(device))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def stream(path, device="cpu", model=None, **options):
    model = model or empty_model(N)
    return model, wan_loader.stream_blocks(model, path, device=device, **options)


def replace_file(path, change=lambda tensor: tensor + 1):
    beside = path.with_suffix(".new")
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, beside)
    os.replace(beside, path)


@pytest.mark.parametrize("buffers", [1, 2, 3, 5, 64])
def test_forwards_equal_those_of_the_resident_module(path, device, expected, buffers):
    model, streamed = stream(path, device, buffers=buffers)
    with streamed:
        for _ in range(3):
            assert torch.equal(model(inputs(device)), expected)
        assert streamed.report.n_late == 0
        assert streamed.report.n_buffers == min(buffers, N)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", torch.float64])
@pytest.mark.parametrize("source", [None, torch.bfloat16])
def test_conversions_equal_those_of_load_into(tmp_path, device, dtype, source):
    path = save_model(tmp_path, N, source)
    resident = resident_model(path, N, device, dtype)
    x = inputs(device, resident.first.weight.dtype)
    model, streamed = stream(path, device, dtype=dtype, buffers=2)
    with streamed:
        for _ in range(2):
            assert torch.equal(model(x), resident(x))


def test_some_tensors_may_stay_fp32(path, device):
    resident = empty_model(N)
    wan_loader.load_into(resident, path, device=device, dtype="bf16", keep_fp32=["norm"])
    model, streamed = stream(path, device, dtype="bf16", keep_fp32=["norm"])
    with streamed:
        assert model.blocks[3].norm.weight.dtype == resident.blocks[3].norm.weight.dtype == torch.float32
        assert model.blocks[3].up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("io", ["auto", "mapped", "direct", "buffered"])
def test_every_way_of_reading_gives_the_same(path, device, expected, io):
    model, streamed = stream(path, device, io=io)
    with streamed:
        assert torch.equal(model(inputs(device)), expected)
        report = streamed.report
    assert report.nbytes_mapped + report.nbytes_direct + report.nbytes_buffered == sum(
        tensor.nbytes for name, tensor in load_file(path).items() if name.startswith("blocks.") and "shift" not in name
    )


def test_what_host_memory_cannot_hold_is_read_from_the_disk_each_time(path, device, expected, monkeypatch):
    monkeypatch.setattr("wan_loader.streaming.source._FIRST_READS_S", 60)  # other tests keep the disk busy
    one = sum(t.nbytes for name, t in load_file(path).items() if name.startswith("blocks.0.") and "shift" not in name)
    model, streamed = stream(path, device, host_memory=3 * one + 5)
    with streamed:
        report = streamed.report
        assert (report.n_direct, report.nbytes_direct) == (4, 4 * one)
        assert report.n_mapped + report.n_buffered == 3
        assert "3 of 7 blocks fit the" in report.reason
        assert report.read_seconds == report.nbytes_direct / report.read_rate
        assert "a forward at" in str(report)
        for _ in range(3):
            assert torch.equal(model(inputs(device)), expected)


def test_what_is_in_the_page_cache_need_not_be_read_from_the_disk(path, device):
    with stream(path, device, host_memory="1GB")[1] as streamed:
        assert streamed.report.n_direct == 0
        assert streamed.report.read_seconds is None


@pytest.mark.gpu
def test_no_more_is_pinned_than_host_memory_allows(path):
    with stream(path, "cuda", host_memory=40_000, pinned_memory=10**9)[1] as streamed:
        assert streamed.report.n_mapped
        assert streamed.report.nbytes_mapped <= 40_000


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [0, 40_000, 10**9])
def test_pages_beyond_the_limit_are_read_each_time(path, pinned):
    with torch.no_grad():
        expected = resident_model(path, N, "cuda")(inputs("cuda"))
    model, streamed = stream(path, "cuda", pinned_memory=pinned)
    with streamed:
        for _ in range(3):
            assert torch.equal(model(inputs("cuda")), expected)
        # whole pages are registered; the limit counts the bytes of tensors
        assert streamed.report.pinned_nbytes <= pinned + 2 * N * PAGE


def test_a_checkpoint_of_torch_is_streamed_too(path, tmp_path, device, expected):
    torch.save(load_file(path), tmp_path / "model.pth")
    model, streamed = stream(tmp_path / "model.pth", device)
    with streamed:
        assert torch.equal(model(inputs(device)), expected)


def test_names_are_mapped(path, tmp_path, device, expected):
    save_file({f"net.{name}": tensor for name, tensor in load_file(path).items()}, tmp_path / "other.safetensors")
    model, streamed = stream(tmp_path / "other.safetensors", device, key_map=lambda name: name.removeprefix("net."))
    with streamed:
        assert torch.equal(model(inputs(device)), expected)


def test_a_full_module_is_streamed_as_an_empty_one(path, device, expected):
    model, streamed = stream(path, device, model=Model(N))
    with streamed:
        assert torch.equal(model(inputs(device)), expected)


def test_a_budget_keeps_blocks_on_the_device(path, device, expected):
    one = stream(path, device)[1]
    least = one.report.device_nbytes
    one.close()
    block = one.report.buffer_nbytes
    model, streamed = stream(path, device, device_memory=least + 2 * block)
    with streamed:
        assert torch.equal(model(inputs(device)), expected)
        assert streamed.report.streamed == tuple(f"blocks.{n}" for n in (1, 2, 4, 5, 6))
        assert streamed.report.device_nbytes <= least + 2 * block
    model, streamed = stream(path, device, device_memory="1GB")
    with streamed:
        assert torch.equal(model(inputs(device)), expected)
        assert streamed.report.streamed == ()
        assert "everything fits" in streamed.report.reason
    with pytest.raises(DeviceMemoryError, match=f"allow {least} or more"):
        stream(path, device, device_memory=least - 1)


def test_what_blocks_share_stays_on_the_device(path, device):
    def tied():
        model = empty_model(N)
        model.blocks[2].norm = model.blocks[1].norm
        return model

    resident = tied()
    wan_loader.load_into(resident, path, device=device, strict=False)
    model, streamed = stream(path, device, model=tied(), strict=False)
    with streamed:
        assert torch.equal(model(inputs(device)), resident(inputs(device)))
        assert type(model.blocks[1].norm.weight) is torch.nn.Parameter
        assert model.blocks[1].norm is model.blocks[2].norm


def test_buffers_of_the_module_stay_and_may_be_written(path, device):
    model, streamed = stream(path, device)
    with streamed:
        model.blocks[3].shift.zero_()
        model(inputs(device))
        assert not model.blocks[3].shift.any()


def test_blocks_may_be_left_out_or_run_in_another_order(path, device):
    resident = resident_model(path, N, device)
    model, streamed = stream(path, device)
    order = [3, 3, 0, 6, 5, 1, 1, 4]
    with streamed:
        for blocks in (order, order[::-1]):
            x = y = inputs(device)
            for number in blocks:
                x = model.blocks[number](x, by=1)
                y = resident.blocks[number](y, by=1)
            assert torch.equal(x, y)
        assert streamed.report.n_late


def test_addresses_and_objects_stay_the_same(path, device):
    model, streamed = stream(path, device)
    seen = {}

    def look(module, args):
        found = [(id(p), p.data_ptr()) for p in module.parameters()]
        assert seen.setdefault(id(module), found) == found

    for block in model.blocks:
        block.register_forward_pre_hook(look)
    with streamed:
        model(inputs(device))
        model(inputs(device))
    assert len({address for found in seen.values() for _, address in found}) == 3 * len(seen[id(model.blocks[0])])


def test_autocast(path, device):
    resident = resident_model(path, N, device)
    model, streamed = stream(path, device)
    with streamed, torch.autocast(device, torch.bfloat16):
        for _ in range(2):
            assert torch.equal(model(inputs(device)), resident(inputs(device)))


def test_inference_mode(path, device, expected):
    with torch.inference_mode():
        model, streamed = stream(path, device, dtype="fp32")
        assert torch.equal(model(inputs(device)), expected)
    assert torch.equal(model(inputs(device)), expected)
    streamed.close()


# what goes wrong


def test_a_failure_in_the_middle_leaves_the_next_forward_right(path, device, expected):
    model, streamed = stream(path, device)
    with streamed:
        for number in (0, 3, N - 1):
            hook = model.blocks[number].norm.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(inputs(device))
            hook.remove()
            assert "AwayParameter" in repr(model.blocks[number].scale)
            assert torch.equal(model(inputs(device)), expected)


def test_ctrl_c_in_the_middle_leaves_the_next_forward_right(path, device, expected):
    def interrupt(*_):
        raise KeyboardInterrupt

    model, streamed = stream(path, device)
    with streamed:
        hook = model.blocks[2].norm.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(inputs(device))
        hook.remove()
        assert torch.equal(model(inputs(device)), expected)


def test_cancel_ends_a_forward(path, device):
    cancel = wan_loader.CancelToken()
    model, streamed = stream(path, device, cancel=cancel)
    with streamed:
        model.blocks[2].register_forward_hook(lambda *_: cancel.cancel())
        with pytest.raises(LoadCancelledError):
            model(inputs(device))


@pytest.mark.parametrize("how", ["replaced", "modified", "removed"])
def test_a_file_that_changes_is_found_by_the_end_of_the_forward(path, device, how):
    model, streamed = stream(path, device)

    def change(*_):
        if how == "replaced":
            replace_file(path)
        elif how == "modified":
            with open(path, "r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"abcd")
        elif path.exists():
            path.unlink()

    with streamed:
        model(inputs(device))
        model.blocks[4].register_forward_hook(change)
        with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced, modified or removed while"):
            model(inputs(device))


def test_a_file_that_is_truncated_is_an_error(path):
    model, streamed = stream(path, io="buffered")  # else what is resident would be views of the file
    with streamed:
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError, match="truncated"):
            model(inputs())


def test_gradients_are_refused(path, device):
    model, streamed = stream(path, device)
    with streamed, torch.enable_grad():
        with pytest.raises(OptionError, match=r"blocks\.0 is streamed, and cannot be trained"):
            model(inputs(device))
        model.requires_grad_(False)
    model = empty_model(N).requires_grad_(False)
    with stream(path, device, model=model)[1], torch.enable_grad():
        model(inputs(device))
        with pytest.raises(OptionError, match="cannot be trained or differentiated"):
            model(inputs(device).requires_grad_())
        with pytest.raises(OptionError, match="cannot be trained or differentiated"):
            model.blocks[1](inputs(device), by=inputs(device).requires_grad_())


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.add_(1),
        lambda p: p.data,
        lambda p: setattr(p, "data", torch.ones_like(p, device="cpu")),
        lambda p: p.copy_(torch.zeros(1)),
        lambda p: p.cpu() + 1,
        lambda p: torch.ones(1, 32) @ p.T,
    ],
)
def test_weights_that_are_not_there_cannot_be_used(path, use):
    model, streamed = stream(path)
    with streamed:
        with pytest.raises(OptionError, match=r"blocks\.1\.up\.weight is streamed"):
            use(model.blocks[1].up.weight)
        with pytest.raises(OptionError, match="is streamed"):
            model.state_dict()
        with pytest.raises(OptionError, match="is streamed"):
            model.half()
        model.to("cpu")  # where it is


def test_weights_that_were_replaced_are_an_error(path):
    model, streamed = stream(path)
    with streamed:
        model.blocks[1].up.weight = torch.nn.Parameter(torch.ones(96, 32))
        with pytest.raises(OptionError, match=r"weight of blocks\.1 was replaced"):
            model(inputs())


def test_a_forward_in_another_thread_is_refused(path):
    model, streamed = stream(path)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(10)

    with streamed:
        hook = model.blocks[1].norm.register_forward_hook(wait)
        with torch.no_grad():
            thread = threading.Thread(target=torch.no_grad()(model), args=(inputs(),))
            thread.start()
            assert inside.wait(10)
            hook.remove()
            with pytest.raises(OptionError, match="running in another thread"):
                model.blocks[0](inputs(), by=1)
            go_on.set()
            thread.join()
        model(inputs())


@pytest.mark.parametrize("blocks", ["layers", "", "first", None])
def test_blocks_that_are_none_are_an_error_that_names_some(path, blocks):
    with pytest.raises(OptionError, match="names no list of modules in the module: pass one of blocks"):
        stream(path, blocks=blocks)


@pytest.mark.parametrize(
    "options",
    [
        {"buffers": 0},
        {"buffers": 65},
        {"device_memory": -1},
        {"device_memory": "much"},
        {"pinned_memory": 1.5},
        {"host_memory": -1},
    ],
)
def test_arguments_that_make_no_sense(path, options):
    with pytest.raises(OptionError):
        stream(path, **options)


def test_a_pickle_that_only_torch_can_read_is_refused(path, tmp_path):
    torch.save(load_file(path), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="is a pickle that only torch can read"):
        stream(tmp_path / "old.pt")


def test_a_checkpoint_that_does_not_fit_leaves_the_module_as_it_was(path):
    model = empty_model(N + 1)
    with pytest.raises(KeyMismatchError, match=r"blocks\.7"):
        wan_loader.stream_blocks(model, path, device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


# the end


def n_files():
    return len(os.listdir("/proc/self/fd"))


def test_close_gives_everything_back(path, device):
    gc.collect()
    files, threads = n_files(), threading.active_count()
    model, streamed = stream(path, device, io="buffered")
    model(inputs(device))
    buffers = [weakref.ref(one.parameter) for block in streamed._blocks for one in block.taken]
    streamed.close()
    streamed.close()
    assert streamed.closed
    assert (n_files(), threading.active_count()) == (files, threads)
    gc.collect()
    assert not any(buffer() is not None for buffer in buffers)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    with pytest.raises(OptionError, match="is streamed"):
        model(inputs(device))
    assert streamed.report.n_fetched == 10


def test_without_a_reference_to_it_the_module_is_enough(path, device, expected):
    gc.collect()
    files = n_files()
    model, _ = stream(path, device)
    gc.collect()
    assert torch.equal(model(inputs(device)), expected)
    del model, _
    gc.collect()
    assert n_files() == files


def test_the_end_may_come_in_a_thread_that_it_ends(path):
    """The garbage collector runs wherever memory is allocated."""
    _, streamed = stream(path)
    ended, seen = threading.Event(), []
    with ExitStack() as resources:
        resources.callback(lambda: (seen.append(threading.current_thread().name), ended.set()))
        thread = threading.Thread(target=handle._give_back, args=(resources,), name=f"{handle.THREAD_NAME}_0")
        thread.start()
        thread.join()
        assert ended.wait(10)
    assert not seen[0].startswith(handle.THREAD_NAME)
    streamed.close()


def test_a_failure_on_the_way_gives_everything_back(path, monkeypatch):
    gc.collect()
    files = n_files()
    monkeypatch.setattr("wan_loader.streaming.schedule.Schedule.start", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream(path)
    assert n_files() == files


def test_the_report_is_printable(path):
    with stream(path)[1] as streamed:
        assert "stream 7 of 7 blocks through 3 buffers" in str(streamed.report)
        assert streamed.report.load.n_tensors == len(load_file(path)) - 7 * 7


# the compiler

COMPILED = """
import sys
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter
from streamed_models import empty_model, inputs, resident_model
import wan_loader

with torch.no_grad():
    expected = resident_model(sys.argv[1])(inputs())
    for how in ("before", "after", "wrapped", "forward"):
        torch._dynamo.reset()
        model, counter = empty_model(), CompileCounter()
        if how == "before":
            for block in model.blocks:
                block.compile(backend=counter)
        with wan_loader.stream_blocks(model, sys.argv[1], device="cpu") as streamed:
            if how == "after":
                for block in model.blocks:
                    block.compile(backend=counter)
            elif how == "wrapped":
                for number, block in enumerate(model.blocks):
                    model.blocks[number] = torch.compile(block, backend=counter)
            elif how == "forward":
                for block in model.blocks:
                    block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
            for _ in range(3):
                assert torch.equal(model(inputs()), expected), how
            assert counter.frame_count == 1, (how, counter.frame_count)
            assert streamed.report.n_late == 0
"""


@needs_torch(2, 5, "a graph for each block")
def test_compiled_blocks_are_one_graph(path):
    done = run("-c", COMPILED, path, modules=DISTRIBUTED, env={"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
