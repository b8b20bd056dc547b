"""Torch files that hold more than plain dense tensors: right values, or one error that names the tensor."""

import pytest

torch = pytest.importorskip("torch")

from loader_cases import bits, same, same_dicts  # noqa: E402
from safetensors.torch import save  # noqa: E402
from typer.testing import CliRunner  # noqa: E402
from versions import DTYPES  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.cli.app import app  # noqa: E402
from wan_loader.errors import CheckpointError  # noqa: E402
from wan_loader.verify import verify  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*[Ss]parse .* beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


def quantised(dtype):
    return torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, dtype)


ODD = {
    "coo": (lambda: torch.eye(3).to_sparse(), "a sparse coo tensor"),
    "csr": (lambda: torch.eye(4).to_sparse_csr(), "a sparse csr tensor"),
    "bsc": (lambda: torch.eye(4).to_sparse_bsc((2, 2)), "a sparse bsc tensor"),
    "sparse half": (lambda: torch.eye(3).half().to_sparse(), "a sparse coo tensor"),
    "qint8": (lambda: quantised(torch.qint8), "a quantised tensor"),
    "quint8": (lambda: quantised(torch.quint8), "a quantised tensor"),
    "qint32": (lambda: quantised(torch.qint32), "a quantised tensor"),
    "meta": (lambda: torch.empty(3, device="meta"), "a meta tensor, which has no values"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
}


@pytest.fixture(params=ODD)
def odd(request, tmp_path):
    make, message = ODD[request.param]
    torch.save({"w": torch.ones(2), "odd": make()}, tmp_path / "model.pth")
    return tmp_path / "model.pth", rf"model\.pth: tensor 'odd' is {message}.*torch\.load\(weights_only=True\)"


def test_what_is_not_dense_is_refused_by_name(odd):
    path, message = odd
    module = torch.nn.ParameterDict({"w": torch.zeros(2), "odd": torch.zeros(3)})
    calls = [wan_loader.open_checkpoint, wan_loader.load_file, wan_loader.prewarm]
    for call in (*calls, lambda p: wan_loader.load_into(module, p, device="cpu", strict=False)):
        with pytest.raises(wan_loader.CheckpointError, match=message):
            call(path)
    with pytest.raises(wan_loader.CheckpointError, match=message):
        wan_loader.load_file(path, dtype="bf16")


@pytest.mark.parametrize(
    "words", [["inspect"], ["load", "--verify"], ["cache", "build"], ["profile", "--no-ceilings"]], ids=str
)
def test_no_command_falls_over_them(tmp_path, words):
    torch.save({"odd": quantised(torch.qint8)}, tmp_path / "model.pth")
    done = CliRunner().invoke(app, [*words, str(tmp_path / "model.pth")])
    assert isinstance(done.exception, wan_loader.CheckpointError)
    assert "tensor 'odd' is a quantised tensor" in str(done.exception)


def test_it_is_no_matter_in_another_part(odd, tmp_path):
    state = torch.load(odd[0], weights_only=True)
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"odd": state["odd"]}}, tmp_path / "nested.pth")
    loaded = wan_loader.load_file(tmp_path / "nested.pth", part="model")
    same_dicts(loaded, {"w": torch.ones(2)})
    assert verify(tmp_path / "nested.pth", loaded, part="model") == 1
    with pytest.raises(wan_loader.CheckpointError, match="tensor 'odd' is"):
        wan_loader.load_file(tmp_path / "nested.pth", part="optimizer")


COMPLEX = torch.tensor([1 + 2j, 3 - 4j])
DENSE = {
    "conjugated": COMPLEX.conj(),
    "negated": COMPLEX.conj().imag,
    "imaginary": COMPLEX.imag,
    "parameter": torch.nn.Parameter(torch.tensor([1.5, 2.5])),
    "with a gradient": torch.tensor([1.5, 2.5], requires_grad=True),
    "scalar": torch.tensor(1.5),
    "expanded": torch.tensor([1.5]).expand(5),
    "complex32": torch.tensor([1 + 2j], dtype=torch.complex32),
    "bits16": torch.tensor([1, 2], dtype=torch.uint8).view(torch.bits16),
    "bool": torch.tensor([True, False]),
    "eight bits": torch.tensor([float("nan"), 1.5]).to(torch.float8_e5m2),
}
if hasattr(torch.nn, "Buffer"):
    DENSE["buffer"] = torch.nn.Buffer(torch.tensor([1.5, 2.5]))
for name, like in {"uint16": [255, 255], "float4_e2m1fn_x2": [1, 2]}.items():
    if name in DTYPES:
        DENSE[name] = torch.tensor(like, dtype=torch.uint8).view(DTYPES[name])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense_tensors_of_every_sort(tmp_path, device, name, dtype):
    """Ordinary tensors come of it: they need no gradient, and nothing happens only when they are read."""
    torch.save({"w": torch.ones(2), "odd": DENSE[name]}, tmp_path / "model.pth")
    loaded = wan_loader.load_file(tmp_path / "model.pth", device, dtype=dtype)
    expected = torch.load(tmp_path / "model.pth", weights_only=True)["odd"].detach().resolve_conj().resolve_neg()
    converts = dtype is not None and name not in ("float4_e2m1fn_x2", "bits16") and expected.is_floating_point()
    same(loaded["odd"], expected.to(device).to(dtype).cpu() if converts else expected)  # NaN has other bits on GPUs
    assert type(loaded["odd"]) is torch.Tensor
    assert [loaded["odd"].requires_grad, loaded["odd"].is_conj(), loaded["odd"].is_neg()] == [False] * 3
    assert verify(tmp_path / "model.pth", loaded) == 2


def test_a_legacy_pickle_of_parameters_and_its_conversion(tmp_path):
    tied = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    state = {"w": tied, "tied": tied, "half": torch.nn.Parameter(torch.ones(3).half())}
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    loaded = wan_loader.load_file(tmp_path / "model.pth", dtype="float64", keep_fp32=["tied"])
    assert {name: t.dtype for name, t in loaded.items()} == {
        "w": torch.float64,
        "tied": torch.float32,
        "half": torch.float64,
    }
    assert not any(tensor.requires_grad for tensor in loaded.values())
    whole = wan_loader.load_file(tmp_path / "model.pth")
    assert whole["w"].data_ptr() == whole["tied"].data_ptr()


def test_verify_sees_a_wrong_bit_in_every_dtype(tmp_path):
    torch.save({name: tensor.clone() for name, tensor in DENSE.items()}, tmp_path / "model.pth")
    loaded = wan_loader.load_file(tmp_path / "model.pth", io="buffered")
    assert verify(tmp_path / "model.pth", loaded) == len(DENSE)
    for name in DENSE:
        wrong = loaded[name].clone().contiguous()
        bits(wrong)[0] ^= 1
        with pytest.raises(wan_loader.CheckpointError, match=f"'{name}' differs"):
            verify(tmp_path / "model.pth", {**loaded, name: wrong})


def test_a_file_that_torch_does_not_read_as_weights_only_cannot_be_verified(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"w": torch.arange(3.0)}, path, pickle_protocol=4)
    loaded = wan_loader.load_file(path)
    same(loaded["w"], torch.load(path, weights_only=False)["w"])
    with pytest.raises(wan_loader.CheckpointError, match=r"model\.pth can be loaded, but not verified"):
        verify(path, loaded)


@pytest.mark.parametrize(
    ("failure", "error"),
    [(torch.OutOfMemoryError, wan_loader.DeviceMemoryError), (MemoryError, wan_loader.HostMemoryError)],
)
def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, failure, error):
    """Where torch itself reads the file, and runs out of memory."""
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pth", _use_new_zipfile_serialization=False)

    def load(*args, **kwargs):
        raise failure("no room")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error, match=r"model\.pth"):
        wan_loader.load_file(tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_whose_name_is_not_utf8_is_verified(tmp_path, monkeypatch, suffix):
    """safetensors, and torch where it maps, refuse such a name; the path need not be absolute."""
    tensors = {"w": torch.arange(6.0)}
    path = f"n\udcff.{suffix}"
    monkeypatch.chdir(tmp_path)
    with open(path, "wb") as file:
        if suffix == "pth":
            torch.save(tensors, file)
        else:
            file.write(save(tensors))
    assert verify(path, wan_loader.load_file(path, dtype="bf16")) == 1
    with pytest.raises(CheckpointError, match="differs"):
        verify(path, {"w": tensors["w"] + 1})
