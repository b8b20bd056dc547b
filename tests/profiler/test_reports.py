"""What is rendered from a session: terminal, trace, page (looked at in a browser)."""

import html
import io
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise

import pytest
from test_session import S, make_program, make_session

from wan_loader.console import PlainConsole
from wan_loader.events import Span
from wan_loader.printable import shorten
from wan_loader.profiler.analysis.session import Advice, Turn
from wan_loader.profiler.render.page import to_page
from wan_loader.profiler.render.shapes import axis_step
from wan_loader.profiler.render.terminal import print_session, shown_processes
from wan_loader.profiler.render.trace import to_trace, without_overlap
from wan_loader.spans import Mark

SESSIONS = {"load": make_session, "program": make_program}


@pytest.fixture(params=SESSIONS)
def session(request):
    return SESSIONS[request.param]()


def text_of(session, width=120):
    console = PlainConsole()
    console.file, console.width = io.StringIO(), width
    print_session(console, session)
    return console.file.getvalue()


class TestTerminal:
    def test_says_everything(self, session):
        text = text_of(session, 1000)
        for phase in session.report.phases:
            assert phase.name in text
        assert session.verdict.why in text
        assert session.report.target in text
        assert all(note in text for note in session.notes)

    def test_fits_eighty_columns(self, session):
        table = [line for line in text_of(session, 80).splitlines() if line.startswith(("read", "phase", "other"))]
        assert table
        assert all(len(line.rstrip()) <= 80 and "…" not in line for line in table)

    def test_processes_side_by_side(self):
        text = text_of(make_program())
        assert "rank 0" in text
        assert "rank 1" in text


class TestFamilies:
    """Several processes, of which one set the pace."""

    @pytest.fixture
    def family(self):
        session = make_program()
        processes = tuple(
            replace(p, name="a_script_with_a_long_name.py", parent=1, ended="killed by SIGKILL")
            for p in session.processes
        )
        processes = (replace(processes[0], name="torchrun", role="launcher", ended="exit 0"), *processes[1:])
        turns = (Turn(0, 0, S // 2), Turn(2, S // 2, 3 * S), Turn(1, 3 * S, 4 * S))
        return replace(session, processes=processes, turns=turns, subject=2)

    @pytest.mark.parametrize("width", [80, 100, 120])
    def test_a_row_each_that_fits(self, family, width):
        lines = text_of(family, width).splitlines()
        rows = lines[next(i for i, line in enumerate(lines) if line.startswith("process ")) :][:4]
        assert rows[1].startswith("torchrun (launcher)")
        assert [row[:6] for row in rows[2:]] == ["rank 0", "rank 1"]
        assert all("name.py " in row for row in rows[2:])
        assert all("SIGKILL" in row for row in rows[2:])
        assert all(len(row.rstrip()) <= width for row in rows)
        assert all(word in rows[0] for word in ("paced", "mostly", "read", "ended", "timeline"))
        for title in ("from", "to"):
            left_out = [line for line in lines if line.startswith("no room for: ")]
            assert (f" {title} " in rows[0]) is not any(f" {title}" in line for line in left_out)

    def test_a_group_of_rows_each_on_the_page(self, family):
        page = to_page(family)
        drawing = page[page.index("<svg") : page.index("</svg>")]
        assert drawing.count('font-weight="600"') == 3
        assert drawing.count('class="p-life"') == 3
        assert "torchrun (launcher)" in drawing

    def test_the_phases_are_those_of_the_whole_program(self, family):
        assert (family.start_ns, family.end_ns) == (0, 4 * S)
        assert [family.paced_s(i) for i in range(3)] == [0.5, 1.0, 2.5]
        assert max(s.end_ns for s in family.spans) <= 4 * S

    def test_many_processes_are_cut_to_those_that_matter(self, family):
        more = [replace(family.processes[1], pid=100 + i, start_ns=i) for i in range(200)]
        session = replace(family, processes=(*family.processes, *more))
        shown = shown_processes(session)
        assert len(shown) == 16
        assert {1, 2} <= set(shown)
        assert "187 processes that did next to nothing: not shown" in text_of(session)

    def test_the_middle_is_cut_out(self):
        assert shorten("a" * 10, 10) == "a" * 10
        assert shorten("abcdefghijkl", 7) == "ab…ijkl"


class TestWhatToType:
    """Commands and code that advice gives: what is copied is what was meant."""

    COMMAND = "wan-loader run /a/long/way/to/a/program/with/a/long/name.py --an-option=1 --another-option=2 <x>"
    CODE = "pipe = WanPipeline.from_pretrained('/a/long/way/to/a/model', torch_dtype=torch.bfloat16, token='<x>')"

    @pytest.fixture
    def advised(self):
        advice = Advice("rule", "do it", "because", 1.0, once=("wan-loader standby start",), command=self.COMMAND)
        return replace(make_session(), advice=(replace(advice, code=f"{self.CODE}\n{self.CODE}"),))

    def test_in_a_terminal(self, advised):
        lines = text_of(advised, 80).splitlines()
        assert lines.count(f"     {self.CODE}") == 2, "code stays whole"
        first = lines.index("   $ wan-loader standby start") + 1
        assert lines[first].endswith(" \\")
        assert f"{lines[first][:-1]}{lines[first + 1].strip()}" == f"   $ {self.COMMAND}"

    def test_on_the_page(self, advised):
        (text,) = re.findall(r"<pre>(.*?)</pre>", to_page(advised), re.S)
        assert html.unescape(text).splitlines()[:2] == ["$ wan-loader standby start", f"$ {self.COMMAND}"]
        assert "<x>" not in text


class TestTrace:
    """Against the parts of the trace event format that are used."""

    def test_schema(self, session):
        document = to_trace(session)
        assert set(document) == {"traceEvents", "displayTimeUnit", "otherData"}
        for event in document["traceEvents"]:
            assert event["ph"] in "XMC"
            assert isinstance(event["name"], str)
            assert isinstance(event["pid"], int)
            assert isinstance(event["tid"], int)
            if event["ph"] == "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
            if event["ph"] == "C":
                assert all(isinstance(v, (int, float)) for v in event["args"].values())

    def test_spans_never_overlap_within_a_track(self, session):
        tracks = {}
        for event in to_trace(session)["traceEvents"]:
            if event["ph"] == "X":
                tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        assert tracks
        for spans in tracks.values():
            spans.sort()
            assert all(a[1] <= b[0] for a, b in pairwise(spans))

    def test_counters(self):
        names = {e["name"] for e in to_trace(make_session())["traceEvents"] if e["ph"] == "C"}
        assert names == {"bytes in flight", "ring slots taken"}
        assert "from storage" in {e["name"] for e in to_trace(make_program())["traceEvents"]}

    def test_rounded_device_times_are_cut(self):
        cut = without_overlap([Mark("h2d", 0, 11, 1, "s"), Mark("h2d", 10, 20, 1, "s")])
        assert [(s.start_ns, s.end_ns) for s in cut] == [(0, 10), (10, 20)]
        assert without_overlap([]) == []
        assert isinstance(cut[0], Span)


class TestPage:
    def test_is_self_contained_and_escaped(self, session):
        page = to_page(session)
        assert not re.search(r"(src|href)\s*=|url\(|@import|<script", page)
        assert "<b> & more" not in page
        assert "because <i>" not in page
        assert page.count("<svg") >= 1

    def test_in_a_browser(self, session, tmp_path):
        """Chromium finds the table and the timeline laid out with a size, inside the page."""
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if browser is None:
            pytest.skip("no chromium")
        probe = """<script>addEventListener("load", () => {
          const box = s => { const e = document.querySelector(s); const r = e && e.getBoundingClientRect();
            return r ? [Math.round(r.width), Math.round(r.height)].join("x") : "none"; };
          const rects = [...document.querySelectorAll("svg.timeline rect")];
          const bars = rects.filter(e => e.getBoundingClientRect().width > 1);
          const fill = bars.length ? getComputedStyle(bars[0]).fill : "none";
          document.body.dataset.probe = [box("table.phases"), box("svg.timeline"), bars.length, fill,
            document.documentElement.scrollWidth <= innerWidth].join("|"); });</script></body>"""
        page = to_page(session).replace("default-src 'none'; ", "").replace("</body>", probe)
        (tmp_path / "page.html").write_text(page)
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        flags += (
            "--disable-component-update --disable-sync --window-size=1200,1400 --dump-dom --virtual-time-budget=1000"
        )
        done = subprocess.run(
            [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"],
            capture_output=True,
            text=True,
            timeout=90,
            check=True,
        )
        table, timeline, bars, fill, fits = re.search(r'data-probe="([^"]+)"', done.stdout)[1].split("|")
        assert all(int(n) > 100 for n in table.split("x"))
        assert int(timeline.split("x")[0]) > 600
        assert int(bars) >= 3
        assert fill.startswith("rgb(")
        assert fill != "rgb(0, 0, 0)"
        assert fits == "true"


@pytest.mark.parametrize(("length", "step"), [(10, 2), (0.7, 0.1), (126, 20), (0.00001, 0.000002)])
def test_axis_step(length, step):
    assert axis_step(length) == pytest.approx(step)
