"""Does `wan-loader profile` tell the truth? Programs that are slow for a known reason, and what is said of each.

    python benchmarks/judged.py [--only NAME]... [--output FILE]

Each program of `judged_programs.py` runs plain, and then under `wan-loader profile -o`; bash's `time` stands around the
program both times. A judgement is right if it names the phase and the process that the program deserves, with what else
is asked for there, and if its total is within 3 % of what `time` says of the same run. The exit code is 1 unless all
are right. Processor time is that of the program and of all that it has waited for, the recording inside it included.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from judged_programs import COLD, PROGRAMS, WEIGHTS, Program, evict, prepare
from turns import describe_run

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path(__file__).resolve().parents[1]
_OFF = 0.03
_SERVED_S = 2.0
_TIMED = 'TIMEFORMAT="%R %U %S"; { time "$@" >/dev/null 2>&1; } 2> time.txt'


@dataclass(frozen=True, slots=True)
class Timed:
    """What bash's `time` says."""

    seconds: float
    cpu_s: float


class _SlowAnswer(http.server.BaseHTTPRequestHandler):
    """Answers with a megabyte, in twenty pieces that take two seconds together."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(20 << 16))
        self.end_headers()
        for _ in range(20):
            time.sleep(_SERVED_S / 20)
            self.wfile.write(bytes(1 << 16))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def slow_server() -> Iterator[str]:
    """Serve slowly, and give the address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _SlowAnswer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/weights"
        server.shutdown()


def timed(words: list[str], home: Path, *, prefix: tuple[str, ...] = ()) -> Timed:
    """Run words to their end with `time` around them, and `prefix` around that."""
    evict(home / COLD)
    command = [*prefix, "bash", "-c", _TIMED, "time", *words]
    subprocess.run(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    seconds, user_s, system_s = map(float, (home / "time.txt").read_text().split()[-3:])
    return Timed(seconds, user_s + system_s)


def judge(program: Program, session: dict[str, Any], time_s: float) -> list[str]:
    """Return what is wrong with what is said of a program.

    Args:
        program: The truth.
        session: The document of `profile -o`.
        time_s: What `time` said of the same run.
    """
    subject = session["processes"][session["subject"]]
    name = subject["name"] if subject["rank"] is None else f"rank {subject['rank']}: {subject['name']}"
    files = {os.path.basename(path) for path in subject["facts"].get("files", ())}
    wrong = [
        (session["verdict"]["phase"] != program.phase, f"phase {session['verdict']['phase']}"),
        (program.process not in name, f"process {name}"),
        (program.worker != (subject["role"] == "worker"), f"role {subject['role'] or 'program'}"),
        (program.says not in session["verdict"]["why"], f"the verdict does not name {program.says!r}"),
        (program.file not in {"", *files}, f"files {sorted(files)}"),
        (program.ended not in ("", subject["ended"]), f"ended: {subject['ended']}"),
        (program.note not in " ".join(session["notes"]), f"no note {program.note!r}"),
        (abs(session["seconds"] - time_s) > _OFF * time_s, f"the total {session['seconds']:.3f} s is off"),
    ]
    return [text for is_wrong, text in wrong if is_wrong]


def measure(name: str, home: Path, url: str) -> dict[str, Any]:
    """Run one program, plain and profiled, and judge what is said."""
    program = PROGRAMS[name]
    for path, text in {"program.py": program.source, **program.more}.items():
        (home / path).parent.mkdir(exist_ok=True)
        (home / path).write_text(text)
    words = [*program.words, str(home / WEIGHTS), url]
    profile = (sys.executable, "-m", "wan_loader", "profile", "--no-ceilings", "--force", "-o", "run.json", "--")
    plain = timed(words, home)
    profiled = timed(words, home, prefix=profile)
    session = json.loads((home / "run.json").read_text())
    wrong = judge(program, session, profiled.seconds)
    subject = session["processes"][session["subject"]]
    return {
        "name": name,
        "because": program.because,
        "expected": f"{program.phase}, {program.process}",
        "said": f"{session['verdict']['phase']}, {subject['name']}",
        "right": not wrong,
        "wrong": wrong,
        "why": session["verdict"]["why"],
        "n_processes": len(session["processes"]),
        "total_s": round(session["seconds"], 3),
        "time_s": profiled.seconds,
        "off": round(session["seconds"] / profiled.seconds - 1, 4),
        "plain_s": plain.seconds,
        "cpu_s": round(profiled.cpu_s, 3),
        "plain_cpu_s": round(plain.cpu_s, 3),
    }


def _line(row: dict[str, Any]) -> str:
    state = "right" if row["right"] else "WRONG"
    return (
        f"{state:5}  {row['name']:18}  {row['expected']:24}  {row['said']:24}  {row['total_s']:6.2f}  "
        f"{row['time_s']:6.2f}  {row['off']:+6.1%}  {row['plain_s']:6.2f}  {'; '.join(row['wrong'])}"
    ).rstrip()


def main() -> None:
    """Measure all, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PROGRAMS, help="only this one (again for more)")
    parser.add_argument("--output", type=Path, help="all that was said, as JSON")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rows = []
    print(f"{'':5}  {'program':18}  {'expected':24}  {'said':24}   total    time     off   plain")
    with tempfile.TemporaryDirectory() as directory, slow_server() as url:
        prepare(Path(directory))
        for name in arguments.only or PROGRAMS:
            rows.append(measure(name, Path(directory), url))
            print(_line(rows[-1]), flush=True)
    right = sum(row["right"] for row in rows)
    families = sum(row["n_processes"] > 2 for row in rows)  # one of them is bash, for its `time`
    print(f"{right} of {len(rows)} judged rightly; {families} of several processes")
    document = {**describe_run(), "n": len(rows), "right": right, "families": families, "programs": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    if right < len(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
