"""`empty_weights`: parameters on meta, everything else real, for one thread; once filled, the module runs."""

import threading
from collections import OrderedDict, namedtuple

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import wan_loader  # noqa: E402

Pair = namedtuple("Pair", "cos sin")


class Tagged(nn.Parameter):
    """A class of parameters with a constructor of its own, past that of `Parameter`."""

    def __new__(cls, data, requires_grad=True, tag=None):
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.tag = tag
        return made


class Block(nn.Module):
    def __init__(self, freqs):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 8, bias=False)
        self.modulation = nn.Parameter(torch.randn(1, 8) / 8**0.5)
        self.freqs = freqs

    def forward(self, x):
        rotated = torch.view_as_complex(self.qkv(self.norm(x)).double().reshape(*x.shape[:-1], 4, 2)) * self.freqs
        return x + torch.view_as_real(rotated).flatten(-2).float() * self.modulation


class Net(nn.Module):
    """As the official model keeps its rotary tables: complex numbers in plain attributes, which all blocks share."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(6), 1.0 / 10.0 ** torch.arange(2, dtype=torch.float64))
        self.freqs = torch.cat([torch.polar(torch.ones_like(angles), angles)] * 2, dim=1)
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(self.freqs) for _ in range(2)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = Tagged(torch.ones(()), requires_grad=False, tag="mine")
        self.register_buffer("steps", torch.arange(4))
        self.register_buffer("table", torch.linspace(0, 1, 11), persistent=False)
        self.pair = Pair(torch.ones(11), torch.zeros(11))
        self.by_name = OrderedDict(shift=torch.full((11,), 0.5), none=None)
        self.listed = [self.table, 3, self.head.weight]
        nn.init.normal_(self.head.weight)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.trunc_normal_(layer.weight)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.head(x) * self.scale + self.listed[0] + self.table + self.by_name["shift"] + self.steps.sum()
        return x * self.pair.cos + self.pair.sin


def empty(make=Net):
    with wan_loader.empty_weights():
        return make()


@pytest.fixture
def reference():
    torch.manual_seed(7)
    return Net()


@pytest.fixture
def path(tmp_path, reference):
    torch.save(reference.state_dict(), tmp_path / "net.pth")
    return tmp_path / "net.pth"


def test_only_parameters_are_on_meta(reference):
    module = empty()
    assert all(p.is_meta for p in module.parameters())
    for name, buffer in reference.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer)
    assert torch.equal(module.freqs, reference.freqs)
    assert torch.equal(module.by_name["shift"], reference.by_name["shift"])
    assert module.head.weight is module.embed.weight is module.listed[2]
    assert (type(module.scale), module.scale.tag, module.scale.requires_grad) == (Tagged, "mine", False)
    assert type(module.head.weight) is nn.Parameter
    assert [(n, p.shape, p.dtype) for n, p in module.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in reference.named_parameters()
    ]


@pytest.mark.parametrize("built", [empty, Net])
def test_what_was_filled_runs(path, reference, device, built):
    module = built()
    report = wan_loader.load_into(module, path, device=device)
    assert not report.warnings
    assert {t.device.type for t in (module.freqs, module.table, *module.pair, module.by_name["shift"])} == {device}
    assert module.blocks[0].freqs is module.blocks[1].freqs is module.freqs
    assert module.freqs.dtype is torch.complex128
    assert module.listed[0] is module.table
    assert module.listed[2] is module.head.weight is module.embed.weight
    assert (type(module.scale), module.scale.tag) == (Tagged, "mine")
    assert (type(module.pair), type(module.by_name)) == (Pair, OrderedDict)
    x = torch.arange(6)
    with torch.no_grad():
        expected = reference.to(device)
        wan_loader.load_into(expected, path, device=device)  # also moves what `to` leaves behind
        assert torch.equal(module(x.to(device)), expected(x.to(device)))


def test_containers_are_replaced_not_changed(path):
    """A list that others hold, too, keeps its tensors; modules that share one still do."""
    module = empty()
    shared = [module.head.weight]
    module.listed = module.blocks[0].listed = shared
    before = shared[0]
    wan_loader.load_into(module, path, device="cpu")
    assert shared[0] is before
    assert module.listed is module.blocks[0].listed
    assert module.listed[0] is module.head.weight


def test_lstm_runs(tmp_path):
    reference = nn.LSTM(5, 6, 2, batch_first=True)
    torch.save(reference.state_dict(), tmp_path / "x.pth")
    x = torch.randn(2, 3, 5)
    for module in (empty(lambda: nn.LSTM(5, 6, 2, batch_first=True)), nn.LSTM(5, 6, 2, batch_first=True)):
        wan_loader.load_into(module, tmp_path / "x.pth", device="cpu")
        assert torch.equal(module(x)[0], reference(x)[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(10**6, 10**6),
        lambda: nn.Linear(10**6, 10**6, device="cpu", dtype=torch.bfloat16),
        lambda: nn.Embedding(10**6, 10**6),
        lambda: nn.Conv3d(10**6, 10**5, 3),
        lambda: nn.Bilinear(10**4, 10**4, 10**4),
        lambda: nn.LayerNorm([10**6, 10**6]),
        lambda: nn.RMSNorm([10**6, 10**6]),
        lambda: nn.GroupNorm(2, 10**12),
        lambda: nn.BatchNorm1d(10**12, track_running_stats=False),
        lambda: nn.MultiheadAttention(10**6, 4),
        lambda: nn.GRU(10**6, 10**6),
        lambda: nn.TransformerEncoderLayer(10**6, 4, 10**6),
    ],
)
def test_layers_of_any_size(make):
    """Terabytes, which no machine would give even as mere addresses."""
    module = empty(make)
    assert all(p.is_meta for p in module.parameters())
    assert list(module.parameters())


def test_batch_norm_counts_in_real_buffers():
    assert {b.device.type for b in empty(lambda: nn.BatchNorm2d(4)).buffers()} == {"cpu"}


def test_devices_inside_of_the_block():
    def make():
        with torch.device("cpu"):
            return nn.Linear(10**6, 10**6)

    assert empty(make).weight.is_meta
    with torch.device("meta"):
        assert empty(lambda: nn.BatchNorm2d(4)).running_mean.is_meta  # as was asked for


class TransferResult(nn.Module):
    """Moves itself, and sets the data of its parameters, as official models do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("shift", torch.arange(3.0), persistent=False)
        self.layer.bias.data = torch.arange(4.0)
        self.to("cpu")
        self.double().to(device=torch.device("cpu"), dtype=torch.float16)
        self.layer.weight.data = self.layer.weight.data.cpu().to("cpu", torch.float64, False, True).half()
        self.layer.bias = nn.Parameter(self.layer.bias.to("cpu", copy=True))

    def forward(self, x):
        return self.layer(x + self.shift)


def test_a_constructor_that_moves_the_module_and_sets_data(tmp_path):
    reference = TransferResult()
    torch.save(reference.state_dict(), tmp_path / "moved.pth")
    module = empty(lambda: TransferResult().to("cpu"))
    assert all(p.is_meta and p.dtype is torch.float16 for p in module.parameters())
    assert module.shift.dtype is torch.float16
    wan_loader.load_into(module, tmp_path / "moved.pth", device="cpu")
    x = torch.ones(2, 3, dtype=torch.float16)
    assert torch.equal(module(x), reference(x))
    with pytest.raises(NotImplementedError):
        nn.Linear(2, 2, device="meta").to("cpu")


def test_a_parameter_from_before_stays():
    given = nn.Parameter(torch.ones(3))

    def make():
        module = nn.Module()
        module.a = module.b = given
        return module

    module = empty(make)
    assert module.a is module.b is given
    assert not given.is_meta


def test_nested_and_after_an_error():
    with wan_loader.empty_weights():
        with pytest.raises(ZeroDivisionError), wan_loader.empty_weights():
            nn.Linear(1 // 0, 1)
        assert nn.Linear(2, 2).weight.is_meta
    with pytest.raises(ZeroDivisionError), wan_loader.empty_weights():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta
    assert nn.Linear(2, 2).weight.abs().sum() > 0
    assert "__call__" not in vars(type(nn.Parameter))
    assert torch._C._len_torch_function_stack() == 0


def test_other_threads_are_not_concerned():
    inside, done = threading.Event(), threading.Event()
    made = {}

    def other():
        inside.wait(10)
        made["beside"] = nn.Linear(3, 3)
        with wan_loader.empty_weights():
            done.set()
            left.wait(10)
            made["own"] = nn.Linear(3, 3)
        made["after"] = nn.Linear(3, 3)

    left = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    with wan_loader.empty_weights():
        inside.set()
        assert done.wait(10)
    left.set()
    assert not nn.Linear(3, 3).weight.is_meta  # the other thread's block is still open, or just closed
    thread.join()
    assert {name: layer.weight.is_meta for name, layer in made.items()} == {
        "beside": False,
        "own": True,
        "after": False,
    }
    assert "__call__" not in vars(type(nn.Parameter))


def test_filled_inside_of_the_block(path, reference):
    with wan_loader.empty_weights():
        module = Net()
        wan_loader.load_into(module, path, device="cpu")
    assert torch.equal(module.embed.weight, reference.embed.weight)
    assert isinstance(module.embed.weight, nn.Parameter)


class Doubled:
    """Computes an attribute before each forward, as torch's `weight_norm` and `prune` do."""

    name = "doubled"

    def __call__(self, module, inputs):
        module.doubled = 2 * module.weight.detach()


def test_what_a_hook_computes_is_no_plain_attribute(weight):
    module = empty(Left)
    module.doubled = module.weight.detach()
    module.register_forward_pre_hook(Doubled())
    module.forward = lambda: module.doubled.tolist()
    wan_loader.load_into(module, weight, device="cpu")
    assert module() == [0, 2, 4]


def test_lazy_modules_are_told_apart(weight):
    with pytest.raises(wan_loader.KeyMismatchError, match="weight of the module") as caught:
        wan_loader.load_into(empty(lambda: nn.LazyLinear(4, bias=False)), weight, device="cpu")
    assert (caught.value.tensor, caught.value.reason) == ("weight", "has no shape yet")


class Left(nn.Module):
    """Beside a weight, something on meta of each kind: what `torch.device("meta")` leaves."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = nn.Module()
        self.inner.register_buffer("mask", torch.ones(3), persistent=False)
        self.freqs = self.inner.freqs = torch.ones(3, dtype=torch.complex64)
        self.caches = {"cos": [torch.ones(3)], "sin": torch.ones(3)}
        self.alias = [self.weight]


@pytest.fixture
def weight(tmp_path):
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def left():
    with torch.device("meta"):
        return Left()


def test_what_would_stay_on_meta_is_refused(weight):
    module = left()
    recorder = wan_loader.Recorder()
    with pytest.raises(wan_loader.KeyMismatchError, match="empty_weights") as caught:
        wan_loader.load_into(module, weight, device="cpu", observer=recorder)
    assert sorted(caught.value.on_meta) == ["caches.sin", "freqs", "inner.mask"]
    assert "inner.mask (buffer)" in str(caught.value)
    assert "caches.sin (plain attribute)" in str(caught.value)
    assert "read" not in {span.name for span in recorder.spans}
    assert module.weight.is_meta
    module = empty(Left)
    wan_loader.load_into(module, weight, device="cpu")
    assert module.alias[0] is module.weight
    assert torch.equal(module.inner.mask, torch.ones(3))


@pytest.mark.parametrize("names", [["inner.mask", "freqs", "caches"], ["mask", "inner", "sin"]])
def test_allow_meta(weight, names):
    module = left()
    report = wan_loader.load_into(module, weight, device="cpu", allow_meta=names)
    assert module.weight.tolist() == [0, 1, 2]
    assert module.inner.mask.is_meta
    (note,) = report.warnings
    assert "still on the meta device" in note
    for name in ("inner.mask", "freqs", "caches.sin"):
        assert name in note
    with pytest.raises(wan_loader.KeyMismatchError) as caught:
        wan_loader.load_into(left(), weight, device="cpu", allow_meta=["ask", "fre", "caches.si"])
    assert len(caught.value.on_meta) == 3


def test_a_string_is_no_list_of_names(weight):
    with pytest.raises(wan_loader.OptionError, match=r"allow_meta is the str 'inner': pass a list of strings"):
        wan_loader.load_into(left(), weight, device="cpu", allow_meta="inner")
