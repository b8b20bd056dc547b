"""The stand-by server: when it serves, when it does not and what it says then, and how it begins and ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from programs import check_usage
from standbys import wait_for, wait_until_gone, waiting

from wan_loader.standby import world
from wan_loader.standby.learned import Learned
from wan_loader.system.peers import is_own_peer

_WHERE = "import sys; where = 'forked' if 'wan_loader.standby.server' in sys.modules else 'imported'\nprint(where)\n"


def why(done):
    """Why a program was started directly; nothing if it was forked."""
    (where, *_), lines = done.stdout.splitlines(), done.stderr.splitlines()
    reasons = [line.partition("started directly: ")[2] for line in lines if "started directly" in line]
    assert bool(reasons) == (where == "imported"), done
    return "".join(reasons)


@pytest.fixture
def modules(tmp_path):
    """A directory of modules that counts as one of what is installed."""
    path = tmp_path / "site-packages"
    path.mkdir()
    return path


def test_from_its_start_to_its_end(own, script):
    path, server = script(_WHERE), own()
    assert server.status() is None
    assert "there is no stand-by server: `wan-loader standby start` starts one" in why(server.run(path, said=True))
    assert server.run(path).stderr == ""
    assert server.command("standby", "stop").stdout == "there is no stand-by server\n"
    started = server.command("standby", "start", "--only", "--import", "json")
    assert started.stdout.startswith("ready: process ")
    assert server.command("standby", "start").stdout == started.stdout  # the same
    assert json.loads(server.command("standby", "status", "--json").stdout)["server"] == server.status()
    assert why(server.run(path, said=True)) == ""
    pid = server.status()["pid"]
    assert server.command("standby", "stop").stdout == f"stopped: process {pid}\n"
    wait_until_gone(pid)
    assert server.status() is None
    done = server.command("standby", "status", check=False)
    assert (done.returncode, done.stdout) == (1, "there is no stand-by server\n")
    assert "there is no stand-by server" in why(server.run(path, said=True))


def test_one_that_still_imports_is_not_said_to_be_missing(own, script, modules):
    (modules / "slow_module.py").write_text("import os, time\ntime.sleep(60)")
    server = own(modules)
    starting = subprocess.Popen(
        server.words("standby", "start", "--only", "--import", "slow_module"),
        env=server.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(server.pid)
    assert "the stand-by server is still importing" in why(server.run(script(_WHERE), said=True))
    os.kill(server.pid(), signal.SIGKILL)
    starting.wait()


def test_it_ends_when_nobody_asks(own):
    server = own()
    server.start(idle_s=0.3)
    wait_for(lambda: server.pid() is None, 5)
    assert not list((server.directory / "wan-loader").glob("*.socket"))
    check_usage(server.command("standby", "start", "--idle", "soon", check=False), "soon")


def test_several_that_begin_at_once_are_one(own):
    server = own()
    threads = [threading.Thread(target=server.start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.status()["pid"]


def test_a_server_that_is_killed(own, script):
    server = own()
    server.start()
    process, program, _ = waiting(server, script, 0.5)
    os.kill(server.status()["pid"], signal.SIGKILL)
    wait_for(lambda: server.pid() is None)
    done = server.run(script(_WHERE, "where.py"), said=True)  # its socket is still there
    assert why(done) == "the server does not answer (Connection refused)"
    process.communicate(timeout=10)
    assert process.returncode == 5  # its program goes on
    wait_until_gone(program)
    server.start()
    assert why(server.run(script(_WHERE, "where.py"), said=True)) == ""


def test_a_server_that_hangs_is_not_waited_for_and_takes_nothing_later(own, script, monkeypatch, tmp_path):
    server = own()
    server.start()
    pid = server.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    path = script(f"{_WHERE}open(sys.argv[1], 'a').write('x')")
    patience = tmp_path / "sitecustomize.py"
    patience.write_text("import wan_loader.standby.client as client; client.PATIENCE_S = 0.2")
    impatient = {"PYTHONPATH": f"{tmp_path}:{server.env['PYTHONPATH']}"}
    done = server.run(path, tmp_path / "out", said=True, env=impatient)
    said = server.command("standby", "start", check=False, **impatient).stderr
    os.kill(pid, signal.SIGCONT)
    assert f"the stand-by server hangs: process {pid}: end it: wan-loader standby stop" in said
    assert why(done) == "the server does not answer (it has ended)"
    server.command("standby", "status")
    assert (tmp_path / "out").read_text() == "x"


def test_a_changed_file_of_a_module(own, script, modules):
    (modules / "installed.py").write_text("value = 1")
    server, path = own(modules), script(f"{_WHERE}import installed; print(installed.value)")
    server.start("installed")  # what that leaves there is no change
    pid = server.status()["pid"]
    assert server.run(path).stdout == "forked\n1\n"
    (modules / "installed.py").write_text("value = 22")
    done = server.run(path, said=True)
    assert done.stdout == "imported\n22\n"
    assert why(done) == f"{modules}/installed.py has changed, and the server imports it again"
    server.wait_until_ready()
    assert server.status()["pid"] == pid
    assert server.run(path).stdout == "forked\n22\n"
    (modules / "another-1.dist-info").mkdir()  # something is installed
    assert why(server.run(path, said=True)) == f"{modules} has changed, and the server imports it again"


@pytest.mark.parametrize("line", ["open(__file__, 'a').write('value = 2')", ""])
def test_a_file_that_is_written_while_it_is_imported(own, modules, line):
    """Nobody knows which of the two was imported."""
    (modules / "installed.py").write_text(f"{line}\nvalue = 1\n")
    for path in (modules / "installed.py", modules):
        os.utime(path, (1e9, 1e9))
    code = (
        "import os; from wan_loader.standby import prepared as p; print(p.prepare(['installed'], os.environ).changed())"
    )
    env = own(modules).env | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == (f"{modules}/installed.py\n" if line else "\n")


_READER = "import os\nvalue = os.environ.get('SETTING', 'none')\nfor _ in os.environ.items(): pass\ndict(os.environ)\n"


def test_variables_that_imports_have_read(own, script, modules):
    (modules / "reader.py").write_text(f"{_READER}os.environ.setdefault('MADE', 'by import')")
    server, path = own(modules), script(f"{_WHERE}import os, reader; print(reader.value, os.environ['MADE'])")
    server.start("reader", SETTING="a", OTHER="1")
    assert server.run(path, env={"SETTING": "a", "OTHER": "2"}).stdout == "forked\na by import\n"
    for name, value in {"SETTING": "b", "PYTHONHASHSEED": "7", "LC_ALL": "C", "MADE": "here"}.items():
        done = server.run(path, said=True, env={"SETTING": "a", name: value})
        assert why(done) == f"{name} is another than when the server's imports read it"
    done = server.run(path, said=True)
    assert why(done) == "SETTING is another than when the server's imports read it"
    assert done.stdout == "imported\nnone by import\n"


def test_variables_that_a_program_sets(own, script, modules):
    (modules / "reader.py").write_text(_READER)
    server = own(modules)
    server.start("reader")
    told = "the program sets SETTING, which the server's imports have read"
    for i, line in enumerate(("os.environ['SETTING'] = '1'", "os.environ.setdefault('SETTING', '1')")):
        path = script(f"{_WHERE}import os; {line}; import reader; print(reader.value)", f"sets{i}.py")
        done = server.run(path, said=True)
        assert (why(done), done.stdout) == (told, "imported\n1\n")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        path = script(f"{_WHERE}import os; os.environ.update({name}='1')", "threads.py")
        assert name in why(server.run(path, said=True))
    reads = script(
        f"{_WHERE}import os; os.environ['OTHER'] = 'SETTING'; os.environ.get('SETTING'); {{}}.setdefault('SETTING')",
        "reads.py",
    )
    assert why(server.run(reads, said=True)) == ""
    hidden = script(f"{_WHERE}import os; os.environ['SET' + 'TING'] = '1'", "hidden.py")
    done = server.run(hidden, said=True)
    assert "wan-loader: SETTING is set after imports have read it: start this program with --no-standby" in done.stderr
    assert why(server.run(hidden, said=True)) == told  # the next time it is known
    hidden.write_text(f"{_WHERE}# another")
    os.utime(hidden, (2e9, 2e9))
    assert why(server.run(hidden, said=True)) == ""


def test_modules_of_the_programs_own(own, script, modules, tmp_path):
    (modules / "shared.py").write_text("value = 'installed'")
    server, path = own(modules), script(f"{_WHERE}import shared; print(shared.value)")
    server.start("shared")
    (tmp_path / "shared").mkdir()  # a directory alone does not come before it
    assert server.run(path).stdout == "forked\ninstalled\n"
    (tmp_path / "shared" / "__init__.py").write_text("value = 'own'")
    done = server.run(path, said=True)
    assert why(done) == "shared beside the program takes the place of the installed one"
    assert done.stdout.endswith("own\n")


def test_modules_that_no_fork_can_have_are_left_to_programs(own, script, modules):
    (modules / "threaded.py").write_text("import threading; threading.Thread(target=threading.Event().wait).start()")
    (modules / "quick.py").write_text("import threading; t = threading.Thread(target=int); t.start(); t.join()")
    (modules / "broken.py").write_text("raise SystemExit('no')")
    server = own(modules)
    server.start("quick", "threaded", "broken", "none")
    said = server.command("standby", "status").stdout
    assert "left to programs: threaded, as it starts 1 thread\n" in said
    assert "not imported: broken: SystemExit: no\n" in said
    assert "not imported: none: ModuleNotFoundError: No module named 'none'\n" in said
    path = script(f"{_WHERE}print('threaded' in sys.modules, 'quick' in sys.modules)")
    assert server.run(path).stdout == "forked\nFalse True\n"


def test_what_programs_have_imported_is_imported_the_next_time(own, script, modules):
    for name in ("first", "second"):
        (modules / f"{name}.py").write_text("")
    (modules / "joined.py").write_text("def modules(): return ['first', 'not_there']")
    about = modules / "wan_loader-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: wan-loader\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[wan_loader.standby]\nx = joined:modules\n")
    server = own(modules)
    server.command("standby", "start")
    path = script(f"{_WHERE}print('first' in sys.modules, 'second' in sys.modules); import second, beside")
    script("", "beside.py")
    assert server.run(path).stdout == "forked\nTrue False\n"
    wait_for(lambda: server.run(path).stdout == "forked\nTrue True\n")
    (kept,) = [file.read_text().split() for file in server.directory.rglob("*.modules")]
    assert "second" in kept
    assert "beside" not in kept  # that is not for others


def test_the_last_programs_are_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    learned, name = Learned(), "wan_loader.standby.learned"
    for number in range(9):
        learned.learn(f"{number}.py", set(sys.modules) - ({name} if number == 0 else {"wan_loader.errors"}))
        for path in learned.directory.iterdir():
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    assert learned.modules() == ["wan_loader.errors"]
    learned.learn("0.py", set(sys.modules) - {name})  # it is not there any more, and comes back
    assert learned.modules() == ["wan_loader.errors", name]


def test_no_locale_is_no_difference(own, script):
    """As in containers: Python then sets one by itself, and what it starts has another mode than it has."""
    server, path = own(), script(f"{_WHERE}import os; print(sys.flags.utf8_mode, os.environ.get('LC_CTYPE'))")
    for name in [name for name in server.env if name in ("LANG", "PYTHONUTF8") or name.startswith("LC_")]:
        del server.env[name]
    server.start()
    forked, direct = server.both(path)
    assert forked.stdout == "forked\n" + direct.stdout.partition("\n")[2]
    assert direct.stdout.splitlines()[1].startswith("1 ")


def test_a_client_that_is_other_than_the_server(own, script):
    server, path = own(), script(_WHERE)
    server.start()
    words = [sys.executable, "-W", "error", "-m", "wan_loader", "run", path]
    done = subprocess.run(words, env=server.env, capture_output=True, text=True, check=True)
    assert why(done) == "another set of options of Python (-W, -X, ...)"
    names = script(f"{_WHERE}print(sys.executable)", "names.py")
    for name in {os.path.basename(sys.executable), f"python{sys.version_info.major}"}:  # two names of the same
        python = os.path.join(os.path.dirname(sys.executable), name)
        if os.path.exists(python):
            words = [python, *server.words("run", "--quiet", names)[1:]]
            done = subprocess.run(words, env=server.env, capture_output=True, text=True, check=True)
            assert done.stdout == f"forked\n{python}\n"
    os.dup2(2, 300)
    done = server.run(path, said=True, pass_fds=[300])
    os.close(300)
    assert why(done) == "descriptor 300, which is above 251"


def test_what_is_compared():
    ours = world.identity()
    assert world.different_identity(ours, json.loads(json.dumps(ours))) == ""
    assert world.different_identity(ours, ours | {"version of wan-loader": "0"}) == "another version of wan-loader"
    assert world.different_identity(ours, {}) == "another version of wan-loader"


def test_sockets_of_other_users_are_refused(own, script, open_dir, unprivileged):
    server = own()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        open_dir.chmod(0o777)
        with unprivileged():
            listener.bind(str(open_dir / "theirs"))
            listener.listen()
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(open_dir / "theirs"))
        accepted = stack.enter_context(listener.accept()[0])
        if os.geteuid() == 0:  # who listens is another user now
            assert is_own_peer(accepted)
            assert not is_own_peer(client)
            with unprivileged():
                assert not is_own_peer(accepted)
    server.start()
    (server.directory / "wan-loader").chmod(0o755)
    done = server.run(script(_WHERE), said=True)
    assert why(done) == f"the server's directory {server.directory}/wan-loader others may enter it"
    done = server.command("standby", "start", check=False)
    assert (done.returncode, "others may enter it" in done.stderr) == (1, True)
    assert server.pid() is None  # what others could have written names no process to be ended
    (server.directory / "wan-loader").chmod(0o700)
    pid = server.pid()
    server.socket().unlink()
    wait_until_gone(pid)  # nobody could ask it


def test_a_server_that_does_not_begin(own, modules):
    (modules / "platformdirs.py").write_text("raise ImportError('broken on purpose')")
    server = own(modules)
    done = server.command("standby", "start", check=False)
    assert done.returncode == 1
    assert "broken on purpose" in done.stderr
