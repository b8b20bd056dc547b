"""Where sockets of one user's processes are."""

import os

import pytest

from wan_loader.system import peers


def test_where_sockets_are(monkeypatch, tmp_path):
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert peers.own_directory() == str(tmp_path / "wan-loader")


@pytest.mark.parametrize(("mode", "value"), [(0o755, "{}"), (0o700, "."), (0o700, "{}/none"), (0o700, None)])
def test_without_a_directory_of_the_sessions_own(monkeypatch, tmp_path, mode, value):
    tmp_path.chmod(mode)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if value:
        monkeypatch.setenv("XDG_RUNTIME_DIR", value.format(tmp_path))
    assert peers.own_directory() in (f"/run/user/{os.geteuid()}/wan-loader", f"/tmp/wan-loader-{os.geteuid()}")


def test_what_is_not_this_users_alone(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o710)
    assert peers.not_private(str(tmp_path)) == ""
    assert peers.not_private(str(tmp_path / "link")) == "is no directory"
    assert peers.not_private(str(tmp_path / "open")) == "others may enter it"
    assert peers.not_private(str(tmp_path / "none")) == "No such file or directory"
