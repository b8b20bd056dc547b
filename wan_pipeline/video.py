"""Writing frames to an mp4 file: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from wan_loader import OptionError, OutputError

if TYPE_CHECKING:
    from typing import IO

    import numpy as np

    from wan_loader import StrPath

__all__ = ["check_video_name", "write_mp4"]

_CRF = "10"  # libx264's quality, 0 (lossless) to 51


def check_video_name(path: StrPath) -> None:
    """Raise `OptionError` for the name of a file that is to be no MP4: the content would not be what the name says."""
    name = Path(path)
    if name.suffix.lower() not in ("", ".mp4"):
        mp4 = name.with_suffix(".mp4").name
        remedy = f"name it {mp4}; `ffmpeg -i {mp4} {name.name}` makes what you want of it"
        raise OptionError.because(f"{name}: videos are written as MP4", remedy)


def write_mp4(path: StrPath, frames_THWC: np.ndarray, fps: int) -> None:
    """Write frames as H.264. The same frames give the same file.

    Writes beside `path` and renames what is whole: the encoder ended well, and the file is on the disk and holds every
    frame (counted without decoding).

    Args:
        path: The file; what is there is replaced.
        frames_THWC: Floats from 0 to 1.
        fps: Frames per second.

    Raises:
        OutputError: The file is not whole; then what was at `path` is still there.
        OptionError: The name is that of another kind of file.
    """
    check_video_name(path)
    # before there is a file: Ctrl-C in the import of a library ends the process, which would leave it
    from imageio_ffmpeg import get_ffmpeg_exe

    ffmpeg, target = get_ffmpeg_exe(), Path(path)
    try:
        # a directory: an encoder that Ctrl-C has orphaned can make no file once it is gone
        made = tempfile.TemporaryDirectory(
            prefix=f".{target.stem[:40]}.", dir=target.parent, ignore_cleanup_errors=True
        )
        with made as beside:
            name = os.path.join(beside, "video.mp4")
            _encode(ffmpeg, name, frames_THWC, fps)
            if (held := _count_frames(ffmpeg, name)) != len(frames_THWC):
                raise OSError(f"the encoder wrote {held} of {len(frames_THWC)} frames")
            with open(name, "rb") as file:
                os.fsync(file.fileno())  # some file systems only now say that they are full
            os.replace(name, target)
    except OSError as error:
        raise OutputError.because(f"cannot be written: {error.strerror or error}", path=target) from error


def _encode(ffmpeg: str, name: str, frames_THWC: np.ndarray, fps: int) -> None:
    _, height, width, _ = frames_THWC.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    coded = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", _CRF]
    with tempfile.TemporaryFile() as said:
        encoder = _started(
            ffmpeg, [*raw, *coded, "-y", name], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said
        )
        with encoder:
            _send(encoder, frames_THWC)
        if encoder.returncode:
            raise OSError(_reason(said, encoder.returncode))


def _send(encoder: subprocess.Popen[bytes], frames_THWC: np.ndarray) -> None:
    assert encoder.stdin is not None
    try:
        for frame_HWC in frames_THWC:
            encoder.stdin.write((frame_HWC * 255).astype("uint8").tobytes())
    except BrokenPipeError:
        pass  # the encoder has ended; what it said is a better reason
    except BaseException:
        encoder.kill()
        raise
    finally:
        with contextlib.suppress(BrokenPipeError):
            encoder.stdin.close()


def _count_frames(ffmpeg: str, name: str) -> int:
    """Count the frames that can be read from a video; read the file once and decode nothing."""
    # a line for each; what `-progress` says of copies is not the same in all versions
    words = ["-i", name, "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-"]
    with tempfile.TemporaryFile() as said:
        with _started(ffmpeg, words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said) as reader:
            told, _ = reader.communicate()
        if reader.returncode:
            raise OSError(_reason(said, reader.returncode))
    return sum(not line.startswith(b"#") for line in told.splitlines())


def _started(ffmpeg: str, words: list[str], *, stdin: int, stdout: int, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start ffmpeg in a session of its own: Ctrl-C is for us, and we end it."""
    command = [ffmpeg, "-v", "error", *words]
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)


def _reason(said: IO[bytes], code: int) -> str:
    """Return the last thing that ffmpeg said, without the name of the part of it that said so."""
    said.seek(0)
    lines = said.read(100_000).decode(errors="replace").split("\n")
    lines = [re.sub(r"^(\[[^\]]*\] ?)+", "", line).strip() for line in lines]
    lines = [line for line in lines if line and line != "Conversion failed!"]
    return f"{lines[-1] if lines else 'it said nothing'} (ffmpeg, exit code {code})"
