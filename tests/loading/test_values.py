"""The values of a load: request, plan, token, result; and what may be given for what."""

import threading
import time

import pytest

torch = pytest.importorskip("torch")

from loader_cases import KINDS, same, same_dicts, weights, write  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader import CancelToken, LoadRequest, OptionError  # noqa: E402
from wan_loader.engine import pinned_ring  # noqa: E402
from wan_loader.formats import opening  # noqa: E402
from wan_loader.loading.probe import probe  # noqa: E402
from wan_loader.loading.run import collect, run  # noqa: E402
from wan_loader.plan.dtype_policy import DtypePolicy  # noqa: E402
from wan_loader.plan.facts import Facts  # noqa: E402
from wan_loader.plan.plan import make_plan  # noqa: E402


@pytest.fixture
def headers_read(monkeypatch):
    """Paths of the files whose headers were read."""
    paths, plain = [], opening._open_file

    def opened(path, *rest):
        paths.append(path)
        return plain(path, *rest)

    monkeypatch.setattr(opening, "_open_file", opened)
    return paths


# a checkpoint in the place of its path


@pytest.mark.parametrize("kind", KINDS)
def test_an_opened_checkpoint_is_as_good_as_its_path(tmp_path, kind, headers_read):
    path = write(kind, tmp_path, weights(3))
    checkpoint = wan_loader.open_checkpoint(path)
    n_files = len(headers_read)
    same_dicts(wan_loader.load_file(checkpoint), wan_loader.load_file(path))
    assert len(headers_read) == 2 * n_files, "once for the path, and not again for the checkpoint"


def test_headers_are_read_once_whoever_needs_them(tmp_path, headers_read):
    from wan_loader.cli.load import load

    path = write("safetensors", tmp_path, weights(3))
    wan_loader.load_file(path, dtype="bf16", io="buffered")
    assert len(headers_read) == 1
    load(path, device="cpu", verify=True)
    assert len(headers_read) == 2


def test_a_checkpoint_whose_file_has_changed_is_an_error(tmp_path):
    path = write("safetensors", tmp_path, weights(3))
    checkpoint = wan_loader.open_checkpoint(path)
    write("safetensors", tmp_path, weights(4))
    with pytest.raises(wan_loader.CheckpointError, match="load it again"):
        wan_loader.load_file(checkpoint)


def test_another_part_than_the_checkpoint_was_opened_for(tmp_path):
    path = tmp_path / "nested.pth"
    torch.save({"a": weights(1), "b": weights(2)}, path)
    checkpoint = wan_loader.open_checkpoint(path, part="b")
    assert len(wan_loader.load_file(checkpoint, part="b")) == len(wan_loader.load_file(checkpoint)) == 2
    with pytest.raises(OptionError, match="part='a'"):
        wan_loader.load_file(checkpoint, part="a")


def test_a_request_is_checked_when_it_is_made_and_never_changes():
    for wrong in ({"io": "fast"}, {"threads": 0}, {"names": "w"}, {"source": 5}, {"part": 3}):
        with pytest.raises(OptionError):
            LoadRequest(**{"source": "x.safetensors", **wrong})
    with pytest.raises(AttributeError):
        LoadRequest(source="x.safetensors").io = "direct"


# the plan


def planned(path, **options):
    request = LoadRequest(source=path, **options)
    checkpoint = request.open()
    return make_plan(request, checkpoint, probe(checkpoint, request))


def test_a_plan_can_be_carried_out_as_often_as_wanted(tmp_path):
    tensors = weights(5)
    plan = planned(write("safetensors", tmp_path, tensors), policy=DtypePolicy("bfloat16"))
    for _ in range(2):
        result = collect(run(plan))
        result.state.release()
        for name, tensor in tensors.items():
            same(result.tensors[name], tensor.bfloat16())


def test_blocks_are_made_anew_each_time(tmp_path):
    plan = planned(write("safetensors", tmp_path, weights(5)), io="buffered")
    assert list(plan.blocks) == list(plan.blocks) != []


def test_a_plan_says_what_how_why_and_with_how_much_memory(tmp_path, evict):
    path = write("safetensors", tmp_path, weights(5))
    warm = str(planned(path, policy=DtypePolicy("bfloat16")))
    for words in (
        "5 tensors",
        "1 file",
        str(path),
        "cpu, as bfloat16",
        "everything is in the page cache",
        "buffered",
        "slots",
    ):
        assert words in warm
    evict(path)
    assert "500 kB direct" in str(planned(path, policy=DtypePolicy("bfloat16")))
    assert "as in the file" in str(planned(path))
    assert "torch.load" in str(planned(write("legacy pickle", tmp_path, weights(2))))


def test_a_plan_for_a_machine_that_is_not_here(tmp_path):
    request = LoadRequest(source=write("safetensors", tmp_path, weights(5)), device="cuda:0")
    plan = make_plan(request, request.open(), Facts(device="cuda:0", processors=16, memory_limit=1 << 40))
    assert {block.transport.value for block in plan.blocks} == {"direct"}
    assert plan.facts.cuda
    full = Facts(device="cuda:0", processors=16, memory_limit=1 << 40, device_free=10, device_total=20)
    with pytest.raises(wan_loader.DeviceMemoryError, match="10 of 20") as caught:
        make_plan(request, request.open(), full)
    assert caught.value.path == request.open().path


def test_the_opening_of_a_checkpoint_counts_where_it_is_told(tmp_path):
    opening = wan_loader.Recorder()
    with wan_loader.span(opening, "header"):
        checkpoint = wan_loader.open_checkpoint(write("safetensors", tmp_path, weights(5)))
        time.sleep(0.2)
    time.sleep(0.2)  # what comes between does not count
    alone = wan_loader.load(checkpoint, dtype="bf16", observer=wan_loader.Recorder())
    whole = alone.after(opening.spans)
    assert whole.seconds == pytest.approx(alone.seconds + 0.2, abs=0.05)
    assert {p.name: p.busy_s for p in whole.report.phases}["header"] == pytest.approx(0.2, abs=0.05)
    assert whole.report.bottleneck.phase == "header"
    assert whole.spans[1:] == alone.spans


# in the order of arrival


@pytest.mark.parametrize("options", [{"io": "buffered"}, {"policy": DtypePolicy("bfloat16")}, {}])
def test_a_run_yields_each_tensor_once_as_it_arrives(tmp_path, options):
    tensors = {**weights(5), "empty": torch.empty(0, 3)}
    plan = planned(write("safetensors", tmp_path, tensors), **options)
    arrivals, seen, dtype = run(plan), {}, plan.request.policy.dtype
    while True:
        try:
            arrived = next(arrivals)
        except StopIteration as end:
            result = end.value
            break
        assert not arrived.keys() & seen.keys()
        for name, tensor in arrived.items():
            same(tensor, tensors[name].bfloat16() if dtype else tensors[name])
        seen |= arrived
    result.state.release()
    assert seen.keys() == result.tensors.keys() == tensors.keys()
    assert list(result.tensors) == [facts.name for facts in plan.tensors]


def test_closing_a_run_early_stops_it(tmp_path, open_files):
    """Wherever it is: nothing stays open, and the ring is given back, also when the last bytes have just arrived."""
    path = write("safetensors", tmp_path, {**weights(5), "empty": torch.empty(0, 3)})
    before, plan = open_files(path), planned(path, policy=DtypePolicy("bfloat16"))
    n_yields = len(list(run(plan)))
    assert n_yields > 1
    pinned_ring._OPEN.clear()  # of that run, which nobody released
    for taken in range(1, n_yields + 1):
        arrivals = run(plan)
        for _ in range(taken):
            next(arrivals)
        arrivals.close()
        assert open_files(path) == before
        assert not pinned_ring._OPEN


# stop is not see


class Failing:
    def __init__(self):
        self.told = 0

    def record(self, span):
        self.told += 1
        raise RuntimeError("the observer is broken")


def test_an_observer_that_raises_is_reported_not_obeyed(tmp_path):
    tensors, observer = weights(5), Failing()
    loaded = wan_loader.load(write("safetensors", tmp_path, tensors), dtype="bf16", observer=observer)
    assert observer.told == 1, "it is told no more"
    assert any("the observer is broken" in warning for warning in loaded.report.warnings)
    assert {phase.name for phase in loaded.report.phases} >= {"header", "read", "cast"}, "the report needs it not"
    assert loaded.tensors.keys() == tensors.keys()


def test_without_an_observer_only_counters_are_kept(tmp_path):
    loaded = wan_loader.load(write("safetensors", tmp_path, weights(5)), io="buffered")
    assert loaded.spans == ()
    assert loaded.report.phases == ()
    assert loaded.report.io.nbytes_buffered == loaded.report.nbytes_file > 0


@pytest.mark.parametrize("error", [None, OSError("enough")])
def test_a_token_that_was_cancelled_stops_a_load(tmp_path, error):
    token = CancelToken()
    assert not token.cancelled
    token.cancel(error)
    token.cancel(KeyError("too late"))
    assert token.cancelled
    with pytest.raises(type(error) if error else wan_loader.LoadCancelledError):
        wan_loader.load_file(write("safetensors", tmp_path, weights(2)), cancel=token)


def test_a_load_is_stopped_from_another_thread(tmp_path, open_files):
    """Wherever it is just then; nothing stays open."""
    path, token, begun = write("safetensors", tmp_path, weights(5)), CancelToken(), threading.Event()
    before = open_files(path)

    def cancel():
        begun.wait()
        token.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()

    def load_for_ever():
        while True:
            wan_loader.load_file(path, dtype="bf16", cancel=token)
            begun.set()

    with pytest.raises(wan_loader.LoadCancelledError):
        load_for_ever()
    thread.join()
    assert open_files(path) == before


def test_a_token_must_be_one(tmp_path):
    with pytest.raises(OptionError, match="CancelToken"):
        wan_loader.load_file(write("safetensors", tmp_path, weights(1)), cancel=threading.Event())


# one way to bind


def test_bind_puts_in_the_very_tensors(tmp_path):
    with wan_loader.empty_weights():
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    tensors = {
        f"model.{name}": torch.randn(tuple(value.shape)) if value.is_floating_point() else torch.tensor(1)
        for name, value in module.state_dict().items()
    }
    notes = wan_loader.bind(module, tensors, key_map=lambda name: name.removeprefix("model."))
    assert notes == []
    for name, value in module.state_dict().items():
        assert value.data_ptr() == tensors[f"model.{name}"].data_ptr()
    module.eval()(torch.randn(2, 3))


def test_bind_says_what_does_not_fit():
    module = torch.nn.Linear(3, 4)
    weight = module.weight
    with pytest.raises(wan_loader.KeyMismatchError) as caught:
        wan_loader.bind(module, {"weight": torch.ones(4, 3), "other": torch.ones(1)})
    assert (caught.value.missing, caught.value.unexpected) == (("bias",), ("other",))
    assert module.weight is weight
    notes = wan_loader.bind(module, {"weight": torch.ones(4, 3), "other": torch.ones(1)}, strict=False)
    assert any("bias" in note for note in notes)
    assert torch.equal(module.weight, torch.ones(4, 3))
