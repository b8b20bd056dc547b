"""`write_mp4`: the whole video or an error, with real and failing encoders and a disk that is really full."""

import subprocess
import sys

import pytest

pytest.importorskip("imageio_ffmpeg")

import imageio_ffmpeg
import numpy as np

from wan_loader.errors import OutputError
from wan_pipeline.video import write_mp4

N_FRAMES, HEIGHT, WIDTH = 9, 64, 96


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).random((N_FRAMES, HEIGHT, WIDTH, 3), dtype=np.float32)


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """Puts a shell script in the place of ffmpeg; it can call the real one as $REAL."""
    real = imageio_ffmpeg.get_ffmpeg_exe()

    def install(script):
        path = tmp_path / "ffmpeg"
        path.write_text(f"#!/bin/bash\nREAL={real}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(path))

    return install


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 kB."""
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_whole_and_the_same_each_time(frames, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, frames, 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert imageio_ffmpeg.count_frames_and_secs(tmp_path / "a.mp4")[0] == N_FRAMES
    assert (tmp_path / "a.mp4").stat().st_mode & 0o400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_full_disk(frames, small_disk):
    (small_disk / "v.mp4").write_text("mine")
    with pytest.raises(OutputError) as error:
        write_mp4(small_disk / "v.mp4", frames, 16)
    assert error.value.path == str(small_disk / "v.mp4")
    assert "No space left on device" in error.value.reason
    assert [p.name for p in small_disk.iterdir()] == ["v.mp4"]
    assert (small_disk / "v.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo '[libx264 @ 0x1] out of luck' >&2; exit 3", r"cannot be written: out of luck \(ffmpeg, exit code 3\)"),
        ("cat >/dev/null; exit 4", r"it said nothing \(ffmpeg, exit code 4\)"),
        ("cat >/dev/null", "wrote 0 of 9 frames"),
        (f'head -c {4 * HEIGHT * WIDTH * 3} | $REAL "$@"', "wrote 4 of 9 frames"),
        ('$REAL "$@"; end=$?; [[ ${@: -1} == *.mp4 ]] && truncate -s -9000 "${@: -1}"; exit $end', "Invalid data"),
    ],
)
def test_an_encoder_that_fails_replaces_nothing(frames, tmp_path, encoder, script, reason):
    encoder(script)
    (tmp_path / "v.mp4").write_text("mine")
    with pytest.raises(OutputError, match=reason):
        write_mp4(tmp_path / "v.mp4", frames, 16)
    assert (tmp_path / "v.mp4").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ffmpeg", "v.mp4"]


def test_nothing_is_imported_once_there_is_a_file(frames, tmp_path, monkeypatch):
    """Ctrl-C in the import of a library ends a command at once, and would leave the file."""
    held = {}

    class Watching:
        def find_spec(self, name, path=None, target=None):
            held[name] = list(tmp_path.iterdir())

    monkeypatch.delitem(sys.modules, "imageio_ffmpeg")
    monkeypatch.setattr(sys, "meta_path", [Watching(), *sys.meta_path])
    write_mp4(tmp_path / "v.mp4", frames, 16)
    assert "imageio_ffmpeg" in held
    assert not any(held.values())


def test_a_name_may_be_as_long_as_names_may_be(frames, tmp_path):
    write_mp4(tmp_path / f"{'n' * 251}.mp4", frames, 16)
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_an_interrupt_ends_the_encoder(frames, tmp_path, encoder):
    class Interrupted(np.ndarray):
        def __iter__(self):
            yield np.asarray(self[0])
            raise KeyboardInterrupt

    encoder("exec sleep 600")
    with pytest.raises(KeyboardInterrupt):
        write_mp4(tmp_path / "v.mp4", frames.view(Interrupted), 16)
    assert [p.name for p in tmp_path.iterdir()] == ["ffmpeg"]
