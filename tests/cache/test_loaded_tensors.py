"""Weights for an entry: what was loaded, as long as it is what was loaded."""

import gc
from types import SimpleNamespace

import hypothesis
import pytest
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from wan_loader.cache import loaded_tensors  # noqa: E402
from wan_loader.cache.loaded_tensors import SEGMENT_BYTES, LoadedTensors, batches, segments_of  # noqa: E402
from wan_loader.cache.outline import CachedTensor  # noqa: E402
from wan_loader.formats.checkpoint_facts import TensorFacts, contiguous_strides  # noqa: E402

MiB = 1 << 20


def cached(name, shape, dtype="bfloat16", source="float32"):
    return CachedTensor(name, dtype, TensorFacts(name, source, shape, 0, contiguous_strides(shape)))


def noted(tensors, entry):
    loaded = LoadedTensors()
    loaded.note(SimpleNamespace(tensors=entry), tensors)
    return loaded


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 5 * SEGMENT_BYTES // 2), st.sampled_from(["bool", "bfloat16", "float32", "complex64"]))
def test_parts_cover_a_tensor_once(count, dtype):
    tensor = cached("x", (count,), dtype)
    position = 0
    for segment in segments_of(tensor):
        assert segment.start == position
        assert 0 < segment.nbytes <= SEGMENT_BYTES
        position += segment.count
    assert position == count


def test_batches_keep_the_order_and_the_size():
    big = cached("big", (MiB, 1))
    entry = [cached("a", (7,)), big, cached("b", (3,)), cached("c", (SEGMENT_BYTES // 2 - 2,)), cached("d", (9,))]
    loaded = noted({"big": torch.zeros(MiB, 1, dtype=torch.bfloat16)}, entry)
    segments = [p for t in entry for p in segments_of(t)]
    made = list(batches(segments, loaded))
    assert [p for batch in made for p in batch] == segments
    assert [[p.tensor.name for p in batch] for batch in made] == [["a"], ["big"], ["b"], ["c"], ["d"]] or [
        [p.tensor.name for p in batch] for batch in made
    ] == [["a"], ["big"], ["b", "c"], ["d"]]
    assert all(sum(p.nbytes for p in batch) <= SEGMENT_BYTES for batch in made)


def test_what_is_worth_remembering(device):
    big = torch.randn(MiB, device=device).bfloat16()
    entry = [
        cached("big", (MiB,)),
        cached("small", (9,)),
        cached("view", (MiB,)),
        cached("strided", (1024, 1024)),
        cached("as in the file", (MiB,), "float32"),
        cached("of another dtype", (MiB,)),
        cached("not loaded", (MiB,)),
    ]
    tensors = {
        "big": big,
        "small": torch.zeros(9).bfloat16(),
        "view": torch.zeros(MiB + 4, device=device).bfloat16()[4:],
        "strided": torch.zeros(1024, 1024, device=device).bfloat16().t(),
        "as in the file": torch.zeros(MiB, device=device),
        "of another dtype": big.half(),
    }
    loaded = noted(tensors, entry)
    known = {t.name for t in entry if loaded.knows(next(segments_of(t)))}
    assert known == ({"big"} if device == "cpu" else {"big", "as in the file"})


def test_nothing_is_kept_alive(device):
    tensor = torch.randn(MiB, device=device).bfloat16()
    loaded = noted({"x": tensor}, [cached("x", (MiB,))])
    storage = loaded_tensors.weakref.ref(tensor.untyped_storage())
    del tensor
    gc.collect()
    assert storage() is None
    assert loaded.take(next(segments_of(next(iter(loaded._storages))))) is None


def taken(tensor, loaded, entry):
    segments = []
    for segment in segments_of(entry):
        words = loaded.take(segment)
        if words is None:
            return None
        segments.append(words.clone().view(torch.uint8))  # valid until the next segment is taken
    return torch.cat(segments).view(tensor.dtype)


@pytest.mark.parametrize("shape", [(MiB,), (1024, 1025), (SEGMENT_BYTES // 2 + 4 * 509,)])
def test_unchanged_is_taken_bit_for_bit(device, shape):
    tensor = torch.randn(shape, device=device).bfloat16()
    entry = cached("x", shape)
    loaded = noted({"x": tensor}, [entry])
    assert torch.equal(taken(tensor, loaded, entry), tensor.reshape(-1).cpu())
    parameter = torch.nn.Parameter(tensor)  # another owner of the same memory
    del tensor
    assert taken(parameter, loaded, entry) is not None


CHANGES = {
    "add": lambda t: t.add_(1),
    "mul": lambda t: t.mul_(2),
    "neg": lambda t: t.neg_(),
    "zero": lambda t: t.zero_(),
    "abs": lambda t: t.abs_(),
    "clamp": lambda t: t.clamp_(-1, 1),
    "first": lambda t: t.view(-1)[:1].neg_(),
    "last": lambda t: t.view(-1)[-1:].neg_(),
    "flip": lambda t: t.copy_(t.flip(0).clone()),
    "flip columns": lambda t: t.copy_(t.flip(1).clone()),
    "sort": lambda t: t.copy_(t.sort(0).values),
    "roll": lambda t: t.copy_(t.roll(1, 0).clone()),
    "roll by 509": lambda t: t.copy_(t.roll(509, 0).clone()),
    "roll by 1021": lambda t: t.copy_(t.roll(1021, 0).clone()),
    "swap rows": lambda t: swap(t, 0, 1),
    "swap rows 509 apart": lambda t: swap(t, 5, 5 + 509),
    "swap rows 1021 apart": lambda t: swap(t, 5, 5 + 1021),
    "swap words 509 apart": lambda t: swap(t.view(-1, 8 // t.itemsize), 7, 7 + 509),
    "heads": lambda t: t.copy_(t.view(16, -1, t.shape[1]).flip(0).reshape(t.shape).clone()),
    "rotary halves": lambda t: t.copy_(t.view(-1, 8, 2, t.shape[1]).transpose(1, 2).reshape(t.shape).clone()),
    "transposed bits": lambda t: t.copy_(t.view(-1, 2048).t().reshape(t.shape).clone()),
    "negated column": lambda t: t[:, 3].neg_(),
    "negated every fourth": lambda t: t.view(-1)[3::4].neg_(),
    "normalised": lambda t: t.div_(t.float().norm().to(t.dtype)),
    "lora": lambda t: t.add_((torch.ones(t.shape[0], 1) @ torch.ones(1, t.shape[1]) * 0.01).to(t)),
}


def swap(tensor, i, j):
    tensor[[i, j]] = tensor[[j, i]].clone()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(device, change, dtype):
    torch.manual_seed(4)
    tensor = torch.randn(2048, 512, device=device).to(getattr(torch, dtype))
    entry = cached("x", tuple(tensor.shape), dtype, "float16")
    loaded = noted({"x": tensor}, [entry])
    CHANGES[change](tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()  # until the change has run, what was loaded is still there to be taken
    assert taken(tensor, loaded, entry) is None


@pytest.mark.parametrize("nbytes", [0, 8, MiB, 3 * MiB])
@pytest.mark.parametrize("fill", [0, 1])
def test_resized(nbytes, fill):
    tensor = torch.full((MiB,), fill, dtype=torch.bfloat16)
    entry = cached("x", (MiB,))
    loaded = noted({"x": tensor}, [entry])
    tensor.untyped_storage().resize_(nbytes)
    assert taken(tensor, loaded, entry) is None or nbytes == 3 * MiB


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.data())
def test_any_two_blocks_swapped_are_seen(data):
    """Of random content: whatever the distance and the length, up to where rows of 4 MB meet."""
    torch.manual_seed(6)
    words = torch.randint(-(2**62), 2**62, (300_000,))
    before = loaded_tensors.fingerprint(words)
    length = data.draw(st.integers(1, 2000))
    i = data.draw(st.integers(0, 140_000))
    j = data.draw(st.one_of(st.integers(i + length, 290_000), st.integers(4, 200).map(lambda n: i + 509 * n + 2036)))
    first = words[i : i + length].clone()
    words[i : i + length] = words[j : j + length]
    words[j : j + length] = first
    assert not loaded_tensors._same(loaded_tensors.fingerprint(words), before)


def test_no_memory_for_a_fingerprint_is_no_error(monkeypatch):
    def full(_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(loaded_tensors, "fingerprint", full)
    entry = cached("x", (MiB,))
    loaded = noted({"x": torch.zeros(MiB, dtype=torch.bfloat16)}, [entry])
    assert not loaded.knows(next(segments_of(entry)))
