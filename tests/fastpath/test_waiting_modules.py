"""Modules that are cast on the CPU and move later: one plan, no cast on the CPU, the same objects as without us."""

import gc
import io
import threading
import weakref

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from tied_net import WIDTH, Net  # noqa: E402

from wan_loader.errors import DeviceMemoryError  # noqa: E402
from wan_loader.fastpath import Moves  # noqa: E402
from wan_loader.fastpath.deferral.deferred import defer_all, is_deferred  # noqa: E402
from wan_loader.fastpath.deferral.deferred_tensor import living  # noqa: E402
from wan_loader.fastpath.moving import fetching  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402

LOOKED = "was cast on the CPU, as somebody looked at it"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors.torch.save_model(Net(), str(path))
    return path


@pytest.fixture
def build(path):
    """Modules as programs get them: their tensors are views of a mapped file."""

    def build():
        return Net.mapped(path)

    build.path = path
    return build


@pytest.fixture
def away(device):
    """Another device than the CPU; the CPU by its index is one, too, as far as torch's bookkeeping goes."""
    return torch.device(device, 0)


@pytest.fixture
def seam(tally, away):
    patches = Patches(tally)
    seam = Moves(tally, kinds=(str(away),), io="buffered", min_nbytes=0, min_memory_nbytes=1 << 40)
    seam.install(patches)
    yield seam
    patches.undo()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    if living():
        gc.collect()
    assert not living()
    assert not {"data", "_make_subclass"} & vars(torch.Tensor).keys()


def states(module):
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def same(module, expected):
    """The module is, to the bit and in all that can be seen, what another one is."""
    found, wanted = dict(module.state_dict()), dict(expected.state_dict())
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.device) == (wanted[name].dtype, wanted[name].device)
        assert torch.equal(tensor.contiguous().view(torch.uint8), wanted[name].contiguous().view(torch.uint8))
    for part, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert (type(part), part.requires_grad) == (torch.nn.Parameter, other.requires_grad)
        assert vars(part) == vars(other)
    for part, other in zip(module.buffers(), expected.buffers(), strict=True):
        assert type(part) is type(other) is torch.Tensor
    assert module.tied.weight is module.first.weight


def identities(module):
    return {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "to_cpu": lambda m: m.to("cpu", torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_waits_and_moves_by_one_plan(build, seam, tally, cast, away):
    module = build()
    before = identities(module)
    module.second.bias.requires_grad_(False)
    cast(module)
    assert identities(module) == before
    assert is_deferred(module.first.weight)
    assert isinstance(module.first.weight, torch.nn.Parameter)
    assert is_deferred(module.scale)
    assert tally.total.n_plans == 0
    module.to("cpu")
    assert is_deferred(module.first.weight), "a move to where it is leaves it waiting"
    module.to(away)
    assert identities(module) == before
    assert tally.total.n_plans == 1
    assert tally.spared == {"casts on the CPU": 5}
    assert not tally.left
    plain = build()
    plain.second.bias.requires_grad_(False)
    seam.min_nbytes = 1 << 40
    same(module, cast(plain).to(away))


def test_only_a_cast_on_the_cpu_waits(build, seam):
    module = build().to("cpu", torch.bfloat16)
    assert is_deferred(module.first.weight)
    assert not any(is_deferred(tensor) for tensor in build().to(torch.float32).state_dict().values())
    assert not any(is_deferred(tensor) for tensor in build().to("meta", torch.bfloat16).state_dict().values())
    with torch.inference_mode():
        assert not is_deferred(build().bfloat16().first.weight)
    seam.min_nbytes = 1 << 20
    assert not is_deferred(build().bfloat16().first.weight)


def test_what_is_in_no_file_does_not_wait(seam, tally):
    module = Net().bfloat16()
    assert not any(map(is_deferred, module.state_dict().values()))
    assert tally.left["does not lie in the mapping of a file"] > WIDTH * WIDTH * 4


def test_a_second_cast_is_the_original_s(build, seam, tally, away):
    module = build().bfloat16().half().to(away)
    seam.min_nbytes = 1 << 40
    same(module, build().bfloat16().half().to(away))
    assert tally.total.nbytes == WIDTH * 8, "what is no float"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_move_with_another_dtype_casts_once_more(build, seam, tally, away, dtype):
    module = build().bfloat16().to(away, dtype)
    assert tally.total.n_plans == 1
    assert tally.spared == {"casts on the CPU": 5}
    seam.min_nbytes = 1 << 40
    same(module, build().bfloat16().to(away, dtype))


def test_a_move_to_a_smaller_dtype_is_the_original_s(build, seam, tally, away):
    module = build().double().to(away, torch.bfloat16)
    assert tally.left["waits for a cast to a larger dtype"] >= WIDTH * WIDTH * 8
    assert not tally.spared
    seam.min_nbytes = 1 << 40
    same(module, build().double().to(away, torch.bfloat16))


def fill(tensor, value):
    with torch.no_grad():
        tensor.fill_(value)


def replace(module):
    module.first.weight.data = torch.full((WIDTH, WIDTH), 3, dtype=torch.bfloat16)


def register(module):
    module.second.bias = torch.nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))


def add_data(module):
    module.first.weight.data += 1


def add_low_rank(module):
    """As LoRA weights are merged."""
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(shape, generator=generator).bfloat16() for shape in ((WIDTH, 2), (2, WIDTH)))
    with torch.no_grad():
        module.second.weight += up @ down


EDITS = {
    "data": add_data,
    "one": lambda m: m.first.weight.data.__setitem__((3, 5), 7),
    "operation": lambda m: fill(m.first.weight, 2),
    "replaced": replace,
    "numpy": lambda m: m.first.weight.detach().view(torch.int16).numpy().__setitem__((0, 0), 77),
    "state_dict": lambda m: fill(m.state_dict()["second.bias"], 4),
    "alias": lambda m: fill(m.first.weight.detach().detach(), 5),
    "view": lambda m: fill(m.first.weight[2:4], 6),
    "parameter": register,
    "low_rank": add_low_rank,
    "buffer": lambda m: m.scale.zero_(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_survive_a_move(build, seam, tally, edit, away):
    module = build().bfloat16()
    before = identities(module)
    edit(module)
    module.to(away)
    if edit is not register:
        assert identities(module) == before
    assert tally.total.n_plans == 1
    assert tally.spared["casts on the CPU"] == 4, "all but the one that was edited"
    seam.min_nbytes = 1 << 40
    plain = build().bfloat16()
    edit(plain)
    same(module, plain.to(away))


def test_saving_and_moving(build, seam, tally, tmp_path, away):
    """Who saves looks at aliases; what moves after that is in memory, and is no cast any more."""
    module = build().bfloat16()
    safetensors.torch.save_model(module, str(tmp_path / "saved.safetensors"))
    assert is_deferred(module.first.weight)
    seam.min_memory_nbytes = 0
    module.to(away)
    assert tally.total.n_plans == 2, "integers still are in their file"
    assert not tally.spared
    seam.min_nbytes = 1 << 40
    plain = build().bfloat16()
    safetensors.torch.save_model(plain, str(tmp_path / "plain.safetensors"))
    assert (tmp_path / "saved.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    same(module, plain.to(away))


def test_edits_of_the_source_do_not_reach_the_cast(build, seam, away):
    """A cast has the values of its moment, as without us."""
    module, plain = build(), build()
    source = module.first.weight.detach()
    module.bfloat16()
    source.zero_()
    module.to(away)
    seam.min_nbytes = 1 << 40
    same(module, plain.bfloat16().to(away))


def run(module):
    """Compute outputs and gradients, as far as they can be told apart."""
    x = torch.linspace(-1, 1, 3 * WIDTH, dtype=module.first.weight.dtype).view(3, WIDTH)
    y = module(x)
    y.float().square().sum().backward()
    with torch.inference_mode():
        z = module(x).clone()
    return [y.detach(), z, *(parameter.grad for parameter in module.parameters())]


def test_computing_on_the_cpu(build, seam, tally):
    module = build().bfloat16()
    found = run(module)
    assert tally.left[LOOKED] == 2 * (2 * WIDTH * WIDTH + 3 * WIDTH), "each was cast once"
    seam.min_nbytes = 1 << 40
    plain = build().bfloat16()
    for one, other in zip(found, run(plain), strict=True):
        assert torch.equal(one, other)
    same(module, plain)
    assert tally.total.n_plans == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_modes_of_torch_do_not_reach_a_cast(build, seam, mode):
    module = build().bfloat16()
    with mode():
        outcome = module(torch.ones(2, WIDTH, dtype=torch.bfloat16, device="cpu"))
    assert not module.first.weight.is_inference()
    seam.min_nbytes = 1 << 40
    plain = build().bfloat16()
    same(module, plain)
    assert torch.equal(outcome, plain(torch.ones(2, WIDTH, dtype=torch.bfloat16)))


def test_transforms_of_functions(build, seam):
    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).float().sum()

    found = []
    for min_nbytes in (0, 1 << 40):
        seam.min_nbytes = min_nbytes
        module, x = build().bfloat16(), torch.ones(2, WIDTH, dtype=torch.bfloat16)
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        found.append([torch.vmap(module)(x), *torch.func.grad(loss)(parameters).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_optimiser_goes_on(build, seam, tally, away):
    module = build().bfloat16()
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    module.to(away)
    assert tally.total.n_plans == 1
    module(torch.ones(2, WIDTH, dtype=torch.bfloat16, device=away)).float().sum().backward()
    before = module.first.weight.detach().clone()
    optimiser.step()
    assert not torch.equal(module.first.weight, before)
    assert not any(map(is_deferred, optimiser.param_groups[0]["params"]))


def test_weak_references_stay(build, seam, tally, away):
    module = build().bfloat16()
    weak, moved = weakref.ref(module.first.weight), weakref.ref(module.second.weight)
    module.first.weight.sum()
    assert weak() is module.first.weight
    module.to(away)
    assert moved() is module.second.weight
    assert type(moved()) is torch.nn.Parameter
    assert tally.total.n_plans == 1


def test_parametrizations(build, seam, away):
    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    found = []
    for min_nbytes in (0, 1 << 40):
        seam.min_nbytes = min_nbytes
        module = build().bfloat16()
        torch.nn.utils.parametrize.register_parametrization(module.second, "weight", Double())
        module.to(away)
        found.append(module)
    same(*found)


def test_hooks_of_parameters_stay(build, seam):
    module, called = build(), []
    module.first.weight.register_hook(lambda grad: called.append(1))
    module.second.weight.register_post_accumulate_grad_hook(lambda parameter: called.append(2))
    module.bfloat16()
    assert not is_deferred(module.first.weight)
    assert not is_deferred(module.second.weight)
    module(torch.ones(2, WIDTH, dtype=torch.bfloat16)).sum().backward()
    assert sorted(called) == [1, 2]


@pytest.mark.parametrize("first", ["require", "cast"])
def test_a_buffer_that_requires_a_gradient_stays_in_the_graph(build, seam, tally, away, first):
    module = build()
    before = module.scale
    if first == "require":
        before.requires_grad_()
    module.to(torch.bfloat16)
    if first == "cast":
        before = module.scale.requires_grad_()
    module.to(away)
    module.scale.sum().backward()
    assert not module.scale.is_leaf
    assert torch.equal(before.grad, torch.ones(WIDTH))
    assert tally.total.n_plans == 1


@pytest.mark.parametrize("owner", ["first", "second", ""])
@pytest.mark.parametrize("casts", [False, True])
def test_a_parameter_that_is_a_buffer_elsewhere(build, seam, away, owner, casts):
    """Which of both the original comes to first decides whether they stay one object."""
    found = []
    for move in (torch.nn.Module.to.__wrapped__, torch.nn.Module.to):
        module = build().requires_grad_(False)
        module.get_submodule(owner).register_buffer("both", module.second.weight)
        move(module, torch.bfloat16) if casts else move(module, away)
        found.append(module.get_submodule(owner).both is module.second.weight)
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_what_torch_jit_has_compiled_is_the_original_s(build, seam, tally, away):
    module = build()
    module.second.register_buffer("more", safetensors.torch.load_file(build.path)["scale"])
    module.second = torch.jit.script(module.second.requires_grad_(False))
    module.to(torch.bfloat16)
    assert is_deferred(module.first.weight)
    assert not any(map(is_deferred, (*module.second.parameters(), *module.second.buffers())))
    torch.jit.save(module.second, io.BytesIO())
    module.to(away)
    assert tally.total.n_plans == 1
    assert torch.equal(module.second.more.cpu(), build().scale.to(torch.bfloat16))


def test_a_graph_that_refers_to_a_parameter(build, seam):
    """A parameter that a graph refers to cannot become another tensor in place: it is cast at once."""
    module = build()
    before = module(torch.ones(2, WIDTH)).sum()
    module.bfloat16()
    assert not is_deferred(module.first.weight)
    del before


def test_two_parameters_on_the_same_bytes(path, seam, tally, away):
    found = []
    for min_nbytes in (0, 1 << 40):
        seam.min_nbytes = min_nbytes
        weight = safetensors.torch.load_file(path)["first.weight"]
        module = torch.nn.ParameterList([torch.nn.Parameter(weight), torch.nn.Parameter(weight[7:])]).bfloat16()
        module.to(away)
        with torch.no_grad():
            module[0].fill_(0)
        found.append(module[1])
        assert [type(parameter) for parameter in module] == [torch.nn.Parameter] * 2
    assert torch.equal(*found)
    assert found[0].any()
    assert tally.total.n_plans == 1


def test_a_plan_that_fails_changes_nothing(build, seam, tally, monkeypatch, away):
    def fail(*args, **options):
        raise DeviceMemoryError("no room")

    module = build().bfloat16()
    before = identities(module)
    monkeypatch.setattr(fetching, "load", fail)
    module.to(away)
    assert tally.total.n_plans == 0
    assert "DeviceMemoryError: no room" in tally.left
    seam.min_nbytes = 1 << 40
    same(module, build().bfloat16().to(away))
    assert identities(module) == before


def test_ctrl_c_in_a_plan_changes_nothing(build, seam, tally, monkeypatch, away):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    module = build().bfloat16()
    monkeypatch.setattr(fetching, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        module.to(away)
    assert all(map(is_deferred, [*module.parameters(), module.scale]))
    monkeypatch.undo()
    module.to(away)
    assert tally.total.n_plans == 1


def add(tensor):
    with torch.no_grad():
        tensor += 1


MEANWHILE = {
    "parameter": lambda m: add(m.second.weight),
    "alias": lambda m: add(m.state_dict()["second.weight"]),
    "buffer": lambda m: add(m.scale),
    "alias_of_buffer": lambda m: add(m.scale.detach()),
}


@pytest.mark.parametrize("edit", MEANWHILE.values(), ids=MEANWHILE)
def test_edits_during_the_load_survive(build, seam, tally, monkeypatch, edit, away):
    plain_load = fetching.load

    def slow(*args, **options):
        loaded = plain_load(*args, **options)
        edit(module)
        return loaded

    module = build().bfloat16()
    monkeypatch.setattr(fetching, "load", slow)
    module.to(away)
    monkeypatch.undo()
    assert tally.spared == {"casts on the CPU": 4}
    seam.min_nbytes = 1 << 40
    plain = build().bfloat16()
    edit(plain)
    same(module, plain.to(away))


def test_threads_that_look_while_one_moves(build, seam, away):
    """Several must not move one module at once: torch itself may then copy memory that another has let go of."""
    module, together, failures = build().bfloat16(), threading.Barrier(4), []

    def move(look):
        together.wait()
        try:
            module.second.weight.sum() if look else module.to(away)
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=move, args=(look,)) for look in (False, True, True, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    module.to(away)
    seam.min_nbytes = 1 << 40
    same(module, build().bfloat16().to(away))


def test_pieces_that_were_cast_before(build, seam, tally, path, away):
    """What a library has put in place of parameters, with tensors of other dtypes beside it."""
    sources = safetensors.torch.load_file(path)
    dtypes = {"first.weight": torch.bfloat16, "first.bias": torch.float16, "scale": torch.float64}
    found = []
    for defers in (True, False):
        module = build()
        cast = {name: sources[name] for name in dtypes}
        cast = defer_all(cast, dtypes, tally) if defers else {n: t.to(dtypes[n]) for n, t in cast.items()}
        module.load_state_dict(cast, assign=True, strict=False)
        module.tied.weight = module.first.weight
        found.append(module.to(away))
        seam.min_nbytes = 1 << 40
    same(*found)
    assert tally.total.n_plans == 1
    assert tally.spared == {"casts on the CPU": 3}
