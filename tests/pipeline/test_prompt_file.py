"""Files of prompts: what lines mean, what is told of wrong ones, and names that stay; then the command with one."""

import functools
import json
from pathlib import Path

import pytest

from wan_loader import OptionError
from wan_pipeline.prompt_file import read_prompt_file
from wan_pipeline.video_request import VideoRequest

TASK = "t2v-A14B"


@pytest.fixture
def read(tmp_path):
    def reading(*lines, check=lambda request: None, **defaults):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(lines))
        return read_prompt_file(file, TASK, {"seed": -1, **defaults}, Path("videos"), check)

    return reading


def test_lines_are_prompts_or_objects(read):
    plain, full = read(
        "Two cats",
        "  ",
        '{"prompt": "A dog", "size": "832*480", "frame_num": 5, "sample_steps": 3, "sample_shift": 2, '
        '"sample_guide_scale": "3,4", "sample_solver": "dpm++", "negative_prompt": "cats", "base_seed": 9, '
        '"save_file": "dog.mp4"}',
        steps=7,
        frame_num=None,
    )
    assert plain.request == VideoRequest.make(TASK, "Two cats", steps=7)
    assert (plain.number, plain.draws_seed) == (1, True)
    assert full.request == VideoRequest.make(
        TASK,
        "A dog",
        size=(832, 480),
        frame_num=5,
        steps=3,
        shift=2,
        guide_scale=(3.0, 4.0),
        solver="dpm++",
        negative_prompt="cats",
        seed=9,
    )
    assert (full.number, full.draws_seed, full.target) == (3, False, Path("videos/dog.mp4"))


def test_lines_end_where_files_say_and_nowhere_else(tmp_path):
    odd = "\u2028 \x85"
    (tmp_path / "p.txt").write_bytes(f'\ufeffTwo{odd}cats\r\n\r\n{{"prompt": "A{odd}dog"}}\n'.encode())
    found = read_prompt_file(tmp_path / "p.txt", TASK, {}, Path(), lambda request: None)
    assert [(line.number, line.request.prompt) for line in found] == [(1, f"Two{odd}cats"), (3, f"A{odd}dog")]


def test_guidance_may_be_a_list(read):
    text, pair = read('{"prompt": "a", "sample_guide_scale": "3,4"}', '{"prompt": "b", "sample_guide_scale": [3, 4]}')
    assert pair.request.guide_scale == text.request.guide_scale == (3.0, 4.0)


def test_names_tell_what_is_asked_for_and_stay(read):
    cats, dog = read("Two cats: boxing!", "A dog")
    assert cats.target.name.startswith("t2v-A14B_1280x720_two-cats-boxing_")
    again = read("A dog", "A bird", "Two cats: boxing!")
    assert (again[2].target, again[0].target) == (cats.target, dog.target)
    names = {read("A dog", **given)[0].target for given in ({}, {"seed": 3}, {"seed": 4}, {"steps": 4}, {"shift": 1.0})}
    assert len(names) == 5
    assert [line.target.stem[-2:] for line in read("A dog", "A dog", "A dog")][1:] == ["_2", "_3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "steps": 3}', "unknown field 'steps'"),
        ('{"prompt": "x", "frame_num": 80}', "4n+1"),
        ('{"prompt": "x", "frame_num": "81"}', "frame_num '81': it must be 4n+1"),
        ('{"prompt": "x", "frame_num": true}', "frame_num is true"),
        ('{"prompt": "x", "size": "large"}', "WIDTH*HEIGHT"),
        ('{"prompt": "x", "size": 3}', "width and height"),
        ('{"prompt": "x", "sample_guide_scale": [1]}', "guide_scale=(1,): use two numbers"),
        ('{"prompt": "x", "sample_guide_scale": {}}', "sample_guide_scale"),
        ('{"prompt": "x", "base_seed": -2}', "seed -2"),
        ('{"prompt": "x", "base_seed": "7"}', "seed '7'"),
        ('{"prompt": "x", "save_file": ""}', "name of a file"),
        ('{"prompt": "x", "save_file": "a\\u0000b.mp4"}', "name of a file"),
        ('{"prompt": "x", "save_file": "\\ud800.mp4"}', "name of a file"),
        ('{"prompt": "x", "prompt": "y"}', "stands twice"),
        ('{"prompt": "x", "sample_shift": NaN}', "no number"),
        ('{"prompt": "x"', "no JSON"),
        ('{"size": "32*32"}', "prompt is empty"),
        ('{"prompt": 3}', "prompt is of type int"),
    ],
)
def test_a_wrong_line_is_named(read, line, message):
    with pytest.raises(OptionError) as caught:
        read("Fine", line)
    assert "prompts.txt, line 2: " in str(caught.value)
    assert message in str(caught.value)


def test_what_the_model_cannot_do_is_told_with_its_line(read):
    def check(request):
        if request.prompt == "B":
            raise OptionError.because("too large")

    with pytest.raises(OptionError, match="line 3: too large"):
        read("A", "", "B", check=check)


def test_files_that_make_no_sense(read, tmp_path):
    with pytest.raises(OptionError, match="has no prompt"):
        read(" ", "")
    with pytest.raises(OptionError, match="lines 1 and 2: both are for"):
        read('{"prompt": "a", "save_file": "v.mp4"}', '{"prompt": "b", "save_file": "v.mp4"}')
    with pytest.raises(OptionError, match="lines 1 and 2: both are for"):
        read("a", "a", seed=3)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("bad.txt", "none.txt"):
        with pytest.raises(OptionError, match=name):
            read_prompt_file(tmp_path / name, TASK, {}, Path(), lambda request: None)


# --- the command


@pytest.fixture
def run(call_main, tiny_wan, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    from wan_pipeline.commands.app import main

    words = ["generate", "--ckpt_dir", tiny_wan(), "--device", "cpu", "--size", "32*32", "--frame_num", "5"]
    words += ["--sample_steps", "2", "--prompt_file", tmp_path / "p.txt", "--save_dir", tmp_path / "videos"]
    return functools.partial(call_main, main, *words)


def test_a_failing_line_is_told_of_and_the_others_are_made(run, tmp_path, monkeypatch, capfd):
    from wan_pipeline import pipeline

    (tmp_path / "p.txt").write_text('Two cats\nBroken\n{"prompt": "A dog", "base_seed": 3, "save_file": "dog.mp4"}\n')
    started = []
    begin, encode = pipeline.begin, pipeline.WanT2V._encode

    def failing(self, request, tell):
        if request.prompt == "Broken":
            raise RuntimeError("out of\nluck")
        return encode(self, request, tell)

    monkeypatch.setattr(pipeline, "begin", lambda *a: started.append(a) or begin(*a))
    monkeypatch.setattr(pipeline.WanT2V, "_encode", failing)
    assert run("--profile-out", tmp_path / "run.json") == 1
    out, err = capfd.readouterr()
    assert "line 2 failed: RuntimeError: out of\\nluck\n" in err
    assert "2 videos made, 1 failed (line 2)" in err
    assert "3/3: line 3, seed 3, A dog" in err
    assert len(out.splitlines()) == len(list((tmp_path / "videos").iterdir())) == 2
    report = json.loads((tmp_path / "run.json").read_text())
    assert [video["state"] for video in report["videos"]] == ["made", "failed", "made"]
    assert report["pipeline"]["time_to_first_step_s"] > 0

    # what is there is skipped, whatever seed was drawn for it
    monkeypatch.setattr(pipeline.WanT2V, "_encode", encode)
    (tmp_path / "run.json").unlink()
    assert run() == 0
    assert "1 video made, 2 there already" in capfd.readouterr().err
    assert len(started) == 2
    assert run("--json") == 0
    out, err = capfd.readouterr()
    assert "0 videos made, 3 there already" in err
    assert [video["state"] for video in json.loads(out)["videos"]] == ["there"] * 3
    assert len(started) == 2
    dog = (tmp_path / "videos" / "dog.mp4").stat()
    assert run("--force") == 0
    assert "3 videos made" in capfd.readouterr().err
    assert (tmp_path / "videos" / "dog.mp4").stat().st_ino != dog.st_ino


def test_a_start_leaves_room_for_the_largest(run, tmp_path, monkeypatch):
    from wan_pipeline.commands import generate as module

    (tmp_path / "p.txt").write_text('A\n{"prompt": "B", "frame_num": 9}\n{"prompt": "C", "size": "64*48"}')
    asked = []

    def start(settings, request):
        asked.append((request.size, request.frame_num))
        raise OptionError.because("enough")

    monkeypatch.setattr(module, "_started", start)
    assert run() == 1
    assert asked == [((64, 48), 9)]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompt", "x"], 2, "not with both"),
        (["--save_file", "v.mp4"], 1, "use --save_dir"),
        (["--base_seed", "-2"], 1, "line 1: seed -2"),
    ],
)
def test_flags_that_contradict(run, tmp_path, capfd, words, code, message):
    (tmp_path / "p.txt").write_text("A")
    assert run(*words) == code
    assert message in capfd.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_the_start(run, tmp_path, capfd):
    (tmp_path / "p.txt").write_text('{"prompt": "B", "save_file": "no/such/v.mp4"}\nA')
    assert run() == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["videos"]
    assert "no directory that you may write to" in capfd.readouterr().err
    (tmp_path / "videos" / "there").mkdir()
    (tmp_path / "p.txt").write_text('{"prompt": "B", "save_file": "there"}')
    assert run() == 1
    assert "there is a directory: give the name of a file" in capfd.readouterr().err
    # the second A would be called like B
    lines = ["A", "A", "B", "C"]
    names = ["v.mp4", "v.mp4", "v_2.mp4", "c.mp4"]
    objects = [{"prompt": line, "save_file": name} for line, name in zip(lines, names, strict=True)]
    (tmp_path / "p.txt").write_text("\n".join(map(json.dumps, objects)))
    assert run() == 1
    assert "error: " + ", ".join([str(tmp_path / "videos" / "v_2.mp4")] * 2) + ": two" in capfd.readouterr().err
