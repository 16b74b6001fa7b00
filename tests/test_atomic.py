"""A file is written whole or not at all, whatever goes wrong and wherever."""

import errno
import os
import stat
from pathlib import Path

import pytest

from codeword.atomic import replacing
from codeword.errors import SourceError, WriteError

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "net.cw"
    path.write_bytes(b"old")
    return path


def test_new_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "net.cw"
    with replacing(path) as file:
        file.write(b"new")
        assert not path.exists()
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.startswith(".net.cw.")
        assert temporary.name.endswith(".tmp")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["net.cw"]


def test_the_file_can_be_read_and_rewritten_within_the_block(target):
    with replacing(str(target)) as file:
        file.write(b"header....")
        file.seek(0)
        assert file.read(6) == b"header"
        file.seek(0)
        file.write(b"HEADER")
    assert target.read_bytes() == b"HEADER...."


@pytest.mark.parametrize(("mask", "bits"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_file_has_the_bits_that_open_would_give(tmp_path, mask, bits):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == bits


def test_replaced_file_keeps_its_bits(target):
    target.chmod(0o640)
    with replacing(target) as file:
        file.write(b"new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_symbolic_link_stays_and_its_file_is_replaced(target):
    link = target.with_name("link")
    link.symlink_to(target.name)
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), SourceError("y"), OSError(errno.EIO, "input")])
def test_an_error_in_the_block_passes_unchanged_and_leaves_the_old_file(target, error):
    with pytest.raises(type(error)) as raised, replacing(target) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert raised.value is error
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["net.cw"]


@needs_full
@pytest.mark.parametrize("amount", [10, 10_000_000])  # the small one fails when it is flushed, after the block
def test_a_full_disk_is_a_write_error_and_leaves_the_old_file(target, amount):
    full = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(WriteError, match=r"net\.cw: No space left.*; free some space"), replacing(target) as f:  # noqa: PT012
        os.dup2(full, f.fileno())
        f.write(b"x" * amount)
    os.close(full)
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["net.cw"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_of_the_last_steps_leaves_the_old_file(target, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(WriteError, match="quota exceeded; free some of your quota"), replacing(target) as file:  # noqa: PT012
        file.write(b"new")
        monkeypatch.setattr(os, step, fail)
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["net.cw"]


def test_a_folder_that_cannot_be_synced_does_not_undo_a_whole_file(target, monkeypatch):
    sync, calls = os.fsync, []

    def fail_on_folders(descriptor):
        calls.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if calls[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    with replacing(target) as file:
        file.write(b"new")
    assert calls == [False, True]
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing/net.cw", "No such file or directory; create its folder first"),
        ("file/net.cw", "a part of its path is a file"),
        ("folder", "it is a folder; name a file inside"),
        ("n" * 300, "choose a shorter name"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_block_runs(tmp_path, place, message):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    with pytest.raises(WriteError, match=message) as raised, replacing(tmp_path / place):
        pytest.fail("the block must not run")
    assert place in str(raised.value)
    assert names(tmp_path) == before


def test_a_device_is_never_replaced():
    with pytest.raises(WriteError, match="device or pipe"), replacing(os.devnull):
        pytest.fail("the block must not run")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_a_read_only_file_is_refused_as_open_would(target, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permission bits do not bind root
    with pytest.raises(WriteError, match="read-only"), replacing(target):
        pytest.fail("the block must not run")
    assert target.read_bytes() == b"old"
