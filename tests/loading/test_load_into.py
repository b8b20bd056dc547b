"""`load_into`: the right tensor in the right place of a module, or one error and a module that is as it was."""

import re
import sys
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from torch import nn  # noqa: E402

import wan_loader  # noqa: E402
from wan_loader.system.posix_aio import AioRequest  # noqa: E402


class Net(nn.Module):
    """A parameter, tied parameters, a persistent and a non-persistent buffer, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(2)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("steps", torch.arange(4))
        self.register_buffer("table", torch.linspace(0, 1, 5), persistent=False)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.body:
            x = x + layer(x)
        return self.head(x) * self.scale


@pytest.fixture
def reference():
    torch.manual_seed(3)
    return Net()


@pytest.fixture
def path(tmp_path, reference):
    state = {n: t.clone() for n, t in reference.state_dict().items() if n != "head.weight"}
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def empty():
    with wan_loader.empty_weights():
        return Net()


def snapshot(module):
    """Identity and contents of everything in a module."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(n, id(t), None if t.is_meta else t.detach().clone(), t.device, t.requires_grad) for n, t in tensors]


def unchanged(module, before):
    after = snapshot(module)
    assert [(n, i, d, g) for n, i, _, d, g in after] == [(n, i, d, g) for n, i, _, d, g in before]
    for (*_, old, _, _), (*_, new, _, _) in zip(before, after, strict=True):
        assert (old is None) is (new is None)
        assert old is None or torch.equal(old, new)


@pytest.mark.parametrize("make", [Net, empty])
@pytest.mark.parametrize("mode", ["auto", "mapped", "direct", "buffered"])
def test_fills_a_module(path, reference, device, make, mode):
    module = make()
    table = module.table
    report = wan_loader.load_into(module, path, device=device, io=mode)
    for name, tensor in reference.state_dict().items():
        actual = module.state_dict()[name]
        assert actual.device.type == device
        assert torch.equal(actual.cpu(), tensor), name
    assert module.head.weight is module.embed.weight
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["scale"]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in module.parameters())
    assert not isinstance(module.steps, nn.Parameter)
    assert torch.equal(module.table.cpu(), table)
    assert module.table.device.type == device
    assert not report.warnings
    assert report.n_tensors == len(reference.state_dict()) - 1


@pytest.mark.parametrize("name", ["torch.distributed.tensor", "torch.distributed.fsdp"])
def test_while_another_thread_imports_dtensors(path, reference, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # begun, and empty so far
    module = empty()
    wan_loader.load_into(module, path, device="cpu")
    assert torch.equal(module.embed.weight, reference.embed.weight)


def test_same_output_as_load_state_dict(tmp_path, device):
    torch.manual_seed(1)
    build = {"d_model": 32, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 64}
    reference = nn.Transformer(**build, dropout=0.0, batch_first=True).eval()
    torch.save(reference.state_dict(), tmp_path / "net.pth")
    with torch.device("meta"):
        module = nn.Transformer(**build, dropout=0.0, batch_first=True).eval()
    wan_loader.load_into(module, tmp_path / "net.pth", device=device)
    reference.to(device)
    x, y = torch.randn(2, 7, 32, device=device), torch.randn(2, 5, 32, device=device)
    with torch.no_grad():
        assert torch.equal(module(x, y), reference(x, y))
    module.train()
    module(x, y).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_tied_weight_under_its_other_name(tmp_path, reference):
    state = {n: t.clone() for n, t in reference.state_dict().items() if n != "embed.weight"}
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    module = empty()
    wan_loader.load_into(module, tmp_path / "net.safetensors", device="cpu")
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.embed.weight, reference.embed.weight)


@pytest.mark.parametrize("order", [("embed.weight", "head.weight"), ("head.weight", "embed.weight")])
def test_tied_weight_with_two_values_is_what_load_state_dict_makes_of_it(tmp_path, order):
    state = {n: t.clone() for n, t in Net().state_dict().items() if n not in order}
    torch.save(state | {name: torch.full((11, 6), float(len(name))) for name in order}, tmp_path / "net.pth")
    expected, module = Net(), empty()
    expected.load_state_dict(torch.load(tmp_path / "net.pth"))
    wan_loader.load_into(module, tmp_path / "net.pth", device="cpu")
    assert torch.equal(module.embed.weight, expected.embed.weight)
    assert module.head.weight is module.embed.weight


def test_tied_weight_under_both_names(tmp_path, reference):
    safetensors.torch.save_file({n: t.clone() for n, t in reference.state_dict().items()}, tmp_path / "x.safetensors")
    module = empty()
    wan_loader.load_into(module, tmp_path / "x.safetensors", device="cpu")
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.embed.weight, reference.embed.weight)


def test_module_shared_as_a_whole(tmp_path):
    layer = nn.Linear(3, 3)
    torch.save({"0.weight": torch.ones(3, 3), "0.bias": torch.zeros(3)}, tmp_path / "x.pth")
    module = nn.Sequential(layer, layer)
    wan_loader.load_into(module, tmp_path / "x.pth", device="cpu")
    assert module[0].weight is module[1].weight
    assert (module[1].weight == 1).all()


@pytest.mark.parametrize("as_function", [True, False])
def test_key_map(tmp_path, reference, as_function):
    renamed = {f"model.{n}": t.clone() for n, t in reference.state_dict().items() if n != "head.weight"}
    safetensors.torch.save_file(renamed | {"ema": torch.ones(3)}, tmp_path / "net.safetensors")
    mapping = {n: n.removeprefix("model.") for n in renamed} | {"ema": None}
    module = empty()
    key_map = mapping.get if as_function else mapping
    report = wan_loader.load_into(module, tmp_path / "net.safetensors", device="cpu", key_map=key_map)
    assert torch.equal(module.body[1][0].weight, reference.body[1][0].weight)
    assert report.n_tensors == len(renamed)
    assert not any("ema" in w for w in report.warnings)


def test_names_not_in_a_mapping_stay(path, reference):
    module = empty()
    wan_loader.load_into(module, path, device="cpu", key_map={"nothing": "else"})
    assert torch.equal(module.embed.weight, reference.embed.weight)


@pytest.mark.parametrize("key_map", [len, {"scale": b"scale"}])
def test_a_key_map_gives_names(path, key_map):
    with pytest.raises(wan_loader.OptionError, match=r"key_map gives a value of type (int|bytes) for '.+'") as caught:
        wan_loader.load_into(Net(), path, device="cpu", key_map=key_map)
    assert caught.value.remedy == "every name is a str, or None to leave out"


class Viewing(nn.Module):
    """Keeps views of what is filled, which follow `load_state_dict`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.register_buffer("table", torch.zeros(6))
        self.register_buffer("end", self.table[3:], persistent=False)
        self.rows, self.raw, self.columns = self.weight[1:3], self.weight.data, [self.weight.detach().t()]
        self.own = torch.zeros(4, 3)


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_views_of_what_is_filled_follow(tmp_path, dtype):
    state = {"weight": torch.randn(4, 3), "table": torch.arange(6.0)}
    torch.save(state, tmp_path / "x.pth")
    module, expected = Viewing(), Viewing()
    wan_loader.load_into(module, tmp_path / "x.pth", device="cpu", dtype=dtype)
    expected.load_state_dict(state)
    for name in ("end", "rows", "raw", "own"):
        assert torch.equal(getattr(module, name), getattr(expected, name).to(getattr(module, name).dtype)), name
    assert torch.equal(module.columns[0], module.weight.t())
    assert module.end.data_ptr() == module.table[3:].data_ptr()
    module.rows.sum().backward()
    assert module.weight.grad.sum() == 6


def test_two_names_mapped_to_one_are_refused(path):
    module = empty()
    with pytest.raises(wan_loader.KeyMismatchError, match=r"body\.0\.0\.bias"):
        wan_loader.load_into(module, path, device="cpu", key_map={"body.0.1.bias": "body.0.0.bias"}, strict=False)


@pytest.fixture
def no_reads(monkeypatch):
    """Fails the test if weights are read or mapped."""

    def refuse(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(AioRequest, "start", refuse)
    monkeypatch.setattr("wan_loader.loading.allocate.map_private", refuse)


@pytest.mark.parametrize("mode", ["auto", "mapped", "direct", "buffered"])
def test_everything_that_disagrees_is_listed_before_a_weight_is_read(tmp_path, reference, no_reads, mode):
    state = {n: t.clone() for n, t in reference.state_dict().items() if n != "head.weight"}
    del state["body.0.0.weight"], state["steps"]
    state |= {"extra.one": torch.ones(2), "extra.two": torch.ones(2)}
    state["body.1.0.weight"] = torch.ones(6, 7)
    state["scale"] = torch.ones(1)
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(state, path)
    module, recorder = Net(), wan_loader.Recorder()
    before = snapshot(module)
    with pytest.raises(wan_loader.KeyMismatchError) as caught:
        wan_loader.load_into(module, path, device="cpu", io=mode, observer=recorder)
    assert "read" not in {span.name for span in recorder.spans}
    message = str(caught.value)
    disagreeing = ["body.0.0.weight", "steps", "extra.one", "extra.two", "body.1.0.weight", "scale", "[6, 7]", "[6, 6]"]
    for name in [str(path), *disagreeing]:
        assert name in message
    assert "body.1.0.bias" not in message
    assert "table" not in message
    assert "head.weight" not in message
    assert isinstance(caught.value, KeyError)
    unchanged(module, before)


def test_not_strict_reports(tmp_path, reference):
    state = {n: t.clone() for n, t in reference.state_dict().items() if n not in ("head.weight", "body.0.0.bias")}
    safetensors.torch.save_file(state | {"extra": torch.ones(2)}, tmp_path / "net.safetensors")
    module = Net()
    bias = module.body[0][0].bias
    report = wan_loader.load_into(module, tmp_path / "net.safetensors", device="cpu", strict=False)
    assert module.body[0][0].bias is bias
    assert torch.equal(module.embed.weight, reference.embed.weight)
    notes = "\n".join(report.warnings)
    assert "body.0.0.bias" in notes
    assert "extra" in notes
    module = empty()
    with pytest.raises(wan_loader.KeyMismatchError, match=r"body\.0\.0\.bias \(parameter\)"):
        wan_loader.load_into(module, tmp_path / "net.safetensors", device="cpu", strict=False)
    assert module.embed.weight.is_meta
    options = {"strict": False, "allow_meta": ["bias"]}
    report = wan_loader.load_into(module, tmp_path / "net.safetensors", device="cpu", **options)
    assert module.body[0][0].bias.is_meta
    assert any("meta" in w and "body.0.0.bias" in w for w in report.warnings)


def test_not_strict_still_refuses_wrong_shapes(tmp_path):
    safetensors.torch.save_file({"scale": torch.ones(2)}, tmp_path / "net.safetensors")
    with pytest.raises(wan_loader.KeyMismatchError) as caught:
        wan_loader.load_into(empty(), tmp_path / "net.safetensors", device="cpu", strict=False)
    assert caught.value.path == str(tmp_path / "net.safetensors")
    assert list(caught.value.misshaped) == ["scale"]


def test_keep_fp32(path, reference, device):
    module = empty()
    options = {"dtype": "bf16", "keep_fp32": ("body.1", "scale", "od", "emb")}
    report = wan_loader.load_into(module, path, device=device, **options)
    assert any(w.endswith("keep_fp32, but part of no name in the module: od, emb") for w in report.warnings)
    for name, tensor in module.state_dict().items():
        kept = name.startswith("body.1.") or name == "scale"
        expected = reference.state_dict()[name].to(device)
        if tensor.is_floating_point():
            expected = expected.to(torch.float32 if kept else torch.bfloat16)
        assert tensor.dtype is expected.dtype, name
        assert torch.equal(tensor, expected)


def test_keep_fp32_raises_half_precision_only_when_a_dtype_is_asked_for(tmp_path):
    torch.save({"weight": torch.ones(2, 2).half(), "bias": torch.ones(2).half()}, tmp_path / "x.pth")
    for dtype, expected in (("bf16", torch.float32), (None, torch.float16)):
        module = nn.Linear(2, 2)
        wan_loader.load_into(module, tmp_path / "x.pth", device="cpu", dtype=dtype, keep_fp32=("bias",))
        assert module.bias.dtype is expected


def test_a_report_prints_as_a_line(tmp_path):
    torch.save({"weight": torch.ones(20, 20), "bias": torch.ones(20)}, tmp_path / "x.pth")
    options = {"device": "cpu", "dtype": "bf16"}
    report = wan_loader.load_into(nn.Linear(20, 20), tmp_path / "x.pth", **options)
    pattern = re.escape(f"{tmp_path / 'x.pth'} to cpu: 2 tensors, 1.68 kB in ") + r"[\d.]+ m?s \(.* GB/s\), \w+"
    assert re.fullmatch(pattern, str(report)), str(report)
    assert repr(report).startswith("LoadReport(command='load'")
    assert repr(report).endswith(", 0 warnings)")
    assert len(repr(report)) < 400
    report = wan_loader.load_into(nn.Linear(20, 20), tmp_path / "x.pth", **options, keep_fp32=["nonsense"])
    assert (
        str(report).splitlines()[1].startswith("1 warning: in keep_fp32, but part of no name in the module: nonsense")
    )


@pytest.mark.parametrize("make", [Net, empty])
def test_module_is_unchanged_after_a_failed_load(path, device, monkeypatch, make):
    module = make()
    before, result = snapshot(module), AioRequest.result

    def failing(request):
        if result(request) is not None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(AioRequest, "result", failing)
    with pytest.raises(wan_loader.CheckpointError):
        wan_loader.load_into(module, path, device=device, io="buffered")
    unchanged(module, before)
    with pytest.raises(wan_loader.OptionError):
        wan_loader.load_into(module, path, device=device, dtype="int8")
    unchanged(module, before)


def test_parameter_attributes_and_integer_parameters(tmp_path):
    module = nn.Linear(2, 2, bias=False)
    module.weight.tag = "mine"
    module.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    torch.save({"weight": torch.ones(2, 2), "codes": torch.tensor([1, 2, 3], dtype=torch.int8)}, tmp_path / "x.pth")
    wan_loader.load_into(module, tmp_path / "x.pth", device="cpu")
    assert module.weight.tag == "mine"
    assert module.codes.tolist() == [1, 2, 3]


def test_tensors_sharing_a_storage_in_the_file(tmp_path):
    base = torch.randn(4, 4)
    torch.save({"weight": base, "bias": base[1]}, tmp_path / "x.pth")
    module = nn.Linear(4, 4)
    wan_loader.load_into(module, tmp_path / "x.pth", device="cpu", dtype="fp64")
    assert torch.equal(module.weight, base.double())
    assert torch.equal(module.bias, base[1].double())
