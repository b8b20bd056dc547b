"""Models of transformers are what they are without us, and their weights are converted and moved by plan."""

import contextlib
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
from transformers_four import fill_from_file, fill_from_state  # noqa: E402

from wan_loader.fastpath import Moves  # noqa: E402
from wan_loader.fastpath.accelerator import Accelerator  # noqa: E402
from wan_loader.fastpath.deferral.deferred import is_deferred  # noqa: E402
from wan_loader.fastpath.libraries.from_transformers import FromTransformers  # noqa: E402
from wan_loader.fastpath.moving import fetching  # noqa: E402
from wan_loader.fastpath.ours import ours  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
DTYPE = "dtype" if VERSION >= (4, 56) else "torch_dtype"
LOOKED_AT = "was cast on the CPU, as somebody looked at it"


def make_encoder():
    config = transformers.UMT5Config(
        vocab_size=150, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    torch.manual_seed(1)
    return transformers.UMT5EncoderModel(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A text encoder as WAN has one, in files of two dtypes: one file, several, and pickles."""
    root, encoder = tmp_path_factory.mktemp("encoder"), make_encoder()
    encoder.save_pretrained(root / "float32")
    encoder.save_pretrained(root / "shards", max_shard_size="100KB")
    encoder.to(torch.bfloat16).save_pretrained(root / "bfloat16")
    return root


@pytest.fixture
def target(device):
    """The device that models go to: a GPU, or what stands in for one."""
    return "cuda:0" if device == "cuda" else "cpu:0"


@pytest.fixture
def device_map(target):
    """All of a model on one device.

    transformers 4 has safetensors read for a device itself, and that knows no `cpu:0`; there it is given by parts.
    """
    return {"": target} if VERSION >= (5, 0) or target != "cpu:0" else {"shared": target, "encoder": target}


@pytest.fixture
def seam(device):
    """The seam with moves beside it, installed."""
    tally = Tally()
    planned = Moves(tally, kinds=(device,), io="buffered", min_nbytes=0)
    patches = Patches(tally)
    seam = FromTransformers(tally, planned)
    seam.install(patches)
    planned.install(patches)
    yield seam
    patches.undo()


@pytest.fixture
def logged():
    """What transformers tells while it loads."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def load(path, cls=None, **options):
    torch.manual_seed(3)
    cls = cls or transformers.UMT5EncoderModel
    options.setdefault("low_cpu_mem_usage", True)
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    return model, info


def plain(seam, path, *args, **options):
    """Load as without us."""
    with ours():
        return load(path, *args, **options)


def move_plainly(model, target):
    """Move as without us."""
    with ours():
        return model.to(target)


def ties(model):
    """Return which names are one object."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(names.values())


def same_bits(a, b):
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))


def assert_same(found, expected):
    """Compare two models in all that a program can see, values last, as looking at them settles what waits."""
    assert type(found) is type(expected)
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.training == expected.training
    assert getattr(found, "hf_device_map", None) == getattr(expected, "hf_device_map", None)
    assert ties(found) == ties(expected)
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = list(getattr(found, kind)()), list(getattr(expected, kind)())
        assert [name for name, _ in mine] == [name for name, _ in theirs]
        for (name, a), (_, b) in zip(mine, theirs, strict=True):
            facts = [(t.dtype, t.device.type, t.shape, t.stride(), t.requires_grad, t.is_leaf) for t in (a, b)]
            assert facts[0] == facts[1], name
            assert isinstance(a, torch.nn.Parameter) == isinstance(b, torch.nn.Parameter)
            assert vars(a).keys() - {"_cast", "_is_param"} == vars(b).keys(), name
    for (name, a), b in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert same_bits(a, b), name


def plain_types(model):
    return {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}


def waiting(model):
    return [name for name, parameter in model.named_parameters() if is_deferred(parameter)]


def assert_moves_by_one_plan(seam, found, expected, target):
    """A model moves, in which nobody has looked at anything, and becomes what one without us becomes."""
    objects = {name: id(parameter) for name, parameter in found.named_parameters()}
    found.to(target)
    assert seam.tally.total.n_plans == 1
    assert LOOKED_AT not in seam.tally.left
    assert {name: id(parameter) for name, parameter in found.named_parameters()} == objects
    assert found.encoder.embed_tokens.weight is found.shared.weight
    assert plain_types(found)
    assert_same(found, move_plainly(expected, target))


@pytest.mark.parametrize("files", ["bfloat16", "float32", "shards"])
def test_what_needs_no_conversion_moves_by_one_plan(seam, saved, target, files):
    expected, info = plain(seam, saved / files, **{DTYPE: "auto"})
    found, found_info = load(saved / files, **{DTYPE: "auto"})
    assert found_info == info
    assert_moves_by_one_plan(seam, found, expected, target)


@pytest.mark.parametrize(
    ("files", "dtype"),
    [
        ("float32", torch.bfloat16),
        ("float32", torch.float16),
        ("shards", torch.bfloat16),
        ("bfloat16", torch.float32),
        ("bfloat16", torch.float16),
    ],
)
def test_conversions_wait_for_the_move(seam, saved, logged, target, files, dtype):
    expected, info = plain(seam, saved / files, **{DTYPE: dtype})
    told = logged.copy()
    logged.clear()
    found, found_info = load(saved / files, **{DTYPE: dtype})
    assert found_info == info
    assert logged == told
    assert waiting(found)
    assert_moves_by_one_plan(seam, found, expected, target)


def test_conversions_are_done_when_somebody_looks(seam, saved):
    expected, _ = plain(seam, saved / "float32", **{DTYPE: torch.bfloat16})
    found, _ = load(saved / "float32", **{DTYPE: torch.bfloat16})
    assert waiting(found)
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert same_bits(found(tokens).last_hidden_state, expected(tokens).last_hidden_state)
    assert plain_types(found)
    assert_same(found, expected)
    assert not seam.tally.total.n_plans


@pytest.mark.skipif(
    VERSION < (4, 50), reason="accelerate makes parameters only of what moves to another kind of device"
)
@pytest.mark.parametrize(
    ("files", "dtype"),
    [("bfloat16", "auto"), ("shards", "auto"), ("shards", torch.bfloat16), ("bfloat16", torch.float16)],
)
def test_a_device_map_takes_one_plan(seam, saved, device_map, files, dtype, monkeypatch):
    held, original = [], fetching.load

    def noted(*args, **options):
        held.append(original(*args, **options))
        return held[-1]

    monkeypatch.setattr(fetching, "load", noted)
    expected, info = plain(seam, saved / files, device_map=device_map, **{DTYPE: dtype})
    found, found_info = load(saved / files, device_map=device_map, **{DTYPE: dtype})
    n_files = 1 if VERSION >= (5, 0) else len(list((saved / files).glob("*.safetensors")))
    assert seam.tally.total.n_plans == n_files
    assert LOOKED_AT not in seam.tally.left
    assert found_info == info
    assert plain_types(found)
    assert sum(result.report.nbytes_device for result in held) == sum(p.nbytes for p in expected.parameters())
    assert_same(found, expected)


@pytest.mark.skipif(VERSION < (4, 51), reason="transformers leaves what is missing on meta, before 4.51")
def test_what_is_missing_or_does_not_fit_is_told_as_ever(seam, saved, logged, target, tmp_path):
    state = make_encoder().state_dict()
    state["no.such.weight"] = torch.ones(3)
    del state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"], state["encoder.embed_tokens.weight"]
    state["encoder.final_layer_norm.weight"] = torch.ones(65)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((saved / "float32" / "config.json").read_text())
    options = {DTYPE: torch.bfloat16, "ignore_mismatched_sizes": True}
    expected, info = plain(seam, tmp_path, **options)
    told = logged.copy()
    logged.clear()
    found, found_info = load(tmp_path, **options)
    assert found_info == info
    assert info["unexpected_keys"]
    assert info["mismatched_keys"]
    assert logged == told
    assert waiting(found)
    assert_same(found.to(target), move_plainly(expected, target))
    assert LOOKED_AT not in seam.tally.left


def test_pickles_are_served_where_they_are_mapped(seam, saved, target, tmp_path):
    state = make_encoder().state_dict()
    del state["encoder.embed_tokens.weight"]  # else both are read, to see whether they are equal
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((saved / "float32" / "config.json").read_text())
    expected, info = plain(seam, tmp_path, **{DTYPE: torch.bfloat16})
    found, found_info = load(tmp_path, **{DTYPE: torch.bfloat16})
    assert found_info == info
    assert waiting(found)
    assert_same(found.to(target), move_plainly(expected, target))
    assert seam.tally.total.n_plans == 1
    assert LOOKED_AT not in seam.tally.left


def test_with_all_other_seams(saved, device, target):
    with Accelerator((device,), io="buffered", min_nbytes=0) as accelerator:
        found, info = load(saved / "shards", **{DTYPE: torch.bfloat16})
        assert waiting(found)
        found.to(target)
        assert accelerator.tally.components["UMT5EncoderModel"].n_plans == 1
        assert LOOKED_AT not in accelerator.tally.left
    expected, expected_info = load(saved / "shards", **{DTYPE: torch.bfloat16})
    assert info == expected_info
    assert_same(found, expected.to(target))


def test_what_is_written_to_before_the_move_keeps_it(seam, saved, target):
    edited = []
    for load_it in (lambda *a, **k: plain(seam, *a, **k), load):
        model, _ = load_it(saved / "float32", **{DTYPE: torch.bfloat16})
        with torch.no_grad():
            model.shared.weight[3] += 1
        edited.append(model)
    assert_same(edited[1].to(target), move_plainly(edited[0], target))


def test_little_is_left_alone(seam, saved):
    seam.moves.min_nbytes = 1 << 30
    found, _ = load(saved / "float32", **{DTYPE: torch.bfloat16})
    assert not waiting(found)
    assert plain_types(found)


@pytest.mark.skipif(VERSION < (5, 16), reason="transformers says which weights become one parameter from 5.16 on")
@pytest.mark.parametrize("has_map", [False, True])
def test_weights_that_become_one_parameter(seam, target, tmp_path, has_map):
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    options = {DTYPE: torch.bfloat16, "device_map": target if has_map else None, "cls": transformers.MixtralForCausalLM}
    expected, info = plain(seam, tmp_path, **options)
    found, found_info = load(tmp_path, **options)
    assert found_info == info
    if not has_map:
        assert waiting(found)
        assert "is merged or split on the CPU by transformers" in seam.tally.left
    assert_same(found.to(target), move_plainly(expected, target))
    assert seam.tally.total.n_plans == 1
    assert LOOKED_AT not in seam.tally.left


class TestAskedAlone:
    """What transformers 5 asks for otherwise than is known here is its own business."""

    pytestmark = pytest.mark.skipif(VERSION < (5, 0), reason="of transformers 5")

    @pytest.fixture
    def spawn(self, seam):
        """Ask for a weight inside a load of a model."""
        seam._thread.asked = SimpleNamespace(add=lambda asked: "together")
        with ThreadPoolExecutor(1) as pool:
            spawn = transformers.core_model_loading.spawn_materialize
            yield lambda *args, has_pool=True, **options: spawn(pool if has_pool else None, *args, **options)
        seam._thread.asked = None

    def test_outside_of_a_load(self, spawn, seam):
        tensor = torch.ones(3)
        assert spawn(tensor, "cpu", torch.float16) == "together"
        seam._thread.asked = None
        assert spawn(tensor, "cpu", torch.float16).result().dtype == torch.float16
        assert not seam.tally.left

    def test_without_threads(self, spawn, seam):
        assert spawn(torch.ones(3), "cpu", torch.float16, has_pool=False)().dtype == torch.float16
        assert list(seam.tally.left) == ["is read one by one by transformers"]

    @pytest.mark.skipif(VERSION >= (5, 16), reason="one function does both from 5.16 on")
    def test_shards_by_a_function_of_their_own(self, seam):
        sharding = SimpleNamespace(shard_tensor=lambda tensor, tensor_idx, device, dtype: tensor[:1].to(dtype))
        spawn = transformers.core_model_loading.spawn_tp_materialize
        assert spawn(None, torch.ones(3), sharding, None, "cpu", torch.float16)().shape == (1,)
        assert list(seam.tally.left) == ["is divided among devices by transformers"]

    @pytest.mark.skipif(VERSION < (5, 16), reason="other functions do that before 5.16")
    def test_shards(self, spawn, seam):
        sharding = SimpleNamespace(shard_tensor=lambda tensor, tensor_idx, device, dtype: tensor[:1].to(dtype))
        for _ in range(2):
            shard = spawn(torch.ones(3), "cpu", torch.float16, sharding_op=sharding, tensor_idx=None).result()
            assert shard.shape == (1,)
        assert list(seam.tally.left) == ["is divided among devices by transformers"]

    @pytest.mark.parametrize("name", ["spawn_materialize", "convert_and_load_state_dict_in_model"])
    def test_other_arguments_are_not_known(self, saved, monkeypatch, name):
        """Where one of both is another function, neither does anything."""
        tally, original = Tally(), getattr(transformers.core_model_loading, name)
        monkeypatch.setattr(transformers.core_model_loading, name, lambda *args, **options: original(*args, **options))
        if name.startswith("convert"):
            monkeypatch.setattr(transformers.modeling_utils, name, getattr(transformers.core_model_loading, name))
        patches = Patches(tally)
        FromTransformers(tally, Moves(tally, kinds=("cpu",), min_nbytes=0)).install(patches)
        try:
            found, _ = load(saved / "float32", **{DTYPE: torch.bfloat16})
        finally:
            patches.undo()
        assert plain_types(found)
        assert list(tally.left) == [f"transformers.core_model_loading.{name} is not the function that is known here"]

    def test_quantised_models(self, seam, monkeypatch):
        model = torch.nn.Linear(2, 2)
        config = SimpleNamespace(hf_quantizer=object())
        with pytest.raises(AttributeError):  # the original, which knows more of a model
            transformers.core_model_loading.convert_and_load_state_dict_in_model(model, {}, config, None)
        assert list(seam.tally.left) == ["is quantised by transformers"]


class TestTransformersFour:
    """Both ways in which transformers 4 gives weights, by stand-ins: this is what runs whatever is installed."""

    @pytest.fixture
    def fill(self, monkeypatch):
        """Install over a stand-in; return it as its module has it."""
        patches = []

        def install(stand_in, **options):
            tally = Tally()
            name = "_load_state_dict_into_meta_model"
            monkeypatch.setattr(transformers.modeling_utils, name, stand_in, raising=False)
            patches.append(Patches(tally))
            seam = FromTransformers(tally, Moves(tally, kinds=("cpu",), io="buffered", min_nbytes=0))
            seam.install(patches[-1])
            seam.moves.install(patches[-1])
            return seam, getattr(transformers.modeling_utils, name)

        yield install
        for patch in patches:
            patch.undo()

    @staticmethod
    def model(**options):
        layers = {"a": torch.nn.Linear(30, 20, **options), "wo": torch.nn.Linear(20, 10, **options)}
        return torch.nn.ModuleDict(layers)

    def empty(self, dtype=torch.bfloat16):
        return self.model(device="meta", dtype=dtype)

    @pytest.fixture
    def path(self, tmp_path):
        torch.manual_seed(2)
        state = {f"old.{name}": tensor for name, tensor in self.model().state_dict().items()}
        safetensors.torch.save_file({**state, "old.more": torch.ones(2)}, tmp_path / "model.safetensors")
        return str(tmp_path / "model.safetensors")

    @staticmethod
    def arguments(stand_in, path, dtype=None, keep=None):
        """Return what a stand-in is given, beside a model."""
        state = safetensors.torch.load_file(path)
        if stand_in is fill_from_state:
            state = {name.replace("old.", "pre."): tensor for name, tensor in state.items()}
            options = {"dtype": dtype, "keep_in_fp32_modules": keep and [keep]}
            return [state, "pre.", [name for name in state if name != "pre.more"]], options
        names = {name.removeprefix("old."): name for name in state}
        empty = {name: state[old].to("meta") for name, old in names.items()}
        expected = [name for name in names if name != "more"]
        return [empty, path, expected, names], {"keep_in_fp32_regex": keep and re.compile(keep)}

    @pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"": "cpu:0"}])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("stand_in", [fill_from_file, fill_from_state])
    def test_weights_wait_or_are_there(self, fill, path, stand_in, dtype, device_map):
        args, options = self.arguments(stand_in, path, dtype, keep="wo")
        expected, found = self.empty(dtype), self.empty(dtype)
        stand_in(expected, *args, **options, device_map=device_map)
        seam, given = fill(stand_in)
        given(found, *args, **options, device_map=device_map)
        if device_map == {"": "cpu:0"}:
            assert seam.tally.total.n_plans == 1
        else:
            assert bool(waiting(found)) == (dtype != torch.float32)
            found.to("cpu:0")
        assert seam.tally.total.n_plans == 1
        assert LOOKED_AT not in seam.tally.left
        assert plain_types(found)
        for name, tensor in found.state_dict().items():
            assert tensor.dtype == expected.state_dict()[name].dtype
            assert same_bits(tensor, expected.state_dict()[name])

    @pytest.mark.parametrize(
        ("option", "value", "reason"),
        [
            ("hf_quantizer", object(), "is quantised by transformers"),
            ("device_mesh", object(), "is divided among devices by transformers"),
            ("cpu_offload_index", {}, "goes to a disk"),
            ("device_map", {"a": "cpu", "wo": "cpu:0"}, "goes to several devices"),
            ("device_map", {"": "disk"}, "goes to something else than a device"),
            ("device_map", {"": "meta"}, "goes to a device of kind meta"),
        ],
    )
    def test_what_is_not_known_is_left(self, fill, path, option, value, reason):
        seam, given = fill(fill_from_file)
        args, options = self.arguments(fill_from_file, path)
        found = self.empty()
        with contextlib.suppress(RuntimeError):
            given(found, *args, **{**options, option: value})
        assert list(seam.tally.left) == [reason]
        assert not waiting(found)

    def test_a_dtype_that_is_not_known_is_left(self, fill, path, monkeypatch):
        def fill_otherwise(model, state_dict, device_map=None, hf_quantizer=None):
            return state_dict

        seam, given = fill(fill_otherwise)
        state = safetensors.torch.load_file(path)
        assert given(self.empty(), state) is state
        assert list(seam.tally.left) == ["is of a dtype that is not found as in transformers known here"]

    def test_other_arguments_are_not_known(self, fill):
        def fill_otherwise(model, weights):
            return weights

        seam, given = fill(fill_otherwise)
        assert given is fill_otherwise
        name = "transformers.modeling_utils._load_state_dict_into_meta_model"
        assert list(seam.tally.left) == [f"{name} is not the function that is known here"]

    def test_a_part_of_the_prefix_keeps_nothing(self, fill, path):
        args, options = self.arguments(fill_from_state, path, torch.float16, keep="pre")
        expected, found = self.empty(torch.float16), self.empty(torch.float16)
        fill_from_state(expected, *args, **options)
        _, given = fill(fill_from_state)
        given(found, *args, **options)
        assert waiting(found)
        assert {parameter.dtype for parameter in found.parameters()} == {torch.float16}

    def test_copies_are_told(self, seam):
        copied = seam._instead_of_copy(lambda *args: args)
        state = {"a": torch.ones(3)}
        assert copied(None, state, "", True) == (None, state, "", True)
        assert not seam.tally.left
        assert copied(None, state, "") == (None, state, "", False)
        assert seam.tally.left == {"is copied by transformers, as low_cpu_mem_usage is not True": 12}

    @pytest.mark.parametrize("stand_in", [fill_from_file, fill_from_state])
    def test_what_is_wrong_is_the_originals_to_tell(self, fill, path, stand_in):
        args, options = self.arguments(stand_in, path, torch.bfloat16)
        _, given = fill(stand_in)
        with pytest.raises(AttributeError):
            given(torch.nn.Linear(2, 2), *args, **options)
        with pytest.raises(TypeError):
            given()


@pytest.mark.skipif(VERSION >= (4, 50), reason="transformers copies weights before 4.50")
def test_copies_are_told(seam, saved):
    expected, _ = plain(seam, saved / "float32", low_cpu_mem_usage=False, **{DTYPE: torch.bfloat16})
    found, _ = load(saved / "float32", low_cpu_mem_usage=False, **{DTYPE: torch.bfloat16})
    assert "is copied by transformers, as low_cpu_mem_usage is not True" in seam.tally.left
    assert_same(found, expected)
