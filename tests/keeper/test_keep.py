"""Weights that are kept, by real processes: what is attached is what would be loaded, and who may go when."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from gguf_files import blocks, gguf_bytes
from keepers import kill_keeper, user_count, wait_until
from programs import Program
from safetensors.torch import load_file, save_file

import wan_loader
from wan_loader.arguments import check_keep
from wan_loader.errors import KeepError, OptionError
from wan_loader.keeper import client, messages, place, serve
from wan_loader.system.peers import own_directory
from wan_loader.verify import same_bits

#: Attaches, says the sum of a tensor, and says it again for each line that comes.
USER = """
import sys, wan_loader
path, device = sys.argv[1:]
found = wan_loader.load(path, device, dtype="bf16", keep=True)
print(found.kept.state, flush=True)
while True:
    print(found.tensors["large"].float().sum().item(), flush=True)
    if not sys.stdin.readline():
        break
"""


class User:
    """A process that has attached, and says what it sees."""

    def __init__(self, path, device):
        (stdin, self._ask), (self._answers, stdout) = os.pipe(), os.pipe()
        self._program = Program("-c", USER, path, device, stdin=stdin, stdout=stdout)
        os.close(stdin)
        os.close(stdout)
        self._lines = os.fdopen(self._answers)
        assert self._lines.readline() == "attached\n", self._program.output()
        self.total = float(self._lines.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._ask)
        self._program.wait(30)
        self._lines.close()

    def kill(self):
        self._program.kill()

    def see(self):
        """What it sees now."""
        os.write(self._ask, b"\n")
        return float(self._lines.readline())


def check_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor.to(found[name].device)), name
        assert found[name].stride() == tensor.stride()


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("keep", [True, "copy"])
def test_what_is_attached_is_what_is_loaded(runtime, model, device, dtype, keep):
    expected = wan_loader.load_file(model, device, dtype=dtype)
    kept = wan_loader.keep(model, device, dtype=dtype)
    assert kept.report.n_tensors == len(expected)
    found = wan_loader.load(model, device, dtype=dtype, keep=keep)
    assert found.kept.state == ("copied" if keep == "copy" else "attached")
    check_equal(found.tensors, expected)
    report = found.report
    assert (report.io.mode, report.n_tensors, report.nbytes_file, report.warnings) == ("kept", len(expected), 0, ())
    assert report.nbytes_device == sum(t.nbytes for t in expected.values())
    assert report.to_json()["kept"]["state"] == found.kept.state
    owners = {tensor.untyped_storage().data_ptr() for tensor in found.tensors.values() if tensor.numel()}
    assert len(owners) == len(expected) - 1  # each its own, but for the empty one
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.tensors.values())
    if keep is True:  # where kernels expect the first element
        assert all(tensor.data_ptr() % 512 == 0 for tensor in found.tensors.values())
    assert wan_loader.verify_kept(model, device, dtype=dtype) == []
    assert user_count() == (keep is True)


def test_a_subset_and_a_module(runtime, tmp_path, device):
    net = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Linear(5, 3))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    wan_loader.keep(tmp_path / "net.safetensors", device)
    found = wan_loader.load(tmp_path / "net.safetensors", device, names=["1.bias", "0.weight"], keep=True)
    assert list(found.tensors) == ["1.bias", "0.weight"]
    assert found.kept.state == "attached"
    with wan_loader.empty_weights():
        other = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Linear(5, 3))
    report = wan_loader.load_into(other, tmp_path / "net.safetensors", device=device, keep=True)
    assert report.kept.state == "attached"
    x = torch.randn(2, 9, device=device)
    assert torch.equal(other(x), net.to(device)(x))
    assert all(p.requires_grad for p in other.parameters())
    del found, other
    wait_until(lambda: user_count() == 0)


def test_shared_storages_and_strides(runtime, tmp_path, device):
    base = torch.randn(6, 7)
    torch.save({"whole": base, "turned": base.T, "row": base[2], "int": torch.arange(5)}, tmp_path / "m.pth")
    for dtype in (None, "bf16"):
        expected = wan_loader.load_file(tmp_path / "m.pth", device, dtype=dtype)
        wan_loader.keep(tmp_path / "m.pth", device, dtype=dtype)
        for keep in (True, "copy"):
            found = wan_loader.load(tmp_path / "m.pth", device, dtype=dtype, keep=keep)
            assert found.kept.state != "source"
            check_equal(found.tensors, expected)
            assert found.tensors["turned"].data_ptr() == found.tensors["whole"].data_ptr()


@pytest.mark.parametrize("kind", ["legacy", "late", "part"])
def test_what_is_not_loaded_straight_to_its_place(runtime, tmp_path, device, kind):
    base, options = torch.randn(300), {"dtype": "bf16"}
    path = tmp_path / "m.pth"
    if kind == "legacy":
        torch.save({"a": base, "b": base[3:9]}, path, _use_new_zipfile_serialization=False)
    elif kind == "late":  # two dtypes on one storage
        torch.save({"a": base, "norm": base[:20]}, path)
        options["keep_fp32"] = ("norm",)
    else:
        torch.save({"state": {"a": base, "b": torch.arange(3)}, "more": {"c": base}}, path)
        options["part"] = "state"
    wan_loader.keep(path, device, **options)
    found = wan_loader.load(path, device, keep=True, **options)
    assert found.kept.state == "attached"
    check_equal(found.tensors, wan_loader.load_file(path, device, **options))


def test_numbers_of_quantised_tensors(runtime, tmp_path, device):
    path = tmp_path / "m.gguf"
    content = torch.arange(4 * 34, dtype=torch.uint8)
    path.write_bytes(gguf_bytes({"w": blocks("Q8_0", (4, 32), content)}))
    wan_loader.keep(path, device, dtype="bf16")
    found = wan_loader.load(path, device, dtype="bf16", keep=True)
    assert found.kept.state == "attached"
    check_equal(found.tensors, wan_loader.load_file(path, device, dtype="bf16"))


def test_a_second_time_nothing_is_loaded(runtime, model, device):
    assert wan_loader.keep(model, device, dtype="bf16").report is not None
    assert wan_loader.keep(model, device, dtype="bf16").report is None
    assert len(client.status()["items"]) == 1


def test_how_much_need_not_be_taken(runtime, model, device):
    assert wan_loader.kept_nbytes(model, device, dtype="bf16") == 0
    wan_loader.keep(model, device, dtype="bf16")
    (item,) = client.status()["items"]
    assert wan_loader.kept_nbytes(model, device, dtype="bf16") == item["nbytes"] > 0
    assert wan_loader.kept_nbytes(model, device) == 0
    assert wan_loader.kept_nbytes(model, device, dtype="bf16", keep_fp32=["half"]) == 0


def test_nothing_stays_mapped_or_open(runtime, model, open_files):
    wan_loader.keep(model, "cpu")
    wan_loader.load_file(model, keep=True)
    before = open_files("wan-loader-kept")
    wan_loader.load_file(model, keep=True)
    assert open_files("wan-loader-kept") == before
    assert before[1] == 0


def test_why_it_was_loaded_as_ever(runtime, model, tmp_path, device):
    def loaded(path=model, **options):
        found = wan_loader.load(path, device, keep=True, **options)
        assert found.kept.state == "source"
        assert found.tensors
        assert found.report.warnings == (f"not attached to kept weights: {found.kept.reason}",)
        return found.kept.reason

    assert loaded() == "there is no keeper"
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(5)}, path)
    wan_loader.keep(path, device)
    assert loaded() == "it is not kept"
    assert loaded(path, dtype="fp16") == "it is kept as in the file, and not as float16"
    save_file({"w": torch.randn(5)}, path)
    assert loaded(path) == "its files have changed since it was kept"
    assert wan_loader.keep(path, device).dropped == (str(path),)
    assert len(client.status()["items"]) == 1
    assert wan_loader.load(path, device, keep=True).kept.state == "attached"


def test_a_killed_keeper_takes_nothing_from_its_users(runtime, model, device):
    expected = load_file(model)["large"].bfloat16()
    wan_loader.keep(model, device, dtype="bf16")
    mine = wan_loader.load_file(model, device, dtype="bf16", keep=True)
    with User(model, device) as user:
        assert user_count() == 2
        kill_keeper()
        assert user.see() == user.total
        assert torch.equal(mine["large"].cpu(), expected)
        assert wan_loader.load(model, device, keep=True).kept.reason == "there is no keeper"
        # its socket is still there
        wan_loader.keep(model, device, dtype="bf16")
        assert wan_loader.load(model, device, dtype="bf16", keep=True).kept.state == "attached"
        assert user.see() == user.total


def test_a_killed_user_is_counted_no_more(runtime, model, device):
    wan_loader.keep(model, device, dtype="bf16")
    with User(model, device) as user:
        assert user_count() == 1
        user.kill()
    wait_until(lambda: user_count() == 0)


def test_what_is_dropped_stays_with_its_users(runtime, model, device):
    expected = load_file(model)["large"].bfloat16()
    wan_loader.keep(model, device, dtype="bf16")
    found = wan_loader.load_file(model, device, dtype="bf16", keep=True)
    (dropped,) = client.drop(label=str(model))
    assert dropped["n_users"] == 1
    assert client.status()["items"] == []
    assert torch.equal(found["large"].cpu(), expected)
    assert wan_loader.load(model, device, dtype="bf16", keep=True).kept.reason == "it is not kept"


def test_the_limit(runtime, tmp_path, device):
    nbytes = 40 << 20 if device == "cuda" else 1 << 20
    for name in "abc":
        save_file({name: torch.zeros(nbytes, dtype=torch.uint8)}, tmp_path / name)
    paths = [str(tmp_path / name) for name in "abc"]
    limit = 2 * nbytes + 4096
    wan_loader.keep(paths[0], device, limit=limit)
    wan_loader.keep(paths[1], device)
    held = wan_loader.load_file(paths[0], device, keep=True)
    assert wan_loader.keep(paths[2], device).dropped == (paths[1],)
    with pytest.raises(KeepError, match="allow more with --max-gpu"):
        wan_loader.keep(paths[1], device, limit=nbytes // 2)
    assert len(held) == 1


def test_a_failed_load_leaves_nothing(runtime, model, monkeypatch):
    from wan_loader.keeper import keeping

    n_fds = len(os.listdir("/proc/self/fd"))
    client.need_keeper().__exit__()
    monkeypatch.setattr(keeping, "checksum", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wan_loader.keep(model, "cpu")
    wait_until(lambda: client.status()["items"] == [])
    assert len(os.listdir("/proc/self/fd")) == n_fds


@pytest.mark.gpu
def test_what_is_written_to_is_told_or_refused(runtime, model):
    """In a process of its own: where the driver shields the memory, a write is the end of its context."""
    wan_loader.keep(model, "cuda", dtype="bf16")
    code = "import sys, wan_loader, torch; t = wan_loader.load_file(sys.argv[1], 'cuda', dtype='bf16', keep=True)\n"
    code += "t['large'].fill_(1); torch.cuda.synchronize()"
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, check=False)
    wrong = wan_loader.verify_kept(model, "cuda", dtype="bf16")
    assert wrong == ([] if done.returncode else ["large"])


def test_what_is_written_on_the_cpu_is_nobody_elses(runtime, model):
    wan_loader.keep(model, "cpu")
    mine, other = (wan_loader.load_file(model, keep=True) for _ in range(2))
    mine["large"].zero_()
    assert other["large"].any()
    assert wan_loader.verify_kept(model, "cpu") == []


def test_a_wrong_checksum_is_told(runtime, model, monkeypatch):
    from wan_loader.keeper import keeping

    monkeypatch.setattr(keeping, "checksum", lambda memory, start, nbytes: "none" if nbytes > 1 << 20 else "")
    wan_loader.keep(model, "cpu")
    assert set(wan_loader.verify_kept(model, "cpu")) == set(load_file(model))
    with pytest.raises(KeepError, match="it is kept as in the file"):
        wan_loader.verify_kept(model, "cpu", dtype="bf16")


@pytest.mark.parametrize("keep", [None, "yes", 1, 0])
def test_keep_is_a_flag_or_copy(model, keep):
    with pytest.raises(OptionError, match="keep is"):
        wan_loader.load_file(model, keep=keep)


def test_processes_that_load_together_keep_nothing():
    check_keep(False, is_shared=True)
    with pytest.raises(OptionError, match="several processes load together: leave out keep"):
        check_keep("copy", is_shared=True)


@pytest.mark.parametrize("limit", ["lots", 0, -1, 1.5])
def test_a_limit_that_makes_no_sense(runtime, model, limit):
    with pytest.raises(OptionError):
        wan_loader.keep(model, "cpu", limit=limit)
    assert client.status() is None


def test_the_cache_takes_over_where_nothing_is_kept(runtime, model, tmp_path):
    options = {"dtype": "bf16", "cache": True, "cache_dir": tmp_path / "cache"}
    found = wan_loader.load(model, keep=True, **options)
    assert found.build.wait(30)
    assert (found.kept.state, found.cache.state) == ("source", "building")
    found = wan_loader.load(model, keep=True, **options)
    assert (found.kept.reason, found.cache.state) == ("there is no keeper", "hit")
    wan_loader.keep(model, "cpu", dtype="bf16")
    found = wan_loader.load(model, keep=True, **options)
    assert (found.kept.state, found.cache) == ("attached", None)


# whom a client may meet


@pytest.fixture
def impostor(runtime):
    """A socket where the keeper's would be: `impostor(answer)` answers one message so."""
    listening, lock = place.listen(Path(own_directory()))
    threads = []

    def answer(act):
        def serve_one():
            link, _ = listening.accept()
            with link:
                message, fds = messages.receive(link)
                messages.close_all(fds)
                act(link, message)

        threads.append(threading.Thread(target=serve_one))
        threads[-1].start()

    yield answer
    for thread in threads:
        thread.join(10)
    listening.close()
    os.close(lock)
    os.unlink(Path(own_directory()) / "keeper.socket")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda link, message: None, "ended before it answered"),
        (lambda link, message: link.send(b'{"protocol": 99}'), "of another version: end it"),
        (lambda link, message: link.send(b"what?"), "no message of a keeper"),
        (lambda link, message: messages.send(link, {"sizes": [4096]}), "other descriptors"),
        (lambda link, message: messages.send(link, {"sizes": []}, (0,)), "damaged"),
    ],
    ids=["dies", "version", "garbage", "no descriptors", "no table"],
)
def test_a_keeper_that_is_none(impostor, model, act, reason):
    impostor(act)
    n_fds = len(os.listdir("/proc/self/fd"))
    found = wan_loader.load(model, keep=True)
    assert reason in found.kept.reason
    check_equal(found.tensors, load_file(model))
    assert len(os.listdir("/proc/self/fd")) <= n_fds + 1  # the impostor's


def test_a_keeper_that_is_stopped(runtime, model, monkeypatch):
    monkeypatch.setattr(client, "_TIMEOUT_S", 0.1)
    wan_loader.keep(model, "cpu")
    pid = client.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "does not answer" in wan_loader.load(model, keep=True).kept.reason
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wan_loader.load(model, keep=True).kept.state == "attached"


def test_a_directory_that_is_open_to_others(runtime, model):
    (runtime / "wan-loader").mkdir(mode=0o755)
    assert "open to others" in wan_loader.load(model, keep=True).kept.reason
    with pytest.raises(KeepError, match="open to others"):
        wan_loader.keep(model, "cpu")
    (runtime / "wan-loader").chmod(0o700)


def test_another_users_keeper(runtime, model, monkeypatch):
    wan_loader.keep(model, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(place, "is_own_peer", lambda link: False)
        assert "another user" in wan_loader.load(model, keep=True).kept.reason


def test_another_user_is_turned_away(runtime, monkeypatch):
    monkeypatch.setattr(serve, "is_own_peer", lambda link: False)
    listening, lock = place.listen(Path(own_directory()))
    keeper = serve.Keeper(listening, idle_s=0.2)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    with pytest.raises(KeepError, match="ended before"):
        client.status()
    thread.join(10)
    listening.close()
    os.close(lock)


def test_whoever_says_nothing_or_nonsense_is_in_nobodys_way(runtime, model):
    wan_loader.keep(model, "cpu")
    with place.opened(Path(own_directory())) as fd, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(place._address(fd))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bad:
            bad.connect(place._address(fd))
            bad.send(b"[]")
            assert bad.recv(100) == b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deep:
            deep.connect(place._address(fd))
            deep.send(b"[" * 50_000)
            assert deep.recv(100) == b""
        wrongs = ({"do": "dance"}, {"do": "attach"}, {"do": "put", "sizes": [1]}, {"do": 3}, {"do": [], "protocol": 0},
                  {"do": "put", "sizes": [float("inf")]})  # fmt: skip
        for wrong in wrongs:
            with client.find_keeper() as link:
                messages.send(link._link, wrong)
                assert "error" in messages.receive(link._link)[0]
        with client.find_keeper() as link:  # descriptors that nobody has asked for do not stay
            held = f"/proc/{link.ask('status')[0]['pid']}/fd"
            before = len(os.listdir(held))
            for do in ("status", "drop", "find"):
                link.ask(do, [fd], label="none", key="none", device="cpu", files=[])
            assert len(os.listdir(held)) == before
        assert wan_loader.load(model, keep=True).kept.state == "attached"


def test_many_start_it_at_once_and_there_is_one(runtime, model):
    threads = [threading.Thread(target=lambda: client.need_keeper().__exit__()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wan_loader.keep(model, "cpu").report is not None
    lock = os.open(runtime / "wan-loader/keeper.lock", os.O_RDONLY)
    os.close(lock)
    assert place.listen(Path(own_directory())) is None


def test_two_that_keep_the_same_at_once(runtime, model):
    from wan_loader.keeper.identity import identify
    from wan_loader.plan.dtype_policy import DtypePolicy

    identity = identify(wan_loader.open_checkpoint(model), DtypePolicy(), "cpu")
    with client.need_keeper() as other:
        other.ask("reserve", **identity._asdict(), nbytes=1, free=None)
        with pytest.raises(KeepError, match="another process loads"):
            wan_loader.keep(model, "cpu")
        assert wan_loader.load(model, keep=True).kept.reason == "it is being loaded to be kept"
    assert wan_loader.keep(model, "cpu").report is not None


def test_a_keeper_whom_nobody_can_reach_ends(runtime, monkeypatch):
    """As after a logout, which removes the directory: its memory would be lost for ever."""
    monkeypatch.setattr(serve, "_LOOK_S", 0.05)
    listening, lock = place.listen(Path(own_directory()))
    keeper = serve.Keeper(listening)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    with client.find_keeper() as link:
        link.ask("reserve", key="k", device="d", label="l", dtype="t", nbytes=1, free=None)
        link.ask("put", [os.memfd_create("table")], sizes=[], n_tensors=0, files=[])
    thread.join(0.3)
    assert thread.is_alive()
    os.unlink(Path(own_directory()) / "keeper.socket")
    thread.join(10)
    assert not thread.is_alive()
    listening.close()
    os.close(lock)


def test_a_keeper_with_nothing_ends(runtime):
    listening, lock = place.listen(Path(own_directory()))
    serve.Keeper(listening, idle_s=0.01).run()
    listening.close()
    os.close(lock)
