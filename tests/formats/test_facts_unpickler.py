"""The pickle machine: inert values only, the same as torch gives, within bounds of memory and time."""

import _pickle
import contextlib
import pickle
import struct
import sys
import time
import tracemalloc
import warnings
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
from zips import Archive, Entry

from wan_loader import CheckpointError, load_file, open_checkpoint
from wan_loader.formats import facts_unpickler
from wan_loader.formats.facts_unpickler import read_pickle
from wan_loader.formats.pickle_values import PickleError
from wan_loader.verify import verify

BITS = struct.pack("<4f", 1, 2, 3, 4)


# Pickles opcode by opcode


def text(value):
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    return b"J" + struct.pack("<i", value)


def tup(*values):
    return b"(" + b"".join(values) + b"t"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(module, attribute, *arguments):
    return name(module, attribute) + tup(*arguments) + b"R"


def storage(kind="FloatStorage", key="0", numel=4):
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    return tup(text("storage"), name(module, kind), text(key), text("cpu"), number(numel)) + b"Q"


ORDERED = name("collections", "OrderedDict") + b")R"


def tensor(kind="FloatStorage", key="0", numel=4, shape=(4,), stride=(1,), *, grad=b"\x89", hooks=ORDERED):
    sizes = (tup(*map(number, shape)), tup(*map(number, stride)))
    return call("torch._utils", "_rebuild_tensor_v2", storage(kind, key, numel), number(0), *sizes, grad, hooks)


def dictionary(**values):
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def write(path, body, storages=None):
    data = b"\x80\x02" + body + b"."
    storages = {"0": BITS} if storages is None else storages
    entries = [Entry(b"x/data.pkl", data), *(Entry(f"x/data/{key}".encode(), value) for key, value in storages.items())]
    path.write_bytes(Archive([*entries, Entry(b"x/version", b"3\n")]).write())
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


# Nothing of ours can be changed

T = tensor()
POISONS = {
    "keyword defaults of a function": name("torch._utils", "_rebuild_tensor_v2")
    + tup(b"N", dictionary(__kwdefaults__=dictionary(dtype=text("int32"))))
    + b"b",
    "the class of a tensor": T + dictionary(__class__=text("x")) + b"b",
    "the fields of a tensor": T + tup(text("x")) + b"b",
    "the fields of a storage": storage() + tup(text("0"), text("16"), text("float32")) + b"b",
    "slots of an OrderedDict": ORDERED + tup(b"N", dictionary(__class__=text("x"))) + b"b",
    "the state of a dtype": name("torch", "float32") + b"}b",
    "the state of a plain dict": b"}}b",
    "items of a tensor": T + b"(" + text("dtype") + text("int32") + b"u",
    "appended to a tensor": T + b"(Ne",
    "a call of a tensor": T + b")R",
    "a call of a text": text("x") + b")R",
    "a new tensor": name("torch._utils", "_rebuild_tensor_v2") + b")\x81",
}


@pytest.mark.parametrize("case", POISONS)
def test_a_hostile_pickle_changes_nothing(path, tmp_path, case):
    good = write(tmp_path / "good.pth", dictionary(w=T))
    write(path, dictionary(w=POISONS[case]))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)
    loaded = load_file(good)["w"]
    assert (loaded.dtype, loaded.tolist()) == (torch.float32, [1, 2, 3, 4])


def test_attributes_of_an_ordered_dict_are_dropped(path):
    attributes = dictionary(_metadata=b"}", items=text("x"), __class__=text("y"))
    write(path, ORDERED + b"(" + text("w") + T + b"u" + attributes + b"b")
    assert load_file(path)["w"].tolist() == [1, 2, 3, 4]


# Odd pickles

REFUSED = {
    "an integer key of 6000 digits": b"}" + b"\x8b" + struct.pack("<i", 2600) + b"\1" * 2600 + T + b"s",
    "an integer key of 600 digits": b"}" + b"\x8a\xfa" + b"\1" * 250 + T + b"s",
    "a name of a surrogate": dictionary(**{"\ud800": T}),
    "a key of a storage with a zero": dictionary(w=tensor(key="0\0x")),
    "a key of a storage that is a surrogate": dictionary(w=tensor(key="\ud800")),
    "a nested tuple as a key": b"}" + b")" + b"\x85" * 4000 + T + b"s",
    "a tower of tuples as a key": b"}" + b")q\0" + b"h\0\x86q\0" * 60 + T + b"s",
    "a set of a tower": dictionary(w=call("__builtin__", "set", b"](" + b")q\0" + b"h\0h\0\x86q\0" * 60 + b"e")),
    "a storage of a list": dictionary(
        w=call("torch._utils", "_rebuild_tensor_v2", b"]", number(0), b")", b")", b"\x89", ORDERED)
    ),
    "gradients of integers": dictionary(w=tensor("IntStorage", grad=b"\x88")),
    "gradients that are a number": dictionary(w=tensor(grad=number(1))),
    "hooks": dictionary(w=tensor(hooks=dictionary(a=b"N"))),
    "too few arguments": dictionary(w=call("torch._utils", "_rebuild_tensor_v2", storage())),
    "a dict of no pairs": call("collections", "OrderedDict", b"](" + tup(text("w"), T, T) + b"e"),
    "a dict of a text": call("collections", "OrderedDict", text("ab")),
    "a dict with a tower as a key": call(
        "collections", "OrderedDict", b"](" + b")q\0" + b"h\0\x86q\0" * 60 + T + b"\x86e"
    ),
    "too many arguments": dictionary(w=call("torch._utils", "_rebuild_tensor_v2", *[b"N"] * 9)),
    "another tensor than the one asked for": b"}" + text("w") + tensor(shape=(5,)) + b"s" + text("w") + T + b"s",
    "gradients before there are values": dictionary(
        w=call(
            "torch._utils",
            "_rebuild_tensor_v3",
            *(storage(), number(0), tup(number(4)), tup(number(1)), b"\x88", ORDERED, name("torch", "float32")),
        )
    ),
    "a key without a value": b"}(" + text("w") + b"u",
    "a memo of nothing": b"}" + text("w") + b"h\7s",
    "bytes in an odd encoding": dictionary(w=T, x=call("_codecs", "encode", text("x"), text("zip"))),
    "a bytearray of a terabyte": dictionary(w=T, x=call("__builtin__", "bytearray", b"\x8a\x06" + bytes(5) + b"\1")),
    "marks without an end": b"(" * 5000,
    "a frame beyond the end": b"\x95" + struct.pack("<Q", 1 << 60),
    "an instance": dictionary(w=b"(ios\nsystem\n"),
    "text opcodes": dictionary(w=b"I7\n"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_odd_pickle_is_refused_in_a_few_words(path, case):
    write(path, REFUSED[case])
    start = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)
    assert time.thread_time() - start < 5
    assert len(str(caught.value)) < 1000


AS_TORCH = {
    "the first dtype of a storage": dictionary(a=tensor("IntStorage"), b=T),
    "the first size of a storage": dictionary(a=T, b=tensor(numel=2, shape=(2,))),
    "untyped": dictionary(w=tensor("UntypedStorage", numel=16, shape=(16,))),
    "hooks are none": dictionary(w=tensor(hooks=b"N")),
    "a parameter of a parameter": dictionary(
        w=call(
            "torch._utils",
            "_rebuild_parameter",
            call("torch._utils", "_rebuild_parameter", T, b"\x88", ORDERED),
            b"\x89",
            ORDERED,
        )
    ),
    "a name twice": b"}(" + text("w") + T + text("w") + tensor(shape=(2,)) + b"u",
    "names of any kind": dictionary(**{"": T, "a\0b": T, "ü": T}),
    "more after the end": dictionary(w=T) + b"." + b"garbage",
    "a dict as Python 2 writes it": call(
        "collections", "OrderedDict", b"](" + tup(text("v"), T) + b"]" + text("w") + b"a" + T + b"ae"
    ),
    "a list as shape": dictionary(w=T.replace(tup(number(4)), b"](" + number(4) + b"e")),
    "an empty view far outside": dictionary(w=tensor(shape=(0,), stride=(100,))),
}


@pytest.mark.parametrize("case", AS_TORCH)
def test_odd_pickles_that_torch_takes_give_the_same(path, case):
    write(path, AS_TORCH[case])
    loaded, expected = load_file(path), torch.load(path, weights_only=True)
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert loaded[key].dtype == value.dtype
        assert loaded[key].tolist() == value.tolist()


def test_empty_storages_of_one_key_have_their_own_dtypes(path):
    empty = {"numel": 0, "shape": (0,)}
    write(path, dictionary(a=tensor("IntStorage", **empty), b=tensor("DoubleStorage", **empty)), {"0": b""})
    assert [t.dtype for t in load_file(path).values()] == [t.dtype for t in torch.load(path).values()]


def test_plain_values_beside_a_part_need_no_torch(path):
    beside = {
        "epoch": 3,
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "flags": [True, None, 2**40, -1],
        "bytes": b"\x00\xff",
        "array": bytearray(b"xy"),
        "names": {"a", "b"},
        "z": 1 + 2j,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda:1"),
        "dtype": torch.bfloat16,
        "milestones": Counter([3, 3, 5]),
        "by number": {0: {"step": torch.ones(1)}, (1, "x"): None},
        "by tuple": {("w", (2, (3,))): 1, tuple(range(40)): 2, (): {("v", ((),))}},
    }
    torch.save({"state_dict": OrderedDict(w=torch.arange(3)), **beside}, path)
    checkpoint = open_checkpoint(path, part="state_dict")
    assert checkpoint.format == "torch-zip"
    assert checkpoint.names == ("w",)


def test_a_numpy_scalar_is_named(path):
    torch.save({"w": torch.ones(2), "loss": numpy.float64(1.5)}, path)
    with pytest.raises(CheckpointError, match="numpy"):
        load_file(path)


def test_a_default_dict_beside_the_weights_is_not_called_damage(path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "losses": defaultdict(list, {"train": [1.5]})}, path)
    with pytest.raises(CheckpointError, match=r"collections\.defaultdict.*weights_only=False"):
        load_file(path, part="state_dict")


def odd_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "a sparse coo tensor": torch.eye(3).to_sparse(),
            "a sparse csr tensor": torch.eye(3).to_sparse_csr(),
            "a quantised tensor": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "a nested tensor": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            "a meta tensor": torch.empty(2, device="meta"),
        }


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_tensors_that_are_not_dense_are_named(path, options):
    for kind, odd in odd_tensors().items():
        if kind == "a nested tensor" and options:
            continue  # torch cannot read those itself
        torch.save({"w": torch.ones(2), "odd": odd}, path, **options)
        for read in (open_checkpoint, load_file):
            with pytest.raises(CheckpointError, match=rf"'odd' is {kind}"):
                read(path)


def test_one_element_with_an_odd_stride_is_verified(path):
    torch.save({"w": torch.arange(4.0).as_strided((1, 1), (1000, 7), 2)}, path)
    loaded = load_file(path)
    assert (loaded["w"].stride(), loaded["w"].tolist()) == ((1000, 7), [[2]])
    assert verify(path, loaded) == 1
    with pytest.raises(CheckpointError) as caught:
        verify(path, {"w": torch.zeros(1, 1)})
    assert caught.value.tensor == "w"


# Legacy files


class Python2(_pickle.Pickler):
    """Writes an OrderedDict as Python 2 does, in which many models of old were saved."""

    def reducer_override(self, value):
        if type(value) is not OrderedDict:
            return NotImplemented
        return OrderedDict, ([[key, item] for key, item in value.items()],), vars(value) or None


def test_a_file_of_python_2(path):
    state = torch.nn.BatchNorm1d(3).state_dict()
    python2 = SimpleNamespace(
        Pickler=Python2, dump=lambda value, file, protocol: Python2(file, protocol).dump(value), __name__="pickle"
    )
    torch.save(state, path, pickle_module=python2, _use_new_zipfile_serialization=False)
    loaded = load_file(path)
    assert list(loaded) == list(torch.load(path)) == list(state)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_whole_module_in_a_legacy_file_is_not_called_damage(path):
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch\.nn.*Linear.*weights_only=False"):
        load_file(path)


def test_a_legacy_file_without_the_bytes_of_a_storage_is_refused(path):
    """Torch leaves such a tensor uninitialised."""
    torch.save({"w": torch.ones(2), "v": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    start = content.rindex(b"\x80\x02]")
    keys = pickle.loads(content[start:])
    end = start + len(pickle.dumps(keys, 2))
    path.write_bytes(content[:start] + pickle.dumps(keys[:1], 2) + content[end : end + 8 + 8])
    with pytest.raises(CheckpointError, match="does not hold"):
        load_file(path)


@pytest.fixture
def small_bounds(monkeypatch):
    """A base of 1 MiB in place of 60 MiB, and of 1000 steps, so that small pickles reach them."""
    monkeypatch.setattr(facts_unpickler, "_BASE_COST", 1 << 20)
    monkeypatch.setattr(facts_unpickler, "_BASE_STEPS", 1000)
    monkeypatch.setattr(facts_unpickler, "_STEPS_AT_A_TIME", 100)


def test_a_legacy_pickle_is_bounded(path, small_bounds):
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    state = content.index(b"\x80\x02}", 60)
    path.write_bytes(content[:state] + b"\x80\x02" + b"]" * (1 << 16) + b".")
    with pytest.raises(CheckpointError, match=r"memory|steps"):
        open_checkpoint(path)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_of_another_program_is_named(path, protocol):
    path.write_bytes(pickle.dumps({"model": {"w": numpy.ones(2)}}, protocol))
    with pytest.raises(CheckpointError, match=r"not one of torch\.save.*pickle\.load"):
        load_file(path)


# Memory and time


@pytest.mark.parametrize(
    "repeated", [b"]", b"}", b"]\x94", b"(t\x85", b"(", b"K\1\x85", b"X\2\0\0\0xy", b"N", b"ctorch\nSize\n)R"], ids=repr
)
def test_memory_is_bounded_by_the_length(monkeypatch, repeated):
    monkeypatch.setattr(facts_unpickler, "_BASE_COST", 1 << 20)
    data = b"\x80\x02" + repeated * ((1 << 16) // len(repeated)) + b"."
    tracemalloc.start()
    try:
        with contextlib.suppress(PickleError):
            read_pickle(data, lambda pid: pid)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (5 << 20) + 8 * len(data)


def test_brackets_are_refused_before_they_take_much(monkeypatch):
    monkeypatch.setattr(facts_unpickler, "_BASE_COST", 1 << 20)
    with pytest.raises(PickleError, match="memory"):
        read_pickle(b"]" * (1 << 16), lambda pid: pid)


def test_a_list_is_not_copied_again_and_again(monkeypatch):
    monkeypatch.setattr(facts_unpickler, "_BASE_COST", 1 << 20)
    data = b"ctorch\nSize\nq\0(" + b"K\1" * 10_000 + b"tq\1" + b"h\0h\1\x85R" * 10_000 + b"."
    start = time.thread_time()
    with pytest.raises(PickleError, match="memory"):
        read_pickle(data, lambda pid: pid)
    assert time.thread_time() - start < 1


def test_steps_are_counted(small_bounds):
    with pytest.raises(PickleError, match="steps"):
        read_pickle(b"\x80\x02" * 10_000 + b"N.", lambda pid: pid)
