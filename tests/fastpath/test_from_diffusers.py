"""Programs that use diffusers: with our loader in its place, they get what they get without, and by plan.

Every case runs twice on a tiny pipeline, plain and accelerated, and everything that a program can see is compared. The
device `cpu:0` stands for a GPU: a move there is planned, and fills memory of its own. Where there is a GPU, the cases
run on it, too.
"""

import hashlib
import logging
import shutil
import sys
import threading
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import wraps

import pytest

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
from diffusers.models import model_loading_utils, modeling_utils  # noqa: E402

import wan_loader.fastpath.deferral.deferred_tensor  # noqa: E402, F401  (before `counted_casts` replaces what it looks at)
from wan_loader.errors import DeviceMemoryError  # noqa: E402
from wan_loader.fastpath.accelerator import Accelerator  # noqa: E402
from wan_loader.fastpath.deferral.deferred import is_deferred, settle  # noqa: E402
from wan_loader.fastpath.libraries.from_diffusers import FromDiffusers  # noqa: E402
from wan_loader.fastpath.moving import fetching  # noqa: E402
from wan_loader.fastpath.moving.moves import Moves  # noqa: E402
from wan_loader.provenance.prove import prove  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")

HAS_WAN = hasattr(diffusers, "WanPipeline")
LIBRARIES = ("diffusers", "accelerate", "transformers")
#: Until 0.32, accelerate loads such models, and several files; it does not do so with the safetensors of today.
HAS_DEVICE_MAPS = pytest.mark.skipif(not HAS_WAN, reason="this diffusers leaves device maps to accelerate")
Model = getattr(diffusers, "WanTransformer3DModel", diffusers.UNet2DModel)


def make_model():
    """Make a model of which some parts stay in fp32, if this diffusers has one."""
    if HAS_WAN:
        return Model(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
    return Model(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def make_pipeline():
    if not HAS_WAN:
        return diffusers.DDPMPipeline(make_model(), diffusers.DDPMScheduler())
    from transformers import UMT5Config, UMT5EncoderModel

    text = UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(text),
        vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(),
        transformer=make_model(),
    )


@pytest.fixture
def target(device):
    """Where weights move to."""
    return {"cpu": "cpu:0"}.get(device, device)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The directory of a pipeline; models are in several files. Tests must not change it."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(root, **({"max_shard_size": "60KB"} if HAS_WAN else {}))
    return root


@pytest.fixture(scope="module")
def model_dir(root):
    return root / ("transformer" if HAS_WAN else "unet")


class Fast:
    """The fast path, installed for a while, and its counts."""

    def __init__(self, kinds=("cpu", "cuda")):
        self.accelerator = Accelerator(kinds, io="buffered", min_nbytes=0)
        self.tally = self.accelerator.tally
        self.n_plain_casts = 0
        """How many casts the libraries have done on the CPU in the plain run."""
        self.n_waiting = 0
        """How many tensors wait in what the program has made."""

    @contextmanager
    def installed(self):
        with self.accelerator:
            yield self

    @property
    def n_plans(self):
        return self.tally.total.n_plans

    def assert_one_plan_each(self, pipe):
        """Each model was moved by one plan."""
        models = Counter(type(part).__name__ for part in pipe.components.values() if isinstance(part, torch.nn.Module))
        assert {name: served.n_plans for name, served in self.tally.components.items() if name in models} == models

    def assert_moved(self, made):
        """Nothing of ours is left, and nothing lies in the files any more."""
        tensors = tensors_of(made)
        assert self.n_waiting == 0
        assert {type(t) for t in tensors.values()} <= {torch.Tensor, torch.nn.Parameter}
        assert prove(tensors).ranges == {}

    def assert_no_casts(self):
        """Everything that is cast on the CPU without us was cast on the way."""
        assert self.tally.spared["casts on the CPU"] == self.n_plain_casts
        assert not any("cast on the CPU" in reason for reason in self.tally.left)


@contextmanager
def counted_casts():
    """Collect the conversions that libraries do by `Tensor.to`."""
    found, original = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        caller = sys._getframe(1).f_globals["__name__"]
        if (
            result.dtype != tensor.dtype
            and not tensor.is_meta
            and caller.startswith(("diffusers.", "accelerate.", "transformers."))
        ):
            found.append(result.dtype)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        yield found


@contextmanager
def watched():
    """Collect what diffusers logs and what it warns of."""
    said = []

    class Handler(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
    finally:
        logger.removeHandler(handler)
    said += [str(warning.message) for warning in caught]


def bits(tensor):
    if tensor.is_meta:
        return None
    data = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def facts(name, first_name, tensor):
    """All that can be told of a tensor; one that waits is settled for it."""
    settle(tensor)
    return (
        name, first_name, isinstance(tensor, torch.nn.Parameter), tensor.dtype, tensor.device, tensor.shape,
        tensor.stride(), tensor.requires_grad, tensor.is_leaf, sorted(vars(tensor)), bits(tensor),
    )  # fmt: skip


def state(module):
    """All that can be told of the tensors of a module, in order, and which of them are one object."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    objects = {}
    return [facts(name, objects.setdefault(id(tensor), name), tensor) for name, tensor in tensors]


def about(thing):
    """All that can be told of a component, or of a pipeline."""
    parts = getattr(thing, "components", {"": thing})
    return {
        name: (
            type(part),
            dict(getattr(part, "config", {}) or {}) if not hasattr(getattr(part, "config", None), "to_dict") else 0,
            getattr(part, "hf_device_map", None),
            [(n, m.training, type(getattr(m, "_hf_hook", None))) for n, m in modules(part)],
            state(part) if isinstance(part, torch.nn.Module) else None,
        )
        for name, part in parts.items()
    }


def modules(part):
    return part.named_modules() if isinstance(part, torch.nn.Module) else ()


def tensors_of(thing):
    parts = getattr(thing, "components", {"": thing}).values()
    found = [part for part in parts if isinstance(part, torch.nn.Module)]
    return {f"{i}.{n}": t for i, m in enumerate(found) for n, t in [*m.named_parameters(), *m.named_buffers()]}


def n_waiting(thing):
    return sum(map(is_deferred, tensors_of(thing).values()))


def run(program, fast=None):
    """Return what a program made, what there is to tell of it, and what was said."""
    with watched() as said:
        made = program()
    if fast is not None:
        fast.n_waiting = n_waiting(made)
    return made, about(made), said


def both(program, fast=None, unable=()):
    """Run a program plain and accelerated, compare, and return the accelerated one's result and the fast path.

    Some versions fail where they are without us, by errors that `unable` names: those cases are left out.
    """
    fast = fast or Fast()
    with counted_casts() as casts:
        try:
            _, expected, said = run(program)
        except unable as error:
            pytest.skip(f"diffusers {diffusers.__version__} without us: {error}")
    fast.n_plain_casts = len(casts)
    with fast.installed():
        made, found, said_too = run(program, fast)
    assert said_too == said
    assert found == expected
    return made, fast


def load_pipeline(root, dtype=torch.bfloat16, **options):
    options |= {"tokenizer": None} if HAS_WAN else {}
    return diffusers.DiffusionPipeline.from_pretrained(root, torch_dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_a_pipeline_that_moves(root, target, dtype):
    made, fast = both(lambda: load_pipeline(root, dtype).to(target))
    fast.assert_no_casts()
    fast.assert_moved(made)
    fast.assert_one_plan_each(made)


@pytest.mark.gpu
def test_a_pipeline_with_a_device_map(root):
    made, fast = both(lambda: load_pipeline(root, device_map="cuda"))
    fast.assert_moved(made)
    assert fast.n_plans == sum(map(n_files, root.iterdir()))


def test_a_model_that_is_filled_tensor_by_tensor(root, target):
    """With `low_cpu_mem_usage=False`, diffusers copies what is in the files into weights that it has made before."""
    options = {"torch_dtype": torch.bfloat16, "low_cpu_mem_usage": False}
    cls, path = (diffusers.AutoencoderKLWan, root / "vae") if HAS_WAN else (Model, root / "unet")
    made, fast = both(lambda: cls.from_pretrained(path, **options).to(target))
    fast.assert_moved(made)


def objects(thing):
    return {name: id(tensor) for name, tensor in tensors_of(thing).items() if isinstance(tensor, torch.nn.Parameter)}


def test_weights_are_the_same_objects_after_a_move(root, target):
    with Fast().installed() as fast:
        pipe = load_pipeline(root)
        before = {
            name: id(tensor) for name, tensor in tensors_of(pipe).items() if isinstance(tensor, torch.nn.Parameter)
        }
        pipe.to(target)
        after = {
            name: id(tensor) for name, tensor in tensors_of(pipe).items() if isinstance(tensor, torch.nn.Parameter)
        }
    assert after == before
    fast.assert_one_plan_each(pipe)


@pytest.mark.skipif(not HAS_WAN, reason="this diffusers has no such pipeline")
def test_a_component_that_is_given_keeps_its_dtype(root, target):
    def program():
        vae = diffusers.AutoencoderKLWan.from_pretrained(root / "vae", torch_dtype=torch.float32)
        return load_pipeline(root, vae=vae).to(target)

    made, fast = both(program)
    assert made.vae.dtype == torch.float32
    fast.assert_moved(made)
    fast.assert_one_plan_each(made)


def n_files(directory):
    return len(list(directory.glob("*.safetensors")))


@HAS_DEVICE_MAPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("as_dict", [False, True])
def test_a_device_map(model_dir, target, as_dict, dtype):
    def program(device_map):
        return Model.from_pretrained(
            model_dir, torch_dtype=dtype, device_map={"": device_map} if as_dict else device_map
        )

    fast = Fast()
    with counted_casts() as casts:  # not for `cpu:0`, where accelerate makes no parameters
        _, expected, said = run(lambda: program(target.removesuffix(":0")))
    fast.n_plain_casts = len(casts)
    with fast.installed():
        made, _, said_too = run(lambda: program(target), fast)
    fast.assert_no_casts()
    assert made.hf_device_map == {"": target if as_dict else torch.device(target)}
    made.hf_device_map = {"": target.removesuffix(":0") if as_dict else torch.device(target.removesuffix(":0"))}
    assert about(made) == expected
    assert said_too == said
    fast.assert_moved(made)
    assert fast.n_plans == n_files(model_dir), "one for each file"


class TestGivenTwice:
    """A device map has weights given as if for the CPU, fetched, and what is left given as it was."""

    @pytest.fixture
    def given(self, monkeypatch):
        """The numbers of weights that the function of diffusers was called with."""
        original, given = model_loading_utils.load_model_dict_into_meta, []

        @wraps(original)
        def told(model, state_dict, **options):
            given.append(len(state_dict))
            return original(model, state_dict, **options)

        for module in (model_loading_utils, modeling_utils):
            monkeypatch.setattr(module, "load_model_dict_into_meta", told, raising=False)
        return given

    @HAS_DEVICE_MAPS
    def test_what_was_fetched_is_not_given_again(self, model_dir, target, given):
        with Fast().installed(), watched():
            made = Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16, device_map=target)
        assert sum(given) == len(made.state_dict())
        assert given[1::2] == [0] * n_files(model_dir)

    @HAS_DEVICE_MAPS
    def test_what_could_not_be_fetched_is(self, model_dir, target, given, monkeypatch):
        def fail(*args, **options):
            raise DeviceMemoryError("no room")

        with watched():
            expected = state(Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16, device_map="cpu"))
            given.clear()
            monkeypatch.setattr(fetching, "load", fail)
            with Fast().installed() as fast:
                made = Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16, device_map=target)
        assert [facts[-1] for facts in state(made)] == [facts[-1] for facts in expected]
        # on `cpu:0`, weights that need no conversion are where they belong in their files, too
        assert all(0 < again <= first for first, again in zip(given[0::2], given[1::2], strict=True))
        assert any("no room" in reason for reason in fast.tally.left)

    def test_names_are_asked_for_once(self, model_dir, monkeypatch):
        """The walk through a model takes long, and diffusers takes it for each file."""
        original, walks = torch.nn.Module.state_dict, []

        def state_dict(module, *args, **options):
            walks.extend([1] if isinstance(module, Model) else [])
            return original(module, *args, **options)

        monkeypatch.setattr(torch.nn.Module, "state_dict", state_dict)
        with Fast().installed(), watched():
            made = Model.from_pretrained(model_dir)
        assert "state_dict" not in vars(made)
        if hasattr(model_loading_utils, "_load_shard_file"):
            assert len(walks) == 1 < n_files(model_dir)


@HAS_DEVICE_MAPS
def test_a_model_that_stays(model_dir):
    """Nothing is converted until somebody looks, and then it is what it would have been."""
    fast = Fast(kinds=())
    both(lambda: Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16, device_map="cpu"), fast)
    assert fast.n_waiting == fast.n_plain_casts > 0
    assert fast.n_plans == 0


def test_what_from_pretrained_tells(model_dir, target):
    """What was kept in fp32, and what was missing, unexpected or of another shape."""
    infos = []

    def program():
        made, info = Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16, output_loading_info=True)
        infos.append({name: sorted(found) for name, found in info.items()})
        return made.to(target)

    made, fast = both(program)
    assert infos[0] == infos[1]
    assert fast.n_plans == 1
    if HAS_WAN:
        assert {t.dtype for t in made.parameters()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_a_file_of_lower_precision_than_the_model(model_dir, target, tmp_path, dtype):
    """Without a dtype, the model's own counts; what is kept in fp32 is converted to it; a variant is another file."""
    half = Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16).to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant="bf16")
    made, fast = both(lambda: Model.from_pretrained(tmp_path, variant="bf16", torch_dtype=dtype).to(target))
    kept = {torch.float32} if HAS_WAN else set()
    assert {t.dtype for t in made.parameters()} == kept | {dtype or torch.float32}
    fast.assert_no_casts()
    fast.assert_moved(made)
    assert fast.n_plans == 1


def forward(model, device):
    torch.manual_seed(3)
    model = model.eval()
    size = (1, 16, 1, 8, 8) if HAS_WAN else (1, 3, 8, 8)
    inputs = torch.randn(size).to(device, model.dtype)
    text = {"encoder_hidden_states": torch.randn(1, 4, 16).to(device, model.dtype)} if HAS_WAN else {}
    with torch.no_grad():
        return model(inputs, timestep=torch.tensor([7], device=device), return_dict=False, **text)[0].cpu()


def test_offload_of_models(root, target):
    """A model moves when it is used, by one plan."""
    outputs = []

    def program():
        pipe = load_pipeline(root)
        pipe.enable_model_cpu_offload(device=target)
        outputs.append(forward(getattr(pipe, "transformer", None) or pipe.unet, target))
        pipe.remove_all_hooks()
        return pipe

    _, fast = both(program)
    assert torch.equal(*outputs)
    assert fast.tally.components[Model.__name__].n_plans == 1


def test_offload_of_tensors(model_dir, target):
    """What diffusers' sequential offload is: each tensor moves by itself, as ever."""
    outputs = []

    def program():
        made = Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16)
        device = target.removesuffix(":0")  # on `cpu:0`, accelerate makes no parameters of parameters
        outputs.append(forward(accelerate.cpu_offload(made, device, offload_buffers=True), device))
        return made

    _, fast = both(program)
    assert torch.equal(*outputs)
    assert fast.n_plans == 0


def test_offload_of_groups(model_dir, target):
    outputs = []

    def program():
        made = Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16)
        made.enable_group_offload(
            onload_device=torch.device(target), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
        outputs.append(forward(made, target))
        return made

    both(program, unable=AttributeError)
    assert torch.equal(*outputs)


def test_a_single_file(model_dir, target, tmp_path):
    """The names in the file may be others, and weights may be put together anew: those are as ever."""
    made = Model.from_pretrained(model_dir)
    safetensors.torch.save_file(made.state_dict(), tmp_path / "all.safetensors")

    def program():
        return Model.from_single_file(
            str(tmp_path / "all.safetensors"), config=str(model_dir), torch_dtype=torch.bfloat16
        ).to(target)

    made, fast = both(program, unable=(AttributeError, NotImplementedError))
    fast.assert_no_casts()
    fast.assert_moved(made)
    assert fast.n_plans == 1


@HAS_DEVICE_MAPS
def test_adapters_before_the_move(root, model_dir, target, tmp_path):
    """Their weights are in no file, and what they are fused into is written to; all else is fetched as ever."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    model = Model.from_pretrained(model_dir)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(model)
    diffusers.WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)

    def program(fuses):
        pipe = load_pipeline(root)
        pipe.load_lora_weights(tmp_path)
        if fuses:
            pipe.fuse_lora()
        return pipe.to(target)

    for fuses in (False, True):
        made, fast = both(lambda: program(fuses))  # noqa: B023
        assert fast.n_waiting == 0
        fast.assert_one_plan_each(made)


@pytest.mark.parametrize("device_map", [None, "target"])
def test_files_that_are_read_in_parallel(model_dir, target, monkeypatch, device_map):
    if not hasattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING"):
        pytest.skip("this diffusers reads one after the other")
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    options = {} if device_map is None else {"device_map": target}
    fast = Fast()
    with watched():
        with counted_casts() as casts:
            expected = state(Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16).to(target))
        fast.n_plain_casts = len(casts)
        with fast.installed():
            made = Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16, **options).to(target)
            fast.n_waiting = n_waiting(made)
    assert state(made) == expected
    fast.assert_no_casts()
    fast.assert_moved(made)
    assert fast.n_plans == (n_files(model_dir) if options else 1)


def without_device(facts):
    return [tuple(fact for fact in found if not isinstance(fact, torch.device)) for found in facts]


def test_models_that_move_at_once(model_dir, target):
    with watched():
        expected = state(Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16))
        with Fast().installed() as fast:
            models = [Model.from_pretrained(model_dir, torch_dtype=torch.bfloat16) for _ in range(3)]
            threads = [threading.Thread(target=model.to, args=(target,)) for model in models]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            fast.n_waiting = sum(map(n_waiting, models))
    for model in models:
        fast.assert_moved(model)
        assert without_device(state(model)) == without_device(expected)
    assert fast.n_plans == 3


@pytest.mark.parametrize("max_shard_size", ["20KB", "60KB", "1MB"])
def test_saving_over_the_files(model_dir, tmp_path, max_shard_size):
    """What waits was converted long ago without us: it is settled before its file is another one."""
    written = []

    def program():
        path = tmp_path / str(len(written))
        shutil.copytree(model_dir, path)
        made = Model.from_pretrained(path, torch_dtype=torch.bfloat16)
        made.save_pretrained(path, max_shard_size=max_shard_size)
        written.append({file.name: file.read_bytes() for file in path.glob("*.safetensors")})
        made.register_to_config(_name_or_path="")
        return made

    both(program)
    assert written[0] == written[1]


class TestWhatIsWrong:
    """Errors and warnings are those of diffusers."""

    @pytest.fixture
    def other(self, model_dir, tmp_path):
        """A copy of the model; `change` changes its weights."""
        made = Model.from_pretrained(model_dir)

        def change(**changes):
            weights = made.state_dict() | changes
            made.save_config(tmp_path)
            weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
            safetensors.torch.save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
            return tmp_path

        return change, next(name for name in made.state_dict() if name.endswith("weight"))

    @pytest.mark.parametrize("options", [{}, pytest.param({"device_map": "target"}, marks=HAS_DEVICE_MAPS)])
    def test_another_shape(self, other, target, options):
        change, name = other
        path = change(**{name: torch.ones(3)})
        options = dict.fromkeys(options, target)
        messages = []
        for fast in (None, Fast()):
            with fast.installed() if fast else nullcontext(), watched(), pytest.raises(ValueError) as raised:
                Model.from_pretrained(path, torch_dtype=torch.bfloat16, **options)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
        assert name in messages[0]

    def test_more_than_the_model_has(self, other, target):
        change, _ = other
        path = change(**{"nobody.weight": torch.ones(3)})
        _, fast = both(lambda: Model.from_pretrained(path, torch_dtype=torch.bfloat16).to(target))
        assert fast.n_plans == 1


@HAS_DEVICE_MAPS
def test_what_goes_to_a_disk_is_left(model_dir, tmp_path):

    def program():
        names = [name for name, _ in Model.from_config(Model.load_config(model_dir)).named_children()]
        device_map = {name: "disk" if name == "proj_out" else "cpu" for name in [*names, "scale_shift_table"]}
        return Model.from_pretrained(
            model_dir, torch_dtype=torch.bfloat16, device_map=device_map, offload_folder=tmp_path
        )

    _, fast = both(program, Fast(kinds=()))
    assert fast.tally.left["goes to a disk"]


class TestLeft:
    """Calls that ask for more than is known get to the original as they are."""

    @staticmethod
    def call(model_dir, device_map=None, **options):
        """Give a model its weights by a function in the place of the original; return what that got, and the tally."""
        got = []

        def original(
            model, state_dict, dtype=None, hf_quantizer=None, keep_in_fp32_modules=None, device_map=None, **options
        ):
            got.append((state_dict, device_map, options))

        fast = Fast()
        model = Model.from_pretrained(model_dir)
        weights = safetensors.torch.load_file(next(model_dir.glob("*.safetensors")))
        replacement = FromDiffusers(fast.tally, Moves(fast.tally))._instead_of(original)
        replacement(model, weights, torch.bfloat16, device_map=device_map, **options)
        assert len(got) == 1
        assert got[0][0] is weights
        assert got[0][1] is device_map
        return fast.tally.left

    def test_a_quantiser(self, model_dir):
        assert self.call(model_dir, hf_quantizer=object())["is quantised by diffusers"]

    def test_a_mode_of_torch(self, model_dir):
        with torch.inference_mode():
            left = self.call(model_dir)
        assert any("inference" in reason for reason in left)

    def test_a_device_map_that_is_read_in_another_way(self, model_dir):
        left = self.call(model_dir, {"": "cpu"})
        assert any("in another way" in reason for reason in left)

    def test_arguments_that_do_not_fit(self, model_dir):
        with Fast().installed(), pytest.raises(TypeError, match="no_such_argument"):
            model_loading_utils.load_model_dict_into_meta(None, {}, no_such_argument=1)


def test_a_function_that_is_not_known_is_left(monkeypatch):
    def load_model_dict_into_meta(model, weights):
        return model, weights

    monkeypatch.setattr(model_loading_utils, "load_model_dict_into_meta", load_model_dict_into_meta)
    with Fast().installed() as fast:
        assert model_loading_utils.load_model_dict_into_meta is load_model_dict_into_meta
    assert any("load_model_dict_into_meta is not the function" in reason for reason in fast.tally.left)
