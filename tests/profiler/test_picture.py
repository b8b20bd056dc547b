"""The picture of a session: every word inside of it, none on another one, nothing of others' acts."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import combinations

import pytest
from test_session import S, make_program, make_session

from wan_loader.cli.app import main
from wan_loader.errors import OutputError
from wan_loader.profiler.analysis.run_report import RunReport, RunStage
from wan_loader.profiler.analysis.session import Turn
from wan_loader.profiler.render import png
from wan_loader.profiler.render.picture import draw, draw_run
from wan_loader.profiler.render.shapes import COLOURS, Rect, Words, fitting, text_width, wrapped
from wan_loader.profiler.render.svg import to_inline_svg, to_svg

EVIL = "<script>alert(1)</script>\x1b[31m\u202e&\"' "


def make_family(n=3, name="a_script_with_a_long_name.py", title="python -u /a/long/way/to/a_script.py --flag " * 8):
    session = make_program()
    first = session.processes[0]
    processes = tuple(
        replace(first, name=name, title=title, pid=10 + i, parent=1, rank=i, start_ns=i * S // 20, ended="exit 0")
        for i in range(n)
    )
    turns = (Turn(0, 0, 2 * S), *(Turn(i, 2 * S, 2 * S + S // n) for i in range(1, n)))
    return replace(session, processes=processes, turns=turns, subject=0)


SESSIONS = {
    "load": make_session,
    "program": make_program,
    "family": make_family,
    "many": lambda: make_family(40),
    "evil": lambda: make_family(2, EVIL * 5, EVIL * 40),
    "wide": lambda: make_family(2, "日本語の長い名前" * 9, "日本語" * 90),
}


def make_run(n=3, name="text_encoder", first_step_s=6.5):
    """The report of a run, as `--profile-out` of a pipeline has it."""
    return RunReport(
        target=name * 3,
        command="generate",
        device="cuda:0",
        dtype="bfloat16",
        seconds=20.0,
        nbytes_file=5 * 10**9,
        first_step_s=first_step_s,
        stages=tuple(RunStage(("load", "stage", "wait")[i % 3], name, i / 10, 8.0, 10**9) for i in range(n)),
        phases=(),
        steps_s=(),
        why="reading the files set the pace; " * 3,
        warnings=(),
    )


RUNS = {"run": make_run, "long run": lambda: make_run(200, EVIL * 3, None), "empty run": lambda: make_run(0)}


@pytest.fixture(params=[*SESSIONS, *RUNS])
def drawing(request):
    return draw_run(RUNS[request.param]()) if request.param in RUNS else draw(SESSIONS[request.param]())


def box(words):
    width = text_width(words.text, words.size, bold=words.bold)
    left = words.x - {"start": 0, "middle": width / 2, "end": width}[words.anchor]
    return left, words.y - 0.75 * words.size, left + width, words.y + 0.2 * words.size


def test_no_words_lie_on_others_or_reach_out(drawing):
    words = [shape for shape in drawing.shapes if isinstance(shape, Words) and shape.text]
    assert len(words) >= 5
    boxes = [(w, box(w)) for w in words]
    for shape, (left, top, right, bottom) in boxes:
        assert 0 <= left < right <= drawing.width, shape
        assert 0 <= top < bottom <= drawing.height, shape
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one, other)


def test_the_file_is_one_picture_and_acts_on_nothing(drawing):
    text = to_svg(drawing)
    root = ElementTree.fromstring(text)
    assert (root.get("width"), root.get("height")) == ("1200", str(drawing.height))
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script|<style|\x1b|\u202e", text)
    fills = {element.get("fill") for element in root.iter() if element.tag.endswith(("rect", "text"))}
    assert fills <= set(COLOURS.values())
    assert "class=" in to_inline_svg(drawing, "timeline")


def test_a_lane_each_on_one_clock():
    drawing = draw(make_family())
    words = [shape.text for shape in drawing.shapes if isinstance(shape, Words)]
    lives = [shape for shape in drawing.shapes if isinstance(shape, Rect) and shape.colour == "life"]
    assert len(lives) == 3
    assert sorted(life.x for life in lives) == [life.x for life in lives], "each begins when it began"
    assert len({life.y for life in lives}) == 3
    assert sum(text.startswith(f"rank {i}: a_script") for text in words for i in range(3)) == 3
    assert any("…" in text and text.startswith("python -u") for text in words), "commands lose their middle"
    assert any("because <i>" in text for text in words), "the verdict is in the title"
    assert "set the pace" in words
    assert any(text.startswith("4 s") for text in words), "the whole time too"


def test_a_load_has_a_row_for_each_thread():
    words = [shape.text for shape in draw(make_session()).shapes if isinstance(shape, Words)]
    assert {"MainThread", "reader 0"} <= set(words)
    assert any(text.startswith("read ") for text in words), "the legend has times"


def test_threads_that_are_not_drawn_are_told_of():
    session = make_session()
    process = session.processes[0]
    spans = tuple(replace(process.spans[1], track=f"reader {i}") for i in range(60))
    drawing = draw(replace(session, processes=(replace(process, spans=spans),)))
    assert "20 threads more: not drawn" in [shape.text for shape in drawing.shapes if isinstance(shape, Words)]


def test_png(drawing):
    Image = pytest.importorskip("PIL.Image")
    image = Image.open(io.BytesIO(png.to_png(drawing)))
    assert image.size == (2400, 2 * drawing.height)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    for shape in drawing.shapes:
        if isinstance(shape, Rect) and shape.colour in ("read", "import") and shape.hover and shape.width > 3:
            place = int(2 * shape.x + shape.width), int(2 * shape.y + shape.height)
            assert "#{:02x}{:02x}{:02x}".format(*image.getpixel(place)) == COLOURS[shape.colour], "in the middle of it"
            break


def test_png_without_pillow_says_so_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(png, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"Pillow, which is not installed.*wan-loader\[picture\].*SVG"):
        png.check_png(tmp_path / "a.png")
    png.check_png(None)


@pytest.mark.parametrize("text", ["", "a", "word " * 50, "x" * 400, "日本" * 80])
@pytest.mark.parametrize("width", [20, 100, 700])
def test_what_is_fitted_fits(text, width):
    assert text_width(fitting(text, width, 12), 12) <= width
    lines = wrapped(text, width, 12, most=3)
    assert 1 <= len(lines) <= 3
    assert all(text_width(line, 12) <= width for line in lines)


def test_pictures_from_the_command_line(tmp_path, call_main, capfd):
    pytest.importorskip("PIL")
    (tmp_path / "run.json").write_text(json.dumps(make_session().to_json()))
    words = ("report", tmp_path / "run.json", "--svg", tmp_path / "a.svg", "--png", tmp_path / "a.png")
    assert call_main(main, *words) == 0
    assert f"written: {tmp_path / 'a.svg'}, {tmp_path / 'a.png'}" in capfd.readouterr().err
    assert (tmp_path / "a.svg").read_text().startswith("<svg xmlns=")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert call_main(main, *words) == 1
    assert "exists" in capfd.readouterr().err
    assert call_main(main, "report", tmp_path / "run.json", tmp_path / "run.json", "--svg", tmp_path / "b.svg") == 2
    assert call_main(main, "report", tmp_path / "run.json", "--svg", tmp_path / "b", "--png", tmp_path / "b") == 1
    assert "two outputs in one file" in capfd.readouterr().err
