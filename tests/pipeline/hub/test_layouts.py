"""Which files belong to text-to-video, and which are missing, in both layouts."""

import json
import shutil

import pytest
from hub_standin import native_files, needed

from wan_loader.errors import CheckpointError
from wan_loader.formats.inventory import take_inventory
from wan_pipeline.hub.layouts import layout_of, layouts_in, missing_files, parts_of, wanted_files

HIGH = "high_noise_model/diffusion_pytorch_model"
HALVES = ("high_noise_model", "low_noise_model")


@pytest.fixture
def native(tmp_path):
    """A complete native checkpoint, as far as its names go."""
    for name, data in native_files(100).items():
        path = tmp_path / "native" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "native"


@pytest.fixture
def real(tmp_path):
    """A small native checkpoint whose parts can be opened."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    root = tmp_path / "real"
    for expert in ("high_noise_model", "low_noise_model"):
        (root / expert).mkdir(parents=True)
        (root / expert / "config.json").write_text("{}")
        weight_map = {f"w{i}": f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        for name, shard in weight_map.items():
            save_file({name: torch.ones(3)}, root / expert / shard)
        index = root / expert / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        torch.save({"w": torch.ones(4)}, root / name)
    (root / "google/umt5-xxl").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "google/umt5-xxl" / name).write_text("{}")
    return root


def test_what_is_wanted_of_the_native_repository():
    files = native_files(1)
    assert set(wanted_files(files, "native")) == needed(files)
    assert layouts_in(files) == ("native",)


def test_what_is_wanted_of_the_diffusers_repository():
    wanted = ["model_index.json", "transformer/config.json", "transformer_2/a-00001-of-00002.safetensors"]
    wanted += ["tokenizer/spiece.model", "scheduler/scheduler_config.json", "vae/x.safetensors"]
    wanted += ["text_encoder/model.safetensors.index.json"]
    extra = ["README.md", "assets/a.png", "transformer/sub/x.json", "examples/x.safetensors", "vae/notes.md"]
    assert list(wanted_files(wanted + extra, "diffusers")) == wanted
    assert layouts_in(wanted) == ("diffusers",)
    assert layouts_in(["config.json", "model.safetensors"]) == ()


def test_directories_and_their_layout(native, tmp_path):
    assert layout_of(native) == "native"
    assert layout_of(native / "high_noise_model") is None
    (tmp_path / "one").mkdir()
    (tmp_path / "one/Wan2.1_VAE.pth").write_bytes(b"")
    assert layout_of(tmp_path / "one") is None
    (tmp_path / "one/model_index.json").write_text("{}")
    assert layout_of(tmp_path / "one") == "diffusers"
    assert take_inventory(tmp_path / "one/model_index.json") is None


def test_a_diffusers_model_of_another_kind_is_no_incomplete_wan_model(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    assert layout_of(tmp_path) is None
    assert take_inventory(tmp_path) is None
    for text in ('{"_class_name": "WanPipeline"}', '{"_class_name": 3}', "{"):
        (tmp_path / "model_index.json").write_text(text)
        assert layout_of(tmp_path) == "diffusers"


def test_parts_in_the_order_of_first_use(native):
    assert list(parts_of(native, "native").values()) == [
        "models_t5_umt5-xxl-enc-bf16.pth",
        "high_noise_model",
        "low_noise_model",
        "Wan2.1_VAE.pth",
    ]


@pytest.mark.parametrize("name", sorted(needed(native_files(1))))
def test_every_file_is_missed(native, name):
    assert missing_files(native, "native") == []
    (native / name).unlink()
    expected = [] if name.endswith(("spiece.model", ".index.json")) else [name]
    assert missing_files(native, "native") == expected


def test_without_an_index_the_shards_names_tell(native):
    (native / f"{HIGH}.safetensors.index.json").unlink()
    (native / f"{HIGH}-00001-of-00002.safetensors").unlink()
    assert missing_files(native, "native") == [f"{HIGH}-00001-of-00002.safetensors"]
    (native / f"{HIGH}-00002-of-00002.safetensors").unlink()
    assert missing_files(native, "native") == [f"{HIGH}.safetensors.index.json"]


def test_files_that_somebody_has_saved_again(native):
    """Kijai's text encoder and VAE as safetensors, experts merged into one file each."""
    (native / "models_t5_umt5-xxl-enc-bf16.pth").rename(native / "umt5-xxl-enc-bf16.safetensors")
    (native / "Wan2.1_VAE.pth").rename(native / "Wan2_1_VAE_bf16.safetensors")
    for path in (native / "high_noise_model").glob("diffusion_pytorch_model*"):
        path.unlink()
    (native / "high_noise_model/wan2.2_t2v_high.safetensors").write_bytes(b"")
    assert missing_files(native, "native") == []
    parts = list(parts_of(native, "native").values())
    assert parts == ["umt5-xxl-enc-bf16.safetensors", *HALVES, "Wan2_1_VAE_bf16.safetensors"]
    (native / "another_t5.safetensors").write_bytes(b"")
    assert missing_files(native, "native") == ["models_t5_umt5-xxl-enc-bf16.pth"]


def test_ti2v_5b_in_one_file(tmp_path):
    for name in ("wan2.2_ti2v_5B.safetensors", "Wan2_2_VAE.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / name).write_bytes(b"")
    assert parts_of(tmp_path, "native") == {
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "transformer": "wan2.2_ti2v_5B.safetensors",
        "vae": "Wan2_2_VAE.safetensors",
    }
    assert "wan2.2_ti2v_5B.safetensors" not in missing_files(tmp_path, "native")


def test_a_damaged_index_is_an_error(native):
    (native / f"{HIGH}.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="index"):
        missing_files(native, "native")


def test_inventory_of_a_complete_checkpoint(real):
    inventory = take_inventory(real)
    assert inventory.complete
    assert list(inventory.parts) == ["text_encoder", "transformer", "transformer_2", "vae"]
    titles = [part.title for part in inventory.model.parts]
    assert titles == ["text encoder", "high-noise expert", "low-noise expert", "VAE"]


def test_inventory_names_what_is_missing_and_shows_the_rest(real):
    (real / f"{HIGH}-00002-of-00002.safetensors").unlink()
    (real / "google/umt5-xxl/tokenizer.json").unlink()
    inventory = take_inventory(real)
    assert {absent.path for absent in inventory.model.missing} == {
        f"{HIGH}-00002-of-00002.safetensors",
        "google/umt5-xxl/tokenizer.json",
    }
    assert list(inventory.parts) == ["text_encoder", "transformer_2", "vae"]


@pytest.mark.parametrize("content", [b"", b"cut"])
def test_inventory_says_which_part_is_damaged(real, content):
    (real / f"{HIGH}-00002-of-00002.safetensors").write_bytes(content)
    inventory = take_inventory(real)
    assert not inventory.model.missing
    ((name, error),) = inventory.damaged
    assert name == "transformer"
    assert "00002-of-00002" in error


def test_a_part_that_may_not_be_read_is_an_error_and_not_damaged(real, open_dir, unprivileged):
    root = shutil.copytree(real, open_dir / "real")
    (root / "high_noise_model").chmod(0)
    with (
        unprivileged(),
        pytest.raises(CheckpointError, match=r"high_noise_model/.* cannot be read: Permission denied$"),
    ):
        take_inventory(root)
    (root / "high_noise_model").chmod(0o755)
