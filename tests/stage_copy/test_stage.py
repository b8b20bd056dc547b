"""Staging: equal files or none, whatever is damaged, full, foreign or killed; and it is undone without a trace."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wan_loader.errors import CheckpointError, HostMemoryError, MissingFileError, OutputError
from wan_loader.stage_copy import copy_blocks, copying
from wan_loader.stage_copy import stage as module
from wan_loader.stage_copy.journal import HIDDEN
from wan_loader.stage_copy.stage import stage
from wan_loader.stage_copy.unstage import unstage

BLOCK = 64 << 10


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(copy_blocks, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def source(tmp_path):
    """A directory with files of all kinds of lengths, and names that need care."""
    root = tmp_path / "model ü"
    sizes = {
        "model_index.json": 10,
        "transformer/a-00001.safetensors": 5 * BLOCK + 17,
        "transformer/a-00002.safetensors": 3 * BLOCK,
        "vae/empty.safetensors": 0,
        "google/umt5/spiece [x]\n.model": 1,
    }
    for i, (name, nbytes) in enumerate(sizes.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(i).randbytes(nbytes))
        os.utime(path, ns=(10**18 + i, 10**18 + 123456789 + i))
    return root


@pytest.fixture
def target(tmp_path):
    (tmp_path / "fast").mkdir()
    return tmp_path / "fast"


def content(root):
    """Everything under a directory: relative name -> bytes, mtime."""
    found = [p for p in sorted(root.rglob("*")) if p.is_file() and HIDDEN not in p.parts]
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def strays(target):
    """What staging keeps beside the copy, other than its state."""
    return [
        p.name
        for p in target.rglob("*")
        if HIDDEN in p.parts and p.name not in ("manifest.json", "journal") and p.is_file()
    ]


# What it does


def test_a_directory_is_copied_with_its_times(source, target):
    told = []
    result = stage(source, target, progress=lambda *numbers: told.append(numbers))
    assert result.path == str(target / source.name)
    assert content(target / source.name) == content(source)
    assert not strays(target)
    nbytes = sum(len(data) for data, _ in content(source).values())
    assert (result.nbytes, result.nbytes_copied, result.nbytes_verified) == (nbytes, nbytes, nbytes)
    assert not result.warnings
    assert {step for step, _, _ in told} <= {"copying", "writing", "verifying"}


def test_a_file_and_an_index_are_copied_into_the_directory_itself(tmp_path, target):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    weight_map = {}
    for i in (1, 2):
        weight_map[f"w{i}"] = f"m-0000{i}-of-00002.safetensors"
        save_file({f"w{i}": torch.ones(2) * i}, tmp_path / weight_map[f"w{i}"])
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    stage(index, target)
    assert set(content(target)) == {index.name, *weight_map.values()}
    import wan_loader

    assert wan_loader.load_file(target / index.name)["w2"].tolist() == [2, 2]
    unstage(target)
    alone = tmp_path / weight_map["w1"]
    assert stage(alone, target).path == str(target / alone.name)
    assert content(target)[alone.name][0] == alone.read_bytes()


def test_the_second_time_nothing_is_read(source, target, monkeypatch):
    stage(source, target)
    monkeypatch.setattr(copy_blocks, "read_source", None)
    assert stage(source, target).nbytes_copied == 0


def test_a_changed_source_is_staged_anew_and_only_what_changed(source, target):
    stage(source, target)
    changed, gone, new = (source / "transformer" / f"a-0000{i}.safetensors" for i in (1, 2, 3))
    changed.write_bytes(b"other")
    gone.unlink()
    new.write_bytes(b"new")
    result = stage(source, target)
    assert result.nbytes_copied == len(b"othernew")
    assert content(target / source.name) == content(source)


def test_the_page_cache_is_left_as_it_was(source, target, evict, resident):
    path = source / "transformer/a-00001.safetensors"
    evict(path)
    stage(source, target)
    assert resident(path) == 0


def test_removing_leaves_nothing(source, target):
    (target / "foreign.txt").write_text("precious")
    stage(source, target)
    removed = unstage(target)
    assert (removed.names, removed.n_files) == ((source.name,), 5)
    assert [p.name for p in target.iterdir()] == ["foreign.txt"]
    with pytest.raises(MissingFileError) as error:
        unstage(target)
    assert error.value.path == str(target)
    assert error.value.reason == "nothing is staged"


def test_removing_leaves_what_is_not_ours_any_more(source, target):
    stage(source, target)
    edited = target / source.name / "model_index.json"
    edited.write_text("edited by hand")
    added = target / source.name / "vae/notes.txt"
    added.write_text("mine")
    removed = unstage(target)
    assert removed.kept == (str(edited),)
    assert set(content(target)) == {f"{source.name}/model_index.json", f"{source.name}/vae/notes.txt"}


def test_removing_one_name_of_two(source, target, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"1234")
    stage(source, target)
    stage(other, target)
    assert unstage(target, source).names == (source.name,)
    assert set(content(target)) == {other.name}
    with pytest.raises(MissingFileError) as error:
        unstage(target, "x")
    assert error.value.path == str(target)
    assert error.value.reason == "no copy of x is staged"


def test_removing_goes_by_what_was_copied_not_by_its_name(source, target, tmp_path):
    other = tmp_path / "elsewhere" / source.name
    other.mkdir(parents=True)
    stage(source, target)
    with pytest.raises(OutputError) as error:
        unstage(target, other)
    assert error.value.path == str(target / source.name)
    assert f"was staged from {source}" in error.value.reason
    assert content(target / source.name) == content(source)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    shutil.move(source, tmp_path / "gone")
    assert unstage(target, link / source.name).names == (source.name,), "a source that is gone, by another way to it"


def test_removing_leaves_an_unrelated_directory_of_the_same_name(source, target, tmp_path):
    mine = target / source.name / "vae" / "empty.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"1234")
    stage(other, target)
    with pytest.raises(OutputError) as error:
        unstage(target, source)
    assert error.value.path == str(target / source.name)
    assert error.value.reason == "was not made by `stage`, and stays"
    assert mine.read_text() == "precious"
    assert (target / other.name).exists()


# Damage


def flip_once(monkeypatch, times=1):
    """The first written blocks lose a bit on their way to the storage."""
    write, left = os.pwrite, [times]

    def pwrite(fd, data, offset):
        if left[0]:
            left[0] -= 1
            data = bytearray(data)
            data[len(data) // 2] ^= 4
        return write(fd, data, offset)

    monkeypatch.setattr(copy_blocks.os, "pwrite", pwrite)


def test_a_flipped_bit_is_found_and_copied_again(source, target, monkeypatch):
    flip_once(monkeypatch)
    result = stage(source, target)
    assert "1 blocks" in result.warnings[0]
    assert content(target / source.name) == content(source)


def test_storage_that_keeps_flipping_bits_is_an_error_and_nothing_is_in_place(source, target, monkeypatch):
    flip_once(monkeypatch, times=10**6)
    with pytest.raises(OutputError) as error:
        stage(source, target)
    assert error.value.path == str(target)
    assert "other bytes than were written" in error.value.reason
    assert not content(target)


def test_damage_in_place_is_found_by_verify_only_and_mended(source, target):
    stage(source, target)
    path = target / source.name / "transformer/a-00002.safetensors"
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[BLOCK + 5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert not stage(source, target).warnings
    result = stage(source, target, verify=True)
    assert "a-00002" in result.warnings[0]
    assert content(target / source.name) == content(source)


def test_a_damaged_part_of_a_killed_run_is_found_even_without_verify(source, target, monkeypatch):
    stopped_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        stage(source, target, threads=1)
    monkeypatch.undo()
    monkeypatch.setattr(copy_blocks, "BLOCK_BYTES", BLOCK)
    (part, *_) = [p for p in target.rglob("*.part") if p.stat().st_size > BLOCK]
    with part.open("r+b") as file:
        file.write(b"damaged")
    result = stage(source, target, verify=False)
    assert "copied again" in result.warnings[0]
    assert content(target / source.name) == content(source)


def stopped_after(monkeypatch, n_blocks):
    read, left = copy_blocks.read_source, [n_blocks]

    def interrupted(*arguments, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        read(*arguments, **options)

    monkeypatch.setattr(copy_blocks, "read_source", interrupted)


def test_what_an_interrupted_run_has_copied_is_not_copied_again(source, target, monkeypatch):
    stopped_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        stage(source, target, threads=1)
    assert not content(target)
    monkeypatch.undo()
    monkeypatch.setattr(copy_blocks, "BLOCK_BYTES", BLOCK)
    result = stage(source, target)
    assert 0 < result.nbytes_copied < result.nbytes - 2 * BLOCK
    assert not result.warnings
    assert content(target / source.name) == content(source)
    assert not strays(target)


def test_interrupted_between_renaming_and_the_end_it_still_knows_its_files(source, target, monkeypatch):
    replace = os.replace

    def interrupted(part, path):
        replace(part, path)
        if str(part).endswith(".part"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage(source, target)
    assert len(content(target)) == 1
    assert not stage(source, target).warnings
    assert content(target / source.name) == content(source)


def test_what_was_written_before_a_file_was_deleted_is_not_taken_for_its_copy(source, target, monkeypatch):
    stage(source, target)
    (target / source.name / "transformer/a-00001.safetensors").unlink()
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            stage(source, target, threads=1)
    result = stage(source, target)
    assert not result.warnings
    assert content(target / source.name) == content(source)


def test_a_source_that_changes_after_its_last_block_was_read(source, target, monkeypatch):
    settle = copying.Copying.settle

    def changing(job, files):
        (source / "model_index.json").write_text("changed")
        settle(job, files)

    monkeypatch.setattr(copying.Copying, "settle", changing)
    with pytest.raises(CheckpointError) as error:
        stage(source, target)
    assert error.value.path == os.path.realpath(source / "model_index.json")
    assert error.value.reason == "changed while it was being staged"
    assert not content(target)


def test_blocks_of_another_size_are_copied_again_without_a_warning(source, target, monkeypatch):
    stopped_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        stage(source, target, threads=1)
    monkeypatch.undo()
    result = stage(source, target)
    assert result.nbytes_copied >= 8 * BLOCK
    assert not result.warnings
    assert content(target / source.name) == content(source)


@pytest.mark.parametrize("what", ["grows", "shrinks", "vanishes", "touched", "rewritten"])
def test_a_source_that_changes_is_an_error_that_names_it(source, target, monkeypatch, what):
    path = source / "transformer/a-00001.safetensors"
    read, calls = copy_blocks.read_source, []

    def rewrite():
        """With its old time put back."""
        times = path.stat()
        path.write_bytes(bytes(times.st_size))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def changing(*arguments, **options):
        read(*arguments, **options)
        calls.append(1)
        if len(calls) == 2:
            {
                "grows": lambda: os.truncate(path, 10**6),
                "shrinks": lambda: os.truncate(path, 10),
                "vanishes": path.unlink,
                "touched": path.touch,
                "rewritten": rewrite,
            }[what]()

    monkeypatch.setattr(copy_blocks, "read_source", changing)
    with pytest.raises(CheckpointError, match=r"a-00001\.safetensors (changed|vanished|was truncated)"):
        stage(source, target, threads=1)
    assert not content(target)


# Space


def test_too_little_space_is_said_before_anything_is_written(source, target, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("U", (), {"free": 100_000}))
    with pytest.raises(OutputError) as error:
        stage(source, target)
    assert error.value.path == str(target)
    assert "100 kB free" in error.value.reason
    assert not list(target.iterdir())


def test_a_ram_disk_must_fit_into_memory(source, target, monkeypatch):
    memory = module.mount_of(target).__class__("tmpfs", "tmpfs", "/")
    monkeypatch.setattr(module, "mount_of", lambda path: memory)
    monkeypatch.setattr(module, "available_memory", lambda: 100_000)
    with pytest.raises(HostMemoryError) as error:
        stage(source, target)
    assert error.value.path == str(target)
    assert "is in memory" in error.value.reason
    assert not list(target.iterdir())


def test_a_disk_that_fills_up_is_one_error_and_the_next_run_goes_on(source, target, monkeypatch):
    write, left = os.pwrite, [4]

    def full(fd, data, offset):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return write(fd, data, offset)

    monkeypatch.setattr(copy_blocks.os, "pwrite", full)
    with pytest.raises(OutputError) as error:
        stage(source, target, threads=1)
    assert error.value.path == str(target)
    assert "is full" in error.value.reason
    assert "goes on where it stopped" in error.value.remedy
    assert "--remove" in error.value.remedy
    left[0] = 10**6
    result = stage(source, target)
    assert result.nbytes_copied < result.nbytes
    assert content(target / source.name) == content(source)


def test_a_limit_on_file_sizes_is_one_error(source, target):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from wan_loader.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "stage", str(source), "--to", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "full (File too large)" in done.stderr
    assert unstage(target).n_files == 0
    assert not list(target.iterdir())


# Foreign things


def test_foreign_files_are_not_overwritten_without_force(source, target):
    foreign = target / source.name / "model_index.json"
    foreign.parent.mkdir()
    foreign.write_text("precious")
    with pytest.raises(OutputError) as error:
        stage(source, target)
    assert error.value.path == str(foreign.parent)
    assert "--force" in error.value.remedy
    assert content(target) == {f"{source.name}/model_index.json": (b"precious", foreign.stat().st_mtime_ns)}
    assert not (target / HIDDEN).exists()
    stage(source, target, force=True)
    assert content(target / source.name) == content(source)


def test_a_file_that_was_edited_after_staging_is_foreign(source, target):
    stage(source, target)
    edited = target / source.name / "model_index.json"
    edited.write_text("edited by hand")
    with pytest.raises(OutputError) as error:
        stage(source, target)
    assert error.value.path == str(edited)
    assert "changed since" in error.value.reason
    assert edited.read_text() == "edited by hand"


def test_another_source_of_the_same_name_is_refused(source, target, tmp_path):
    stage(source, target)
    other = tmp_path / "elsewhere" / source.name
    other.mkdir(parents=True)
    (other / "m.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError) as error:
        stage(other, target)
    assert error.value.path == str(target / source.name)
    assert error.value.reason == f"was staged from {source}"
    stage(other, target, force=True)
    assert content(target / source.name) == content(other)


@pytest.mark.parametrize("where", [".", "sub"])
def test_not_into_itself(source, where):
    (source / "sub").mkdir()
    with pytest.raises(OutputError) as error:
        stage(source, source / where)
    assert "already lies" in error.value.reason
    with pytest.raises(OutputError) as error:
        stage(source, source.parent)
    assert "already lies" in error.value.reason
    with pytest.raises(OutputError) as error:
        stage(source / "model_index.json", source)
    assert "already lies" in error.value.reason


def test_links_out_of_the_source_are_refused_and_links_into_the_target_too(source, target, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    link = source / "vae/link.safetensors"
    link.symlink_to(secret / "key")
    with pytest.raises(CheckpointError) as error:
        stage(source, target)
    assert error.value.path == str(source)
    assert "vae/link.safetensors" in error.value.reason
    link.unlink()
    (target / source.name).symlink_to(secret)
    for force in (False, True):
        with pytest.raises(OutputError, match="link"):
            stage(source, target, force=force)
    (target / source.name).unlink()
    (target / source.name).mkdir()
    (target / source.name / "vae").symlink_to(secret)
    with pytest.raises(OutputError, match="link"):
        stage(source, target, force=True)
    assert [p.name for p in secret.iterdir()] == ["key"]


def test_a_link_that_replaces_a_staged_directory_is_not_followed_when_removing(source, target, tmp_path):
    stage(source, target)
    kept = tmp_path / "moved"
    (target / source.name / "vae").rename(kept)
    (target / source.name / "vae").symlink_to(kept)
    removed = unstage(target)
    assert removed.kept == (str(target / source.name / "vae/empty.safetensors"),)
    assert (kept / "empty.safetensors").exists()


def test_targets_that_cannot_be_used(source, tmp_path):
    (tmp_path / "file").write_text("")
    for place, word in (
        ("file", "not a directory"),
        ("file/x", "not a directory|does not exist"),
        ("no/such", "mounted"),
    ):
        with pytest.raises(OutputError, match=word):
            stage(source, tmp_path / place)
    with pytest.raises(OutputError, match="/proc"):
        stage(source, "/proc")
    with pytest.raises(OutputError, match="/proc"):
        stage(source, "/proc/new")


def test_a_state_directory_that_others_may_write_to_is_refused(source, target):
    (target / HIDDEN).mkdir()
    (target / HIDDEN).chmod(0o777)
    with pytest.raises(OutputError, match="only you"):
        stage(source, target)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"schema_version": 2}', "\0" * 100,
        '{"schema_version": 1, "source": "/", "name": "../x", "is_directory": true, "files": [], "complete": true}',
        '{"schema_version": 1, "source": "/", "name": "x", "is_directory": true, "files": [{"path": "/etc/x", '
        '"nbytes": 1, "mtime_ns": 1}], "complete": true}',
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_one_error(source, target, text):
    stage(source, target)
    (manifest,) = target.rglob("manifest.json")
    manifest.write_text(text)
    for work in (lambda: stage(source, target), lambda: unstage(target)):
        with pytest.raises((OutputError, CheckpointError), match=r"manifest\.json"):
            work()


def test_a_damaged_journal_never_makes_foreign_files_ours(source, target, tmp_path):
    stage(source, target)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    facts = victim.stat()
    (journal,) = target.rglob("journal")
    line = f'p {"0" * 16} {facts.st_size} {facts.st_mtime_ns} "{{}}"\n'
    paths = ("../victim", str(victim), "\\ud800")  # the last is half of a character, and no file's name
    journal.write_text("garbage\n" + "".join(map(line.format, paths)) + 'm "\\ud800"\np 1 2')
    unstage(target)
    assert victim.read_text() == "precious"
    assert content(target / source.name) == content(source)


def test_names_of_300_characters(tmp_path, target):
    root = tmp_path / ("d" * 200) / ("e" * 200)
    path = root / ("m" * 243 + ".safetensors")
    root.mkdir(parents=True)
    path.write_bytes(b"weights")
    assert Path(stage(path, target).path).read_bytes() == b"weights"
    assert Path(stage(root, target).path, path.name).read_bytes() == b"weights"
    unstage(target)
    assert not list(target.iterdir())


# Processes


_SLOW = """
import sys
from wan_loader.stage_copy import copy_blocks
from wan_loader.stage_copy import copying
from wan_loader.stage_copy import stage as module
module.copy_blocks.BLOCK_BYTES = 4096
module.stage(sys.argv[1], sys.argv[2])
"""


def start(source, target):
    return subprocess.Popen([sys.executable, "-c", _SLOW, source, target], stderr=subprocess.PIPE, text=True)


def test_killed_at_random_moments_it_goes_on_and_nothing_wrong_is_ever_in_place(source, target):
    expected = content(source)
    chance, killed = random.Random(5), 0
    for _ in range(12):
        with start(source, target) as process:
            deadline = time.perf_counter() + 20
            while not list(target.rglob("journal")) and process.poll() is None:
                assert time.perf_counter() < deadline
                time.sleep(0.001)
            time.sleep(chance.random() * 0.08)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        for name, found in content(target).items():
            assert found == expected[name.removeprefix(f"{source.name}/")]
    assert killed > 2
    result = stage(source, target)
    assert content(target / source.name) == expected
    assert not strays(target)
    assert not result.warnings
    unstage(target)
    assert not list(target.iterdir())


def test_killed_and_removed_leaves_nothing(source, target):
    with start(source, target) as process:
        while not list(target.rglob("*.part")) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
    unstage(target)
    assert not list(target.iterdir())


def test_two_at_once_are_refused(source, target):
    from wan_loader.stage_copy.journal import open_entry

    with open_entry(target, source.name) as entry:
        entry.note_made("x")
        with pytest.raises(OutputError, match="another process"):
            stage(source, target)
        with pytest.raises(OutputError, match="another process"):
            unstage(target)
