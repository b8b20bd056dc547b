"""What callers pass by mistake: right, or one error of ours that says what to pass. Nothing is read for it."""

import io
import os
from pathlib import Path

import numpy
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

import wan_loader  # noqa: E402
import wan_pipeline  # noqa: E402
from wan_loader import OptionError, WanLoaderError  # noqa: E402
from wan_loader.arguments import checked_slices  # noqa: E402


@pytest.fixture
def path(tmp_path):
    save_file({"a": torch.ones(2), "b.norm2.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def fill(path, **options):
    return wan_loader.load_into(torch.nn.Linear(1, 1), path, device="cpu", strict=False, **options)


def keep(path, **options):
    return wan_loader.keep(path, "cpu", **options)


TAKE_PATHS = [
    keep,
    wan_loader.load,
    wan_loader.load_file,
    wan_loader.iter_file,
    wan_loader.open_file,
    fill,
    wan_loader.open_checkpoint,
    wan_loader.prewarm,
]
LOADS = [wan_loader.load_file, wan_loader.load, fill]


class NamedByBytes:
    def __fspath__(self):
        return b"model.safetensors"


NO_PATHS = {
    "None": (None, "path is None: pass the path of a checkpoint: a str, a pathlib.Path, or a list of them"),
    "number": (7, "path is 7: pass the path"),
    "flag": (True, "path is True: pass the path"),
    "bytes": (b"model.safetensors", "path is of type bytes: pass the path"),
    "bytearray": (bytearray(b"model"), "path is of type bytearray: pass the path"),
    "PathLike of bytes": (NamedByBytes(), "path is of type NamedByBytes: pass the path"),
    "state dict": ({"a": torch.ones(1)}, "path is of type dict: pass the path"),
    "tensor": (torch.ones(()), "path is of type Tensor: pass the path"),
    "tensor of several": (torch.ones(2), "an item of the list of paths is of type Tensor: pass a path"),
    "nothing": ("", "path is empty: pass the path"),
    "a character that no path has": ("a\0b", r"path is 'a\x00b': pass the path"),
    "BytesIO": (io.BytesIO(b"x\ny"), "path is an open BytesIO: weights are read from files, so pass the path"),
    "list with bytes": ([b"a.safetensors"], "an item of the list of paths is of type bytes"),
    "list with None": (["a.safetensors", None], "an item of the list of paths is None"),
    "list of lists": ([["a.safetensors"]], "an item of the list of paths is of type list"),
}


@pytest.mark.parametrize("call", TAKE_PATHS, ids=lambda call: call.__name__)
@pytest.mark.parametrize(("given", "message"), NO_PATHS.values(), ids=NO_PATHS)
def test_what_is_no_path_is_told_so(call, given, message):
    with pytest.raises(OptionError) as error:
        call(given)
    reason, _, remedy = message.partition(": ")
    assert error.value.reason == reason
    assert error.value.remedy.startswith(remedy)


@pytest.mark.parametrize("call", TAKE_PATHS, ids=lambda call: call.__name__)
def test_an_open_file_is_told_where_its_path_is(call, path):
    with open(path, "rb") as file, pytest.raises(OptionError, match=r"open BufferedReader: pass its path, .* \.name"):
        call(file)
    with open(path, "rb") as file, pytest.raises(OptionError, match=r"an item of the list .* open BufferedReader"):
        call([file])


def test_every_kind_of_path_is_one(path):
    kinds = [path, str(path), [path], (str(path),), iter([path]), Path(os.fspath(path)), numpy.array([str(path)])]
    assert all(wan_loader.load_file(kind)["a"].tolist() == [1, 1] for kind in kinds)


@pytest.mark.parametrize("load", [wan_loader.load_file, wan_loader.load], ids=lambda call: call.__name__)
def test_the_device_is_the_second_argument(path, load):
    loaded = load(path, "cpu")
    assert getattr(loaded, "tensors", loaded)["a"].device.type == "cpu"
    with pytest.raises(wan_loader.DeviceError, match="'nonsense' is not a device"):
        load(path, "nonsense")
    with pytest.raises(TypeError):
        load(path, "cpu", "bf16")


MISTAKES = {
    "letters to keep": ({"keep_fp32": "norm2", "dtype": "bf16"}, r"keep_fp32=\['norm2'\]"),
    "bytes to keep": ({"keep_fp32": b"norm2"}, "keep_fp32 is of type bytes: pass a list of strings"),
    "dict to keep": ({"keep_fp32": {"norm2": True}}, "keep_fp32 is of type dict: pass a list of strings"),
    "numbers to keep": ({"keep_fp32": [2]}, "keep_fp32 holds 2: every item is a str"),
    "one thing to keep": ({"keep_fp32": 2}, "keep_fp32 is 2: pass a list of strings"),
    "verify without cache": ({"verify": True}, "verify without the cache: pass cache=True"),
    "directory without cache": ({"cache_dir": "there"}, "cache_dir without the cache: pass cache=True"),
    "both without cache": ({"cache_dir": "there", "verify": True}, "cache_dir and verify without the cache"),
    "a text as flag": ({"cache": "no"}, "cache is the str 'no': pass True or False"),
    "a text as verify": ({"cache": True, "verify": "no"}, "verify is the str 'no': pass True or False"),
    "a directory of bytes": ({"cache": True, "cache_dir": b"there"}, "cache_dir is of type bytes: pass a directory"),
    "no directory": ({"cache": True, "cache_dir": ""}, "cache_dir is empty"),
    "threads as flag": ({"threads": True}, "threads=True: use 1 to 64"),
    "half a thread": ({"threads": 2.5}, "threads=2.5: use 1 to 64"),
    "threads as text": ({"threads": "4"}, "threads='4': use 1 to 64"),
    "no thread": ({"threads": 0}, "threads=0: use 1 to 64"),
    "no way": ({"io": None}, "io=None: use one of auto"),
    "a list of ways": ({"io": ["auto"]}, "use one of auto"),
    "integers": ({"dtype": torch.int8}, "unknown dtype 'int8'"),
    "no name of a dtype": ({"dtype": "bf17"}, "unknown dtype 'bf17'"),
    "Python's float": ({"dtype": float}, "dtype is of type type: pass a torch.dtype"),
    "a dtype for each part": ({"dtype": {"a": "bf16"}}, "dtype is of type dict"),
    "no observer": ({"observer": print}, r"observer is .*: pass an object with a method record\(span\)"),
    "no group": ({"group": -100}, "group is -100: pass a process group"),
}


@pytest.mark.parametrize("load", LOADS, ids=lambda call: call.__name__)
@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_options_that_make_no_sense(path, load, options, message):
    with pytest.raises(OptionError, match=message):
        load(path, **options)


@pytest.mark.parametrize("names", ["a", b"a", {"a": 1}, [1], 1, [None]], ids=repr)
def test_names_are_a_list_of_strings(path, names):
    with pytest.raises(OptionError, match="names"):
        wan_loader.load_file(path, names=names)


def test_what_can_be_understood_is(path):
    """`_keep_in_fp32_modules` of a class may be None; numbers and dtypes may be numpy's."""
    options = {"dtype": numpy.dtype("float64"), "threads": numpy.int64(2), "names": iter(["a"])}
    assert wan_loader.load_file(path, keep_fp32=None, **options)["a"].dtype == torch.float64
    kept = wan_loader.load_file(path, dtype="bf16", keep_fp32={"norm2"})
    assert {name: tensor.dtype for name, tensor in kept.items()} == {"a": torch.bfloat16, "b.norm2.weight": torch.float}


NO_DEVICES = [None, True, 1.5, b"cpu", ["cpu"], "", "gpu", "meta", "CPU", "cpu:1", "cuda:-1", -1, 2**70, "cuda:99"]


@pytest.mark.parametrize("device", [*NO_DEVICES, torch.device("meta"), torch.ones(())], ids=repr)
def test_devices_that_are_none(path, device):
    with pytest.raises(wan_loader.DeviceError, match="device"):
        wan_loader.load_file(path, device)
    with pytest.raises(wan_loader.DeviceError, match="device"):
        wan_loader.load_into(torch.nn.Linear(1, 1), path, device=device, strict=False)


def test_a_module_comes_first(path):
    with pytest.raises(OptionError, match="the module to fill comes first, and then the checkpoint's path"):
        wan_loader.load_into(path, torch.nn.Linear(1, 1), device="cpu")
    with pytest.raises(OptionError, match="key_map is of type list: pass a mapping or a function"):
        fill(path, key_map=[("a", "b")])
    with pytest.raises(OptionError, match="strict is the str 'no': pass True or False"):
        wan_loader.load_into(torch.nn.Linear(1, 1), path, device="cpu", strict="no")


@pytest.mark.parametrize("limit", [-1, 1.5, "1GB", True], ids=repr)
def test_a_limit_of_prewarm_is_a_number_of_bytes(path, limit):
    with pytest.raises(OptionError, match=r"limit_nbytes=.*: use 0 or more"):
        wan_loader.prewarm(path, limit_nbytes=limit)


STARTS = [wan_pipeline.load_diffusers, wan_pipeline.WanT2V.from_checkpoint]


@pytest.mark.parametrize("start", [*STARTS, wan_pipeline.open_wan], ids=lambda call: call.__qualname__)
def test_a_pipeline_is_in_a_directory(start, path):
    with open(path, "rb") as file:
        for given in (None, b"there", ["there"], io.BytesIO(), file):
            with pytest.raises(OptionError, match="directory is "):
                start(given)


@pytest.mark.parametrize("start", STARTS, ids=lambda call: call.__qualname__)
@pytest.mark.parametrize(
    "options",
    [
        {"cache_dir": "there"},
        {"cache": "no"},
        {"cache": True, "cache_dir": b"there"},
        {"dtype": "int8"},
        {"dtype": 16},
        {"device": None},
        {"device": "gpu"},
        {"preset": None},
    ],
    ids=str,
)
def test_options_of_a_start(tmp_path, start, options):
    with pytest.raises(WanLoaderError) as error:
        start(tmp_path, **options)
    assert next(iter(options)) in str(error.value) or "no WAN2.2 checkpoint" in str(error.value)


def test_sizes_and_flags_of_a_start(tmp_path):
    for options in ({"size": "1280*720"}, {"size": 720}, {"size": (1280, 720.5)}, {"frame_num": "81"}, {"t5_cpu": 1}):
        with pytest.raises(OptionError, match=r"size|height|frame_num|t5_cpu"):
            wan_pipeline.WanT2V.from_checkpoint(tmp_path, **options)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": 7},
        {"prompt": b"cats"},
        {"negative_prompt": 1},
        {"size": "832*480"},
        {"size": (832.5, 480)},
        {"frame_num": 81.0},
        {"steps": "4"},
        {"seed": 1.5},
        {"seed": -1},
    ],
    ids=str,
)
def test_what_a_video_is_made_of(given):
    from wan_pipeline.video_request import VideoRequest

    with pytest.raises(OptionError, match=r"size|width|prompt|frame_num|steps|seed"):
        VideoRequest.make("t2v-A14B", **{"prompt": "cats", **given})


@pytest.mark.parametrize(
    ("value", "checked"),
    [
        (slice(1, 3), (slice(1, 3),)),
        ((1, 3), (slice(1, 3),)),
        ([1, 3], (slice(1, 3),)),
        ((slice(1), slice(None, None, 2)), (slice(1), slice(None, None, 2))),
        ((), ()),
    ],
)
def test_slices(value, checked):
    assert checked_slices({"a": value}) == {"a": checked}
    assert checked_slices({"a": checked}) == {"a": checked}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc", "slices is the str 'abc': pass a mapping"),
        ([("a", slice(2))], "slices is of type list"),
        ({1: slice(2)}, "slices has 1 for a name"),
        ({"a": 3}, r"slices\['a'\] is 3: pass a slice, a tuple of slices, or \(start, stop\)"),
        ({"a": (1, 2, 3)}, r"slices\['a'\]"),
        ({"a": (True, False)}, r"slices\['a'\]"),
        ({"a": range(3)}, r"slices\['a'\] is of type range"),
        ({"a": (slice(2), 3)}, r"slices\['a'\]"),
        ({"a": ...}, r"slices\['a'\] is of type ellipsis"),
        ({"a": slice(1.5)}, r"slices\['a'\]: the bounds of a slice are whole numbers"),
        ({"a": slice(None, None, 0)}, r"slices\['a'\]: step 0"),
        ({"a": (slice(2), slice(None, None, -2))}, r"slices\['a'\]: step -2: use a positive one"),
    ],
)
def test_slices_that_make_no_sense(value, message):
    with pytest.raises(OptionError, match=message):
        checked_slices(value)


def test_no_slices():
    assert checked_slices(None) == {}
