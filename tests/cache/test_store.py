"""The directory of entries: who may use it, who builds, what goes when there is no room, what killed processes left."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from entries import flip

from wan_loader.cache.checksums import check_entry
from wan_loader.cache.manifest import MANIFEST_NAME, parse_manifest
from wan_loader.cache.store import Store, default_directory
from wan_loader.errors import CacheError

A, B, C = "a" * 32, "b" * 32, "c" * 32


def names(store, room):
    return sorted(p.name for p in (store.root / room).iterdir())


def states(store):
    return {x.key[0]: x.state for x in store.listed()}


# the directory


def test_made_for_its_owner_alone(tmp_path):
    old = os.umask(0)
    try:
        store = Store(tmp_path / "not" / "there" / "yet")
    finally:
        os.umask(old)
    for path in (store.root, *(store.root / room for room in ("entries", "building", "damaged", "trash"))):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (store.root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_where_it_is_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "wan-loader" / "converted"


def test_looking_at_it_does_not_make_it(tmp_path):
    with pytest.raises(CacheError) as error:
        Store(tmp_path / "none", create=False)
    assert error.value.path == str(tmp_path / "none")
    assert "No such file" in error.value.reason
    (tmp_path / "empty").mkdir(mode=0o700)
    assert Store(tmp_path / "empty", create=False).listed() == []
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_directories_that_others_may_write(tmp_path, mode, create):
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(mode)
    with pytest.raises(CacheError, match="can be written by others"):
        Store(tmp_path / "c", create=create)
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("room", ["entries", "building", "damaged", "trash"])
def test_rooms_that_are_not_ours(store, room, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "elsewhere" / "precious").touch()
    (store.root / room).rmdir()
    (store.root / room).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="is a link"):
        Store(store.root)
    (store.root / room).unlink()
    (store.root / room).mkdir()
    (store.root / room).chmod(0o777)
    with pytest.raises(CacheError, match="can be written by others"):
        Store(store.root)
    assert (tmp_path / "elsewhere" / "precious").exists()


@pytest.mark.parametrize("tag", [None, b"Signature: 8a477f597d28d172789f06886806bc55", b"\xff" * 9999])
@pytest.mark.parametrize("create", [True, False])
def test_directories_of_other_things_are_not_touched(tmp_path, create, tag):
    for name in ("building/app", "trash/photos", "entries/x"):
        (tmp_path / "work" / name).mkdir(parents=True)
    if tag is not None:  # another program's cache
        (tmp_path / "work" / "CACHEDIR.TAG").write_bytes(tag)
    (tmp_path / "work").chmod(0o700)
    with pytest.raises(CacheError) as error:
        Store(tmp_path / "work", create=create)
    assert error.value.path == str(tmp_path / "work")
    assert "holds other things" in error.value.reason
    assert "--cache-dir" in error.value.remedy
    assert sorted(str(p.relative_to(tmp_path / "work")) for p in (tmp_path / "work").rglob("*/*")) == [
        "building/app",
        "entries/x",
        "trash/photos",
    ]


def test_a_half_made_directory_is_completed(tmp_path):
    (tmp_path / "c").mkdir(mode=0o700)
    (tmp_path / "c" / "CACHEDIR.TAG").touch(mode=0o600)
    (tmp_path / "c" / "entries").mkdir(mode=0o700)
    Store(tmp_path / "c")
    assert (tmp_path / "c" / "trash").is_dir()


# entries


def test_an_entry_is_there_once_it_is_complete(store, fill):
    building = store.begin(A, 1000)
    manifest = fill(building, 1000)
    assert store.find(A) is None
    assert states(store) == {"a": "building"}
    path = building.publish(manifest)
    assert path == store.root / "entries" / A
    with store.find(A) as entry:
        assert entry.manifest == replace(manifest, files=entry.manifest.files)
        for file, written in zip(entry.manifest.files, manifest.files, strict=True):
            st = entry.file(file.path).stat()
            assert file == replace(written, mtime_ns=st.st_mtime_ns, ctime_ns=st.st_ctime_ns)
        assert entry.file("model.bin").stat().st_mode & 0o777 == 0o400
        assert check_entry(entry.path, manifest) == []
    assert names(store, "building") == []


def flip_and_put_the_times_back(file):
    st = file.stat()
    flip(file)
    file.chmod(st.st_mode)
    os.utime(file, ns=(st.st_atime_ns, st.st_mtime_ns))


def copy_over(file):
    beside = file.with_name("beside")
    shutil.copy2(file, beside)
    beside.replace(file)


@pytest.mark.parametrize("name", ["model.bin", "text/config.json"])
@pytest.mark.parametrize("touch", [flip, os.utime])
def test_an_entry_that_was_touched_is_not_served(store, put, touch, name):
    path = put(store, A)
    store.find(A).close()
    touch(path / name)
    with pytest.raises(CacheError) as error:
        store.find(A)
    assert error.value.path == str(path / name)
    assert "was touched after it was written" in error.value.reason


@pytest.mark.parametrize("touch", [flip_and_put_the_times_back, copy_over, lambda file: file.chmod(0o444)])
def test_an_entry_whose_times_were_put_back_is_told_from_others(store, put, touch):
    path = put(store, A)
    with store.find(A) as entry:
        assert entry.check_files()
        touch(path / "model.bin")
        assert not entry.check_files()
        assert bool(check_entry(path, entry.manifest)) == (touch is flip_and_put_the_times_back)


def test_an_entry_that_does_not_say_its_times(store, put):
    """As older versions wrote them: what was written to since its manifest was is not served."""
    path = put(store, A)
    place = path / MANIFEST_NAME
    manifest = parse_manifest(place.read_bytes(), "m")
    old = replace(manifest, files=tuple(replace(f, mtime_ns=None, ctime_ns=None) for f in manifest.files))
    place.chmod(0o600)
    place.write_bytes(old.to_bytes())
    assert b"mtime_ns" not in place.read_bytes()
    store.find(A).close()
    os.utime(path / "model.bin", (time.time() + 5,) * 2)
    with pytest.raises(CacheError) as error:
        store.find(A)
    assert error.value.path == str(path / "model.bin")
    assert "was touched" in error.value.reason


def test_one_builds(store, put):
    building = store.begin(A, 10)
    assert store.begin(A, 10) is None
    assert Store(store.root).begin(A, 10) is None
    other = store.begin(B, 10)
    assert other is not None
    building.abandon()
    other.abandon()
    put(store, A)
    assert store.begin(A, 10) is None, "it exists"
    assert names(store, "building") == []


def test_many_threads_one_builder(store, fill):
    """Each has a store of its own, which sweeps; locks are between descriptors, so threads compete like processes."""
    built, start = [], threading.Barrier(8)

    def work():
        start.wait()
        building = Store(store.root).begin(A, 1000)
        if building is not None:
            time.sleep(0.02)
            built.append(building.publish(fill(building, 1000)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [store.root / "entries" / A]
    assert names(store, "building") == names(store, "trash") == []


def test_abandoned(store, fill):
    building = store.begin(A, 1000)
    fill(building, 1000)
    building.abandon()
    assert names(store, "building") == []
    assert store.find(A) is None


def test_what_a_killed_builder_left_is_swept_away(store, fill):
    building = store.begin(A, 1000)
    fill(building, 1000)
    building.close()  # as the kernel does for a dead process
    (store.root / "trash" / "x").mkdir()
    (store.root / "trash" / "x" / "y").touch()
    (store.root / "trash" / "link").symlink_to(store.root / "CACHEDIR.TAG")
    (store.root / "building" / B).touch()
    (store.root / "building" / C).symlink_to(store.root)
    Store(store.root)
    assert names(store, "building") == names(store, "trash") == []
    assert (store.root / "CACHEDIR.TAG").exists()


def test_what_is_being_built_is_not_swept_away(store, fill):
    building = store.begin(A, 1000)
    fill(building, 1000)
    Store(store.root)
    assert names(store, "building") == [A]
    building.abandon()


def test_finding_counts_as_use(store, put):
    path = put(store, A, age_s=1000)
    with store.find(A, use=False):
        assert time.time() - (path / MANIFEST_NAME).stat().st_mtime > 900
    with store.find(A):
        assert time.time() - (path / MANIFEST_NAME).stat().st_mtime < 100


def test_a_manifest_of_another_entry(store, put):
    put(store, A).rename(store.root / "entries" / B)
    with pytest.raises(CacheError) as error:
        store.find(B)
    assert error.value.path == str(store.root / "entries" / B)
    assert "another entry" in error.value.reason


def test_links_are_never_followed(store, put, tmp_path):
    path = put(store, A)
    path.rename(tmp_path / "away")
    for target in (tmp_path / "away", tmp_path / "nowhere"):
        path.symlink_to(target)
        with pytest.raises(CacheError, match="is a link"):
            store.find(A)
        assert states(store)["a"].startswith("unreadable")
        assert store.set_aside(A) is not None
        path.symlink_to(target)
        assert [x.state[:10] for x in store.prune()] == ["unreadable"] * 2
    assert len(list((tmp_path / "away").rglob("*"))) == 4
    assert put(store, A)


def test_a_directory_in_an_entry_that_is_a_link(store, put, tmp_path):
    path = put(store, A)
    path.chmod(0o700)
    (path / "text").rename(tmp_path / "text")
    (path / "text").symlink_to(tmp_path / "text")
    with pytest.raises(CacheError, match="is a link"):
        store.find(A)


def test_set_aside(store, put):
    for _ in range(2):
        put(store, A)
        assert store.set_aside(A) == store.root / "damaged" / A
        assert store.find(A) is None
    assert states(store) == {"a": "damaged"}
    assert store.set_aside(A) is None
    put(store, A)
    assert sorted(x.state for x in store.listed()) == ["complete", "damaged"]
    assert [x.state for x in store.prune()] == ["damaged"]
    assert states(store) == {"a": "complete"}


# locks


def test_a_forked_child_does_not_keep_a_lock(store, fill):
    """It has copies of the descriptors, as the workers of a data loader do."""
    building = store.begin(A, 1000)
    code = "import sys; sys.stdin.read()"
    os.set_inheritable(building.fd, True)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, close_fds=False)
    try:
        building.publish(fill(building, 1000))
        entry = store.find(A)
        assert entry is not None
        entry.close()
        assert len(store.prune(max_size=1)) == 1
    finally:
        child.communicate()


@pytest.mark.parametrize("again", [False, True])
def test_an_entry_removed_between_opening_and_locking(store, put, monkeypatch, again):
    put(store, A)
    flock = fcntl.flock

    def remove_first(fd, operation):
        monkeypatch.undo()
        store.prune(max_size=1)
        if again:
            put(store, A)
        return flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    assert store.find(A) is None


def test_a_building_swept_between_making_and_locking(store, monkeypatch):
    """`begin` makes it again, and what it returns is what others see."""
    flock = fcntl.flock

    def sweep_first(fd, operation):
        monkeypatch.undo()
        Store(store.root)
        return flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    building = store.begin(A, 10)
    assert names(store, "building") == [A]
    assert os.fstat(building.fd).st_ino == building.path.stat().st_ino
    building.abandon()


def test_no_descriptor_is_left_open(store, put, open_files):
    put(store, A)
    before = open_files(store.root)
    for _ in range(3):
        store.find(A).close()
        assert store.find(B) is None
        assert store.begin(A, 10) is None
        store.begin(B, 10).abandon()
        store.listed()
        store.prune(max_age_s=1000)
        with pytest.raises(CacheError):
            store.begin(B, 10**18)
    store.set_aside(A)
    store.prune()
    Store(store.root)
    assert open_files(store.root) == before


# room


def test_least_recently_used_goes_first(store, put):
    for age, key in ((30, A), (10, B), (20, C)):
        put(store, key, age_s=age)
    size = max(x.nbytes for x in store.listed())
    with store.find(A):  # uses it
        pass
    removed = store.prune(max_size=2 * size)
    assert [x.key for x in removed] == [C]
    assert [x.key for x in store.listed()] == [A, B]
    assert names(store, "trash") == []


def test_age(store, put):
    for age, key in ((3000, A), (10, B)):
        put(store, key, age_s=age)
    assert store.prune(max_age_s=4000) == []
    assert [x.key for x in store.prune(max_age_s=2000)] == [A]


def test_what_is_being_read_stays(store, put):
    put(store, A, age_s=1000)
    put(store, B)
    with store.find(A, use=False) as entry:
        assert states(store)["a"] == "in use"
        assert [x.key for x in store.prune(max_size=1, max_age_s=1)] == [B]
        assert check_entry(entry.path, entry.manifest) == []
        (listed,) = store.listed()
        assert not store.remove(listed)
    assert [x.key for x in store.prune(max_size=1)] == [A]


def test_what_is_being_built_stays(store, fill):
    building = store.begin(A, 1000)
    manifest = fill(building, 1000)
    assert store.prune(max_size=1, max_age_s=1e-9) == []
    (listed,) = store.listed()
    assert not store.remove(listed)
    assert building.publish(manifest) is not None


def test_a_new_entry_makes_room(store, put):
    for age, key in ((30, A), (10, B)):
        put(store, key, nbytes=1_000_000, age_s=age)
    put(store, C, nbytes=1_000_000, max_size=2_200_000)
    assert set(states(store)) == {"b", "c"}


def test_an_entry_larger_than_the_budget_removes_nothing(store, put):
    put(store, A)
    with pytest.raises(CacheError) as error:
        store.begin(B, 1001, max_size=1000)
    assert error.value.path == str(store.root)
    assert "--max-size" in error.value.remedy
    assert states(store) == {"a": "complete"}
    with pytest.raises(CacheError, match="may take"):
        store.begin(B, 10**15)
    assert names(store, "building") == []


def test_entries_in_use_count_against_the_budget(store, put):
    put(store, A, nbytes=1_000_000)
    with store.find(A), pytest.raises(CacheError, match="in use"):
        store.begin(B, 1_000_000, max_size=1_500_000)
    assert names(store, "building") == []
    put(store, B, nbytes=1_000_000, max_size=1_500_000)
    assert set(states(store)) == {"b"}


def test_what_cannot_fit_beside_entries_in_use_removes_nothing(store, put):
    put(store, A, nbytes=1_000_000, age_s=10)
    put(store, B, nbytes=1_000_000)
    with store.find(B), pytest.raises(CacheError, match="in use"):
        store.begin(C, 2_000_000, max_size=2_500_000)
    assert set(states(store)) == {"a", "b"}


def test_the_disk_s_free_space_counts(store, put, monkeypatch):
    put(store, A, nbytes=1_000_000)
    full = shutil.disk_usage(store.root)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(CacheError, match="may take"):  # half of 1.5 MB
        store.begin(B, 900_000)
    assert set(states(store)) == {"a"}
    with store.find(A), pytest.raises(CacheError, match="does not fit"):
        store.begin(B, 600_000, max_size=10**9)
    store.begin(B, 700_000).abandon()
    assert states(store) == {}, "it made room"


def test_what_is_being_built_counts_with_what_it_will_have(store, put, fill):
    put(store, C, nbytes=400_000)
    building = store.begin(A, 1_000_000, max_size=1_500_000)
    with pytest.raises(CacheError, match="1 MB of that are in use, being written"):
        Store(store.root).begin(B, 1_000_000, max_size=1_500_000)
    assert states(store) == {"a": "building", "c": "complete"}, "nothing was removed in vain"
    store.begin(B, 400_000, max_size=1_500_000).abandon()
    assert states(store) == {"a": "building"}, "it made room beside the other"
    path = building.publish(fill(building, 1_000_000))
    with store.find(A) as entry:
        assert check_entry(path, entry.manifest) == []
    put(store, B, max_size=1_500_000)


def test_pruning_counts_what_is_being_built(store, put):
    for age, key in ((30, A), (10, B)):
        put(store, key, nbytes=1_000_000, age_s=age)
    building = store.begin(C, 1_000_000)
    assert [x.key for x in store.prune(max_size=2_200_000)] == [A]
    building.abandon()


def test_free_space_is_promised_once(store, monkeypatch):
    left = shutil.disk_usage(store.root)._replace(free=1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: left)
    building = store.begin(A, 1_000_000, max_size=10**9)
    with pytest.raises(CacheError, match=r"has 50\d kB free"):
        store.begin(B, 1_000_000, max_size=10**9)
    building.abandon()
    store.begin(B, 1_000_000, max_size=10**9).abandon()


def test_two_begun_at_the_same_moment_never_exceed_the_budget(store):
    begun = []

    def begin(key):
        together.wait()
        with contextlib.suppress(CacheError):
            begun.append(Store(store.root).begin(key, 1_000_000, max_size=1_500_000))

    for _ in range(20):
        together = threading.Barrier(2)
        threads = [threading.Thread(target=begin, args=(key,)) for key in (A, B)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(begun) <= 1
        while begun:
            begun.pop().abandon()
    assert names(store, "building") == []


def test_a_plan_that_cannot_be_read_counts_what_is_written(store, fill):
    building = store.begin(A, 10**6)
    fill(building, 100_000)
    for text in (b"", b"9" * 40, b"-5", b"\xff"):
        (building.path / "planned").write_bytes(text)
        (listed,) = store.listed()
        assert listed.planned_nbytes in (0, 10**20 - 1)
        assert listed.nbytes >= 100_000
    building.abandon()


def newer(path):
    """Make an entry one of the next format."""
    manifest = path / MANIFEST_NAME
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))


def test_a_newer_format_is_left_alone(store, put):
    newer(put(store, A, nbytes=1_000_000, age_s=1000))
    put(store, B, age_s=2000)
    assert states(store) == {"a": "newer format", "b": "complete"}
    assert [x.key for x in store.prune(max_size=1, max_age_s=1)] == [B]
    with pytest.raises(CacheError, match="newer format"):
        store.begin(B, 1_000_000, max_size=1_500_000)
    (listed,) = store.listed()
    assert store.remove(listed)
    assert states(store) == {}


def test_an_older_format_is_of_no_use(store, put):
    manifest = put(store, A) / MANIFEST_NAME
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 0'))
    assert [x.key for x in store.prune()] == [A]


def test_what_was_set_aside_stays_as_long_as_there_is_room(store, put):
    put(store, A)
    store.set_aside(A)
    put(store, A)
    assert sorted(x.state for x in store.listed()) == ["complete", "damaged"]


def test_a_file_system_without_locks_is_named(store, monkeypatch):
    def refuse(fd, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CacheError) as error:
        store.begin(A, 10)
    assert "cannot be locked" in error.value.reason
    assert error.value.remedy == "name another file system"
