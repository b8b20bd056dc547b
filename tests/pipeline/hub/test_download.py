"""Downloads from a stand-in for the hub: what is needed and no more, resumed, checked, and clear when it goes wrong."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest
from hub_standin import COMMIT, native_files, needed, point_to
from programs import Program, check_error, wan_loader

from wan_loader.errors import CheckpointError, HubError, OptionError, OutputError
from wan_pipeline.hub import download as module
from wan_pipeline.hub.download import download
from wan_pipeline.hub.download_state import HIDDEN

REPOSITORY = "Wan-AI/Wan2.2-T2V-A14B"
SHARD = "high_noise_model/diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "model"


def content(root):
    found = [p for p in root.rglob("*") if p.is_file() and HIDDEN not in p.parts]
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


def expected(hub, repository=REPOSITORY):
    files = hub.repositories[repository]
    return {name: files[name] for name in needed(files)}


def strays(target):
    return [p.name for p in (target / HIDDEN).iterdir() if p.name != "manifest.json"]


# What it does


def test_gets_what_text_to_video_needs_and_no_more(hub, target):
    told = []
    result = download(target, progress=lambda *numbers: told.append(numbers))
    assert content(target) == expected(hub)
    assert not strays(target)
    assert (result.repository, result.revision, result.layout) == (REPOSITORY, COMMIT, "native")
    nbytes = sum(map(len, expected(hub).values()))
    assert (result.nbytes, result.nbytes_missing, result.nbytes_received) == (nbytes, nbytes, nbytes)
    assert not any("README" in path or "examples" in path for _, path, _, _ in hub.requests)


def test_the_second_time_only_the_listing_is_asked_for(hub, target):
    download(target)
    hub.requests.clear()
    result = download(target)
    assert result.nbytes_received == result.nbytes_hashed == 0
    assert [path for _, path, _, _ in hub.requests] == [f"/api/models/{REPOSITORY}"]


def test_what_was_there_is_hashed_once_and_kept(hub, target):
    for name, data in expected(hub).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    (target / SHARD).unlink()
    result = download(target)
    assert result.nbytes_received == len(expected(hub)[SHARD])
    assert result.nbytes_hashed == result.nbytes - result.nbytes_received
    assert download(target).nbytes_hashed == 0
    assert content(target) == expected(hub)


def test_a_dry_run_writes_nothing(hub, target):
    result = download(target, dry_run=True)
    assert not target.exists()
    assert {f.path for f, _ in result.files} == set(expected(hub))
    assert {status for _, status in result.files} == {"missing"}
    assert result.nbytes_missing == result.nbytes


def test_the_diffusers_layout(hub, target):
    parts = ("transformer", "transformer_2", "vae")
    files = {f"{part}/diffusion_pytorch_model.safetensors": part.encode() * 9 for part in parts}
    files |= {f"{part}/config.json": b"{}" for part in (*parts, "text_encoder")}
    files |= {"text_encoder/model.safetensors": b"text", "scheduler/scheduler_config.json": b"{}"}
    files |= {"tokenizer/tokenizer.json": b"{}", "tokenizer/tokenizer_config.json": b"{}"}
    files |= {"model_index.json": b'{"boundary_ratio": 0.875}'}
    extra = {"README.md": b"x", "examples/a.mp4": b"x", ".gitattributes": b"x"}
    hub.repositories["Wan-AI/Wan2.2-T2V-A14B-Diffusers"] = {**files, **extra}
    assert download(target, layout="diffusers").layout == "diffusers"
    assert content(target) == files


def test_ti2v_5b_has_its_shards_at_the_root(hub, target):
    files = {n.removeprefix("low_noise_model/"): d for n, d in native_files().items() if "high_noise" not in n}
    files["Wan2.2_VAE.pth"] = files.pop("Wan2.1_VAE.pth")
    hub.repositories["Wan-AI/Wan2.2-TI2V-5B"] = files
    download(target, "Wan-AI/Wan2.2-TI2V-5B")
    assert content(target) == {name: files[name] for name in needed(files)}


def test_a_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, target, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(HubError) as error:
        download(target)
    assert "private" in error.value.reason
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(target)
    assert content(target) == expected(hub)
    to_cdn = [a for _, path, _, a in hub.requests if path.startswith(f"/{REPOSITORY}/") and "/resolve/" not in path]
    assert to_cdn
    assert set(to_cdn) == {None}


def test_a_new_commit_replaces_what_was_downloaded_and_nothing_else(hub, target):
    download(target)
    hub.repositories[REPOSITORY][SHARD] = b"a new version"
    hub.repositories[REPOSITORY]["Wan2.1_VAE.pth"] = b"another"
    (target / "Wan2.1_VAE.pth").write_bytes(b"edited by hand")
    with pytest.raises(OutputError) as error:
        download(target)
    assert error.value.path == str(target / "Wan2.1_VAE.pth")
    assert "--force" in error.value.remedy
    assert (target / "Wan2.1_VAE.pth").read_bytes() == b"edited by hand"
    download(target, force=True)
    assert content(target) == expected(hub)


def test_another_repository_does_not_replace_the_first_one(hub, target):
    download(target)
    other = "Somebody/Finetuned"
    hub.repositories[other] = {**native_files(), SHARD: b"other weights of another length"}
    with pytest.raises(OutputError) as error:
        download(target, other)
    assert error.value.path == str(target / SHARD)
    assert "--force" in error.value.remedy
    assert content(target) == expected(hub)
    download(target, other, force=True)
    assert content(target) == expected(hub, other)


# Connections


def test_a_broken_connection_is_taken_up_where_it_broke(hub, target, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cut = {SHARD: 2}
    result = download(target)
    assert content(target) == expected(hub)
    assert result.nbytes_received == result.nbytes
    assert [r for r in hub.got(SHARD) if r]


def test_a_server_without_ranges_sends_all_again(hub, target, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cut, hub.ranges = {SHARD: 1}, False
    download(target)
    assert content(target) == expected(hub)


def test_a_part_goes_on_at_its_byte(hub, target):
    hub.served[SHARD] = expected(hub)[SHARD][:100_000]
    with pytest.raises(HubError) as error:
        download(target)
    assert error.value.path == SHARD
    assert "shorter on the hub" in error.value.reason
    assert (target / "Wan2.1_VAE.pth").exists() or strays(target)
    assert not (target / SHARD).exists()
    hub.served.clear()
    hub.requests.clear()
    result = download(target)
    assert content(target) == expected(hub)
    assert "bytes=100000-" in hub.got(SHARD)
    assert {f.path: s for f, s in result.files}[SHARD] == "partial"
    assert not strays(target)


def test_a_damaged_part_is_found_and_fetched_anew(hub, target):
    hub.served[SHARD] = expected(hub)[SHARD][:100_000]
    with pytest.raises(HubError):
        download(target)
    (part,) = [p for p in (target / HIDDEN).glob("*.part") if p.stat().st_size == 100_000]
    with part.open("r+b") as file:
        file.write(b"damaged")
    hub.served.clear()
    download(target)
    assert content(target) == expected(hub)


def test_other_content_than_promised_is_an_error_and_never_in_place(hub, target):
    data = bytearray(expected(hub)[SHARD])
    data[1000] ^= 1
    hub.served[SHARD] = bytes(data)
    with pytest.raises(HubError) as error:
        download(target)
    assert error.value.path == SHARD
    assert "twice with another content" in error.value.reason
    assert not (target / SHARD).exists()
    hub.served.clear()
    download(target)
    assert content(target) == expected(hub)


def test_a_small_file_is_checked_too(hub, target):
    hub.served["high_noise_model/config.json"] = b"[]"
    with pytest.raises(HubError) as error:
        download(target)
    assert error.value.path == "high_noise_model/config.json"
    assert not (target / "high_noise_model/config.json").exists()


def test_more_bytes_than_promised(hub, target):
    hub.served[SHARD] = expected(hub)[SHARD] + b"more"
    with pytest.raises(HubError) as error:
        download(target)
    assert error.value.path == SHARD
    assert "twice with another content" in error.value.reason
    assert not (target / SHARD).exists()


def test_a_file_that_vanishes_from_the_hub(hub, target):
    hub.repositories["other/name"] = dict(native_files())
    listing = module.list_repository("other/name", None)
    del hub.repositories["other/name"][SHARD]
    module_list, module.list_repository = module.list_repository, lambda *a: listing
    try:
        with pytest.raises(HubError) as error:
            download(target, "other/name")
        assert error.value.path == SHARD
        assert "run it again" in error.value.reason
    finally:
        module.list_repository = module_list


# Refusals


def test_no_network(target, monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(HubError) as error:
        download(target)
    assert "cannot be reached at 127.0.0.1:9: " in error.value.reason
    assert "set HF_ENDPOINT to a mirror" in error.value.reason
    assert "the same files from ModelScope: --source modelscope" in error.value.reason
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"repository": "nobody/nothing"}, r"not on the hub \(127\.0\.0\.1:\d+\)"),
        ({"repository": "a/b/c"}, "OWNER/NAME"),
        ({"repository": "../etc"}, "OWNER/NAME"),
        ({"revision": "v9"}, "no revision 'v9'"),
    ],
)
def test_what_the_hub_does_not_have(hub, target, arguments, word):
    with pytest.raises(HubError, match=word):
        download(target, **arguments)
    assert not target.exists()


def test_gated(hub, target):
    hub.gated = True
    with pytest.raises(HubError) as error:
        download(target)
    assert "gated: accept its terms" in error.value.reason


@pytest.mark.parametrize("status", [403, 429, 500])
def test_a_hub_that_refuses(hub, target, status):
    hub.broken_status = status
    with pytest.raises(HubError) as error:
        download(target)
    assert error.value.status == status
    assert f"{hub.endpoint.removeprefix('http://')} answers {status}" in error.value.reason


def test_another_kind_of_repository(hub, target):
    hub.repositories["some/llm"] = {"config.json": b"{}", "model.safetensors": b"x"}
    with pytest.raises(OptionError, match=r"no WAN2\.2 repository"):
        download(target, "some/llm")
    with pytest.raises(OptionError) as error:
        download(target, REPOSITORY, layout="diffusers")
    assert "--layout native" in error.value.remedy


@pytest.mark.parametrize("name", ["../../evil.pth", "/etc/passwd", "high_noise_model/../../x", "a\nb"])
def test_names_that_lead_out_of_the_directory(hub, target, name):
    hub.repositories[REPOSITORY][name] = b"x"
    with pytest.raises(HubError) as error:
        download(target)
    assert "not a name to be trusted" in error.value.reason
    assert not target.exists()


def test_a_repository_that_is_not_complete(hub, target):
    del hub.repositories[REPOSITORY][SHARD]
    with pytest.raises(HubError) as error:
        download(target)
    assert f"itself lacks {SHARD}" in error.value.reason


def test_too_little_space(hub, target, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("U", (), {"free": 1000}))
    with pytest.raises(OutputError) as error:
        download(target)
    assert error.value.path == str(target)
    assert "1 kB free" in error.value.reason
    assert not content(target)
    assert not (target / HIDDEN).exists()


def test_targets_that_cannot_be_used(hub, tmp_path, target):
    (tmp_path / "file").write_text("")
    for place, word in ((tmp_path / "file", "not a directory"), (tmp_path / "a/b", "mounted"), ("/proc/x", "/proc")):
        with pytest.raises(OutputError, match=word):
            download(place)
    (target / "elsewhere").mkdir(parents=True)
    (target / "high_noise_model").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="link"):
        download(target)


def test_files_of_another_length_are_not_replaced_without_force(hub, target):
    (target / "high_noise_model").mkdir(parents=True)
    (target / SHARD).write_bytes(b"half of it, by another program")
    with pytest.raises(OutputError) as error:
        download(target)
    assert error.value.path == str(target / SHARD)
    assert "--force" in error.value.remedy
    assert (target / SHARD).read_bytes() == b"half of it, by another program"
    download(target, force=True)
    assert content(target) == expected(hub)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 9}', '{"schema_version": 1, "files": 3}'])
def test_a_damaged_manifest_is_one_error(hub, target, text):
    download(target)
    (target / HIDDEN / "manifest.json").write_text(text)
    with pytest.raises((OutputError, CheckpointError), match=r"manifest\.json"):
        download(target)


def test_two_at_once_are_refused(hub, target):
    from wan_pipeline.hub.download_state import locked_state

    target.mkdir()
    with locked_state(target), pytest.raises(OutputError, match="another download"):
        download(target)


# Processes


def start(target, *arguments):
    return Program("-m", "wan_loader", "download", "--to", target, *arguments)


def wait_for_bytes(target, nbytes, process):
    """Until so many bytes have come."""
    deadline = time.perf_counter() + 40
    while nbytes_in(target) < nbytes:
        assert process.poll() is None, process.output()
        assert time.perf_counter() < deadline
        time.sleep(0.005)


def nbytes_in(target):
    total = 0
    for path in target.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_killed_in_the_middle_it_goes_on(hub, target):
    hub.repositories[REPOSITORY] = native_files(shard_nbytes=25_000_000)
    hub.pause_s = 0.003
    for nbytes in (15_000_000, 45_000_000):
        with start(target) as process:
            wait_for_bytes(target, nbytes, process)
            process.kill()
            process.wait()
        for name, data in content(target).items():
            assert data == expected(hub)[name]
    hub.pause_s = 0
    done = start(target, "--json")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    document = json.loads(out)
    assert document["nbytes_received"] < document["nbytes"] - 30_000_000
    assert content(target) == expected(hub)
    assert not strays(target)


def test_ctrl_c_ends_it_within_a_second_even_if_nothing_comes(hub, target):
    hub.repositories[REPOSITORY] = native_files(shard_nbytes=25_000_000)
    hub.pause_s = 0.001
    with start(target) as process:
        wait_for_bytes(target, 12_000_000, process)
        hub.pause_s = 20
        time.sleep(0.2)
        interrupted = time.perf_counter()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        seconds = time.perf_counter() - interrupted
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert seconds < 1.5
    hub.pause_s = 0
    download(target)
    assert content(target) == expected(hub)


def test_an_interrupted_call_leaves_nothing_that_goes_on_writing(hub, target, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    hub.pause_s = 0.4

    def interrupted(step, done, total):
        if done > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(target, progress=interrupted)
    nbytes = nbytes_in(target)
    time.sleep(1)
    assert nbytes_in(target) == nbytes > 0
    hub.pause_s = 0
    download(target)
    assert content(target) == expected(hub)


def test_errors_are_one_line_on_the_command_line(hub, target):
    for arguments, word in ((["nobody/nothing"], "nobody/nothing"), (["--revision", "x"], "--revision")):
        check_error(wan_loader("download", "--to", target, *arguments), word)


def test_without_huggingface_hub_help_still_answers():
    code = "import sys; sys.modules['huggingface_hub'] = None\nfrom wan_loader.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "download", "-h"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--dry-run" in done.stdout


def test_inspect_says_what_is_still_missing_and_how_much_is_here(hub, target):
    hub.served[SHARD] = expected(hub)[SHARD][:100_000]
    with pytest.raises(HubError):
        download(target)
    done = wan_loader("inspect", target, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    missing = {row["path"]: row for row in document["missing"]}
    assert missing[SHARD] == {"path": SHARD, "nbytes": 300_000, "nbytes_here": 100_000}
    assert set(missing) == {name for name in expected(hub) if not (target / name).exists()}
    assert "wan-loader download" in done.stderr
    done = wan_loader("inspect", target)
    assert f"{SHARD}, 300 kB, 100 kB of that are here" in done.stdout


@pytest.fixture
def modelscope(hub, monkeypatch):
    """The stand-in as ModelScope; the hub cannot be reached."""
    monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", "secret")
    point_to(monkeypatch, "http://127.0.0.1:9")
    return hub


def test_modelscope_has_the_same_files(modelscope, target):
    modelscope.cut[SHARD] = 1
    done = download(target, source="modelscope")
    assert done.revision == "master"
    files = modelscope.repositories[REPOSITORY]
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} >= needed(files)
    assert all((target / name).read_bytes() == files[name] for name in needed(files))
    assert {authorization for *_, authorization in modelscope.requests} == {None}, "the hub's token is the hub's"
    assert len(modelscope.got(SHARD)) >= 2, "goes on where it broke"
    again = download(target, source="modelscope")
    assert again.nbytes_received == 0


def test_what_modelscope_does_not_have_or_tells_wrongly(modelscope, target, monkeypatch):
    with pytest.raises(HubError, match=r"nobody/nothing is not to be had: 127\.0\.0\.1:\d+ answers 404"):
        download(target, "nobody/nothing", source="modelscope")
    for name in ("a/b/c", "../etc", "a/..", "abc"):
        with pytest.raises(HubError, match="OWNER/NAME"):
            download(target, name, source="modelscope")
    modelscope.listed[SHARD] = "12"
    with pytest.raises(HubError, match="cannot be checked"):
        download(target, source="modelscope")
    modelscope.listed.clear()
    modelscope.repositories[REPOSITORY]["../evil.pth"] = b"x"
    with pytest.raises(HubError, match="not a name to be trusted"):
        download(target, source="modelscope")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot be reached at 127\.0\.0\.1:9"):
        download(target, source="modelscope")
    assert not target.exists()
