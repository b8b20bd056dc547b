"""Parameters whose initialisation waits: the values that it would have given, or none where nobody wants them.

Every program runs plain and with the seam, and gives the same: values, objects, and the state of torch's generator.
"""

import contextlib
import copy
import gc
import io
import threading

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from loader_cases import bits  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import init  # noqa: E402

from wan_loader.fastpath import Tally  # noqa: E402
from wan_loader.fastpath.deferral import initial  # noqa: E402
from wan_loader.fastpath.deferral.deferred import is_deferred, settle, settle_all  # noqa: E402
from wan_loader.fastpath.deferral.deferred_tensor import living  # noqa: E402
from wan_loader.fastpath.deferral.initial import Initial  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402

LOOKED = "was initialised on the CPU after all, as somebody looked at it"
SPARED = "initialisations on the CPU"
SHAPE = (40, 50)  # 16 divides it, and the other not
ODD = (41, 53)
NBYTES = 4 * 40 * 50


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left():
    yield
    gc.collect()
    assert not living()


@contextlib.contextmanager
def installed(tally=None, **options):
    tally = tally or Tally()
    patches = Patches(tally)
    Initial(tally, **({"min_elements": 1000} | options)).install(patches)
    try:
        yield tally
    finally:
        patches.undo()


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert (tensor.requires_grad, tensor.stride()) == (expected[name].requires_grad, expected[name].stride())
        assert isinstance(tensor, nn.Parameter) == isinstance(expected[name], nn.Parameter)
        assert torch.equal(bits(tensor), bits(expected[name])), name


def both(program, **options):
    """Run a program plain and with the seam; returns what the second one counted."""
    torch.manual_seed(7)
    expected, state = program(), torch.get_rng_state()
    torch.manual_seed(7)
    with installed(**options) as tally:
        found = program()
    assert torch.equal(torch.get_rng_state(), state)
    same(found, expected)
    assert "after all" not in " ".join(tally.left) or tally.left.keys() == {LOOKED}
    return tally


def parameter(shape=SHAPE):
    return nn.Parameter(torch.empty(shape))


def waits(call, **options):
    """Say whether the parameter that a call returns waits."""
    with installed(**options):
        found = call()
        return is_deferred(found)


CALLS = {
    "uniform": lambda t: init.uniform_(t, -2, 3),
    "normal": lambda t: init.normal_(t, 1, std=0.02),
    "normal, by names": lambda t: init.normal_(tensor=t, mean=1.5),
    "kaiming uniform": lambda t: init.kaiming_uniform_(t, 5**0.5),
    "kaiming normal": lambda t: init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu"),
    "xavier uniform": lambda t: init.xavier_uniform_(t, gain=0.5),
    "xavier normal": lambda t: init.xavier_normal_(t),
}


@pytest.mark.parametrize("shape", [SHAPE, ODD, (4, 5, 3, 20)])
@pytest.mark.parametrize("call", CALLS)
def test_each_function_waits_and_gives_the_same(call, shape):
    def program():
        made = parameter(shape)
        assert CALLS[call](made) is made
        return {"": made, "next": torch.rand(3)}

    assert waits(lambda: program()[""])
    tally = both(program)
    assert tally.left == {LOOKED: program()[""].nbytes}
    assert not tally.spared


def test_part_of_a_larger_tensor():
    def program():
        return {"": init.normal_(nn.Parameter(torch.empty(80, 50)[40:]))}

    assert waits(lambda: program()[""])
    both(program)


def test_it_settles_in_the_memory_that_it_had():
    with installed() as tally:
        made = parameter()
        address = made.data_ptr()
        init.normal_(made)
        assert is_deferred(made)
        assert isinstance(made, nn.Parameter)
        assert settle(made) is made
    assert type(made) is nn.Parameter
    assert made.data_ptr() == address
    assert vars(made) == {}
    assert tally.left == {LOOKED: NBYTES}


DRAWS = {
    "rand": lambda: torch.rand(5),
    "dropout": lambda: nn.functional.dropout(torch.ones(50)),
    "normal": lambda: torch.randn(7, dtype=torch.float64),
    "one normal": lambda: torch.empty(()).normal_(),
    "permutation": lambda: torch.randperm(9),
    "the generator itself": lambda: torch.default_generator.get_state(),
    "its state": torch.get_rng_state,
    "a seed": lambda: torch.manual_seed(3).get_state(),
    "the same seed": lambda: torch.manual_seed(torch.initial_seed()).get_state(),
    "a fork": lambda: _forked(),
    "a clone": lambda: torch.default_generator.clone_state().get_state(),
    "another thread": lambda: _in_a_thread(lambda: torch.rand(3)),
}


def _forked():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return torch.rand(4)


def _in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_between(draw):
    """Between two initialisations, one of which is looked at late, the other never; and afterwards."""

    def program():
        first = init.normal_(parameter(ODD))
        between = DRAWS[draw]()
        init.xavier_uniform_(parameter())
        return {"first": first, "between": between, "after": torch.rand(3), "next": DRAWS[draw]()}

    tally = both(program)
    assert tally.spared == {SPARED: 1}
    assert tally.spared_nbytes == {SPARED: NBYTES}


def test_the_last_one_counts():
    """As models do that initialise once more what their layers have initialised."""

    def program():
        layer = nn.Linear(50, 40)
        init.normal_(layer.weight, std=0.02)
        init.xavier_uniform_(layer.weight)
        return dict(layer.named_parameters())

    tally = both(program)
    assert tally.spared == {SPARED: 2}
    assert tally.left == {LOOKED: NBYTES}


def test_an_alias_sees_the_last_one():
    def program():
        made = init.normal_(parameter())
        alias = made.detach()
        init.uniform_(made)
        return {"alias": alias, "": made}

    assert both(program).spared == {SPARED: 1}


class Model(nn.Module):
    """Two layers that initialise themselves, and then everything once more."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 40)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))
        for layer in self.layers:
            init.normal_(layer.weight, std=0.02)

    def forward(self, words):
        x = self.embedding(words)
        for layer in self.layers:
            x = nn.functional.dropout(layer(x))
        return x


WEIGHTS = ("embedding.weight", "layers.0.weight", "layers.1.weight")


def a_file(dtype, left_out=()):
    names = Model().state_dict()
    return {n: torch.full(t.shape, 0.5, dtype=dtype) for n, t in names.items() if n not in left_out}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_never_initialised(dtype, assign):
    file = a_file(dtype)

    def program():
        with torch.device("cpu"):
            model = Model()
        model = model.to(dtype)
        model.load_state_dict(file, assign=assign)
        return dict(model.named_parameters())

    tally = both(program)
    assert tally.spared == {SPARED: 5}
    assert not tally.left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_missing_in_the_file_is_initialised(dtype):
    file = a_file(dtype, left_out=WEIGHTS[1:2])

    def program():
        model = Model().to(dtype)
        missing = model.load_state_dict(file, strict=False).missing_keys
        assert missing == ["layers.0.weight"]
        return dict(model.named_parameters())

    tally = both(program)
    assert tally.spared == {SPARED: 4}
    assert tally.left == {LOOKED: 4 * 40 * 40}


@pytest.mark.parametrize("convert", [lambda m: m, lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double])
def test_what_is_never_loaded_is_initialised(convert):
    def program():
        model = convert(Model())
        return dict(model.named_parameters())

    tally = both(program)
    assert tally.spared == {SPARED: 2}
    assert tally.left == {LOOKED: 4 * (60 * 40 + 2 * 40 * 40)}


def test_a_conversion_waits_and_the_object_stays():
    with installed() as tally:
        model = Model()
        objects = {name: id(tensor) for name, tensor in model.named_parameters()}
        model.to(dtype=torch.bfloat16, device=torch.device("cpu"))
        assert {name for name, tensor in model.named_parameters() if is_deferred(tensor)} == set(WEIGHTS)
        assert {name: id(tensor) for name, tensor in model.named_parameters()} == objects
        assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
        assert all(tensor.requires_grad for tensor in model.parameters())
    assert not tally.left
    settle_all()
    assert {type(tensor) for tensor in model.parameters()} == {nn.Parameter}


def test_a_conversion_apart_is_a_tensor_of_its_own():
    def program():
        made = init.normal_(parameter()).requires_grad_(False)
        apart, rounded, whole = made.to(torch.bfloat16), made.half().float(), made.to(torch.int32)
        with torch.no_grad():
            made.fill_(3)
        return {"": made, "apart": apart, "rounded": rounded, "whole": whole}

    both(program)


def test_a_conversion_that_gradients_follow():
    def program():
        made = init.normal_(parameter())
        made.to(torch.float64).square().sum().backward()
        return {"": made, "grad": made.grad}

    both(program)


OVERWRITE = {
    "copy_": lambda t: t.copy_(torch.ones(50)),
    "fill_": lambda t: t.fill_(2),
    "zero_": lambda t: t.zero_(),
    "normal_": lambda t: t.normal_(),
    "uniform_": lambda t: t.uniform_(generator=torch.Generator().manual_seed(1)),
    "zeros_": lambda t: init.zeros_(t),
    "constant_": lambda t: init.constant_(t, 0.25),
    "kaiming_uniform_ with a generator": lambda t: init.kaiming_uniform_(t, generator=torch.Generator().manual_seed(1)),
    "data = in another dtype": lambda t: setattr(t.data, "data", torch.ones(3).half()) or t.zero_(),
    "trunc_normal_": lambda t: init.trunc_normal_(t),
    "data.copy_": lambda t: t.data.copy_(torch.ones(40, 50)),
    "data =": lambda t: setattr(t, "data", torch.ones(30)),
}


@pytest.mark.parametrize("overwrite", OVERWRITE)
def test_overwritten(overwrite):
    def program():
        made = init.normal_(parameter())
        alias = made.detach()
        with torch.no_grad():
            OVERWRITE[overwrite](made)
        return {"": made} if overwrite == "data =" else {"": made, "alias": alias}

    tally = both(program)
    assert tally.spared == {SPARED: 1}
    assert not tally.left


EDITS = {
    "one row": lambda t: t[3].fill_(0),
    "by itself": lambda t: t.copy_(t.t().reshape(40, 50)),
    "by its alias": lambda t: t.copy_(t.detach()),
    "a sum": lambda t: t.add_(1),
    "numpy": lambda t: t.numpy().__setitem__(0, 5),
    "a view": lambda t: t.view(-1)[7:].zero_(),
    "new memory, the old one is looked at": lambda t: setattr(t, "kept", t.detach()) or setattr(t, "data", t.data + 1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited(edit):
    def program():
        made = init.normal_(parameter())
        with torch.no_grad():
            EDITS[edit](made.detach() if edit == "numpy" else made)
        return {"": made, "kept": getattr(made, "kept", torch.ones(1))}

    tally = both(program)
    assert not tally.spared
    assert tally.left == {LOOKED: NBYTES}


@pytest.mark.parametrize(
    "fails",
    [
        lambda t: t.copy_(torch.ones(51)),
        lambda t: t.fill_("no number"),
        lambda t: init.constant_(t, "no number"),
        lambda t: init.normal_(t, std=-1),
        lambda t: init.uniform_(t, 3, 2),
        lambda t: init.kaiming_normal_(t, mode="no mode"),
        lambda t: init.normal_(t, no_argument=1),
    ],
)
def test_what_fails_changes_nothing(fails):
    def program():
        made = init.normal_(parameter())
        with pytest.raises((RuntimeError, TypeError, ValueError)) as error, torch.no_grad():
            fails(made)
        messages.append(str(error.value))
        return {"": made, "next": torch.rand(2)}

    messages = []
    assert both(program).left == {LOOKED: NBYTES}
    assert messages[0] == messages[1]


def test_an_error_in_an_overwrite_that_gradients_forbid():
    def program():
        made = init.normal_(parameter())
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            made.fill_(1)
        return {"": made}

    both(program)


def test_the_same_graph():
    def program():
        model = Model()
        parameters = list(model.parameters())  # as an optimiser does
        model(torch.arange(5)).square().sum().backward()
        with torch.no_grad():
            for each in parameters:
                each.sub_(each.grad, alpha=0.1)
        return dict(model.named_parameters()) | {f"{n} grad": p.grad for n, p in model.named_parameters()}

    both(program)


MODULES = {
    "linear": (lambda: nn.Linear(50, 40), (3, 50)),
    "convolution": (lambda: nn.Conv2d(20, 30, 3), (1, 20, 5, 5)),
    "recurrent": (lambda: nn.LSTM(30, 40), (2, 1, 30)),
    "transformer": (lambda: nn.TransformerEncoderLayer(32, 4, 64), (3, 1, 32)),
    "normed weights": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(50, 40)), (3, 50)),
    "orthogonal weights": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(40, 40)), (3, 40)),
    "old normed weights": (lambda: nn.utils.spectral_norm(nn.Linear(50, 40)), (3, 50)),
    "padding": (lambda: nn.Sequential(nn.Embedding(60, 40, padding_idx=1), nn.Linear(40, 40)), None),
    "several times": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2), (3, 1, 32)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_modules_of_torch(name):
    make, shape = MODULES[name]

    def program():
        module = make()
        found = module(torch.arange(4) if shape is None else torch.ones(shape))
        found = found[0] if isinstance(found, tuple) else found
        return dict(module.state_dict()) | {"outcome": found.detach()}

    both(program)


def test_copies_and_files():
    def program():
        model, buffer = Model(), io.BytesIO()
        torch.save(model.state_dict(), buffer)
        file = torch.load(io.BytesIO(buffer.getvalue()))
        assert {type(tensor) for tensor in file.values()} == {torch.Tensor}
        copied = dict(copy.deepcopy(model).named_parameters())
        assert {type(tensor) for tensor in copied.values()} == {nn.Parameter}
        return copied | {f"{n} saved": tensor for n, tensor in file.items()}

    both(program)


def test_a_tie_stays():
    def program():
        model = Model()
        model.layers[1].weight = model.layers[0].weight
        model.to(torch.bfloat16)
        assert model.layers[1].weight is model.layers[0].weight
        return dict(model.named_parameters())

    both(program)


def test_attributes_stay():
    with installed():
        made = parameter()
        made.note = "before"
        init.normal_(made)
        made.other = "while it waits"
        settle(made)
    assert vars(made) == {"note": "before", "other": "while it waits"}


def _with_gradient():
    made = parameter()
    made.grad = torch.ones(SHAPE)
    return made


def _with_hook():
    made = parameter()
    made.register_hook(lambda grad: grad)
    return made


def _with_late_hook():
    made = parameter()
    made.register_post_accumulate_grad_hook(lambda parameter: None)
    return made


def _not_contiguous():
    return nn.Parameter(torch.empty(50, 40).t())


def _lent():
    made = parameter()
    made.detach().numpy()
    return made


def _aliased():
    made = parameter()
    _KEPT.append(made.detach())
    return made


def _kept_as_a_storage():
    made = parameter()
    _KEPT.append(made.untyped_storage())
    return made


_KEPT = []
LEFT = {
    "small": lambda: parameter((10, 10)),
    "bf16": lambda: nn.Parameter(torch.empty(SHAPE, dtype=torch.bfloat16)),
    "fp64": lambda: nn.Parameter(torch.empty(SHAPE, dtype=torch.float64)),
    "no parameter": lambda: torch.empty(SHAPE),
    "with a gradient": _with_gradient,
    "with a hook": _with_hook,
    "with a late hook": _with_late_hook,
    "not contiguous": _not_contiguous,
    "strides of its own": lambda: nn.Parameter(torch.empty(*SHAPE, 1, 1).to(memory_format=torch.channels_last)),
    "memory of numpy": lambda: nn.Parameter(torch.from_numpy(np.zeros(SHAPE, np.float32))),
    "memory that numpy was given": _lent,
    "memory that another tensor has": _aliased,
    "memory that a storage object has": _kept_as_a_storage,
    "memory that processes share": lambda: nn.Parameter(torch.empty(SHAPE).share_memory_()),
}


@pytest.mark.parametrize("make", LEFT)
def test_left_to_the_original(make):
    def program():
        made = init.normal_(LEFT[make]())
        _KEPT.clear()
        return {"": made.detach()}

    assert not waits(lambda: init.normal_(LEFT[make]()))
    tally = both(program)
    assert not tally.spared
    assert not tally.left


def test_meta():
    assert not waits(lambda: init.uniform_(nn.Parameter(torch.empty(SHAPE, device="meta"))))


def test_another_generator():
    def program():
        return {"": init.normal_(parameter(), generator=torch.Generator().manual_seed(2))}

    assert not waits(lambda: program()[""])
    both(program)


def test_functions_that_draw_again_and_again():
    assert not waits(lambda: init.trunc_normal_(parameter()))
    assert not waits(lambda: init.orthogonal_(parameter()))


class Watch(torch.overrides.TorchFunctionMode):
    """Sees what a program calls."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta"), Watch, torch.enable_grad])
def test_modes_of_torch(mode):
    def program():
        made = parameter()
        with mode() as active:
            assert init.normal_(made) is made
        seen.append(getattr(active, "seen", None))
        return {"": made, "next": torch.rand(3)}

    seen = []
    both(program)
    assert seen[0] == seen[1]


def test_other_modes(monkeypatch):
    monkeypatch.setattr(initial, "why_not_now", lambda **options: "a mode")
    assert not waits(lambda: init.normal_(parameter()))


def test_small_tensors_are_initialised_at_once_by_default():
    with installed(min_elements=initial._MIN_ELEMENTS):
        assert not is_deferred(init.normal_(parameter((1000, 1000))))


def test_a_generator_that_is_not_known(monkeypatch):
    """The functions are left alone, and it is said once."""
    monkeypatch.setattr(initial, "_n_draws", lambda name, n_elements: n_elements + 624)
    tally = both(lambda: {"first": init.normal_(parameter()), "second": init.uniform_(parameter())})
    assert tally.left == {"the random generator of this torch is not the one that is known here": 0}


def test_a_draw_of_another_thread_in_the_middle(monkeypatch):
    """Its numbers come before all of ours, and are not given twice."""
    plain, drawn = initial.advance, []

    def slow(state, n_draws):
        if n_draws == 2000 and not drawn:
            drawn.append(_in_a_thread(lambda: torch.rand(5)))
        return plain(state, n_draws)

    torch.manual_seed(7)
    expected = [torch.rand(5), init.normal_(parameter()), torch.rand(3)]
    torch.manual_seed(7)
    monkeypatch.setattr(initial, "advance", slow)
    with installed():
        found = init.normal_(parameter())
        assert is_deferred(found)
        for one, other in zip([drawn[0], found, torch.rand(3)], expected, strict=True):
            assert torch.equal(one, other)


def test_another_thread_that_never_stops_to_draw(monkeypatch):
    plain = initial.advance

    def slow(state, n_draws):
        if n_draws == 2000:
            torch.rand(5)
        return plain(state, n_draws)

    monkeypatch.setattr(initial, "advance", slow)
    assert not waits(lambda: init.normal_(parameter()))


def test_several_threads_build():
    """In some order, as without us: no numbers are given twice."""

    def build():
        made.extend(init.uniform_(parameter()) for _ in range(10))

    made = []
    torch.manual_seed(7)
    threads = [threading.Thread(target=build) for _ in range(4)]
    with installed():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.manual_seed(7)
    expected = {tuple(torch.rand(SHAPE).flatten().tolist()) for _ in range(40)}
    assert {tuple(tensor.flatten().tolist()) for tensor in made} == expected


def test_after_it_is_taken_out_what_waits_still_settles():
    torch.manual_seed(7)
    expected = init.normal_(parameter())
    torch.manual_seed(7)
    with installed():
        found = init.normal_(parameter())
    assert is_deferred(found)
    assert not is_deferred(init.normal_(parameter()))
    assert torch.equal(found, expected)
