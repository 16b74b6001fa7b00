"""What is kept is found again, what is damaged or foreign is not, and a file does not depend on either."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import codeword
from codeword import KMeans, RateAware, cache, execute
from codeword.cache import Cache, CacheUnusable, Results, default_folder
from codeword.cli import app
from codeword.execute import run
from codeword.math.moments import Moments
from codeword.safetensors_file import write_safetensors
from codeword.sources import open_source

KEY = "ab" + 62 * "0"
OTHER = "cd" + 62 * "1"


def net(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.laplace(size=(32, 16, 3, 3)).astype(np.float32),
        "fc.weight": rng.laplace(size=(100, 64)).astype(np.float32),
        "fc.bias": rng.laplace(size=100).astype(np.float32),
    }


def saved(artifact, path):
    artifact.save(path)
    return path.read_bytes()


def entries(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


@pytest.fixture
def coded(monkeypatch):
    """Names of the tensors that were coded, not found."""
    names = []
    original = execute.compress_tensor

    def watch(source, info, *rest):
        names.append(info.name)
        return original(source, info, *rest)

    monkeypatch.setattr(execute, "compress_tensor", watch)
    return names


def test_a_round_trip_in_memory_and_on_disk(tmp_path):
    for folder in (None, tmp_path):
        first = Cache(folder)
        assert first.get(KEY) is None
        assert KEY not in first
        first.put(KEY, b"data")
        assert (first.get(KEY), first.get(OTHER)) == (b"data", None)
        assert KEY in first
    assert Cache(tmp_path).get(KEY) == b"data"
    assert KEY in Cache(tmp_path)
    assert Cache().get(KEY) is None


def test_what_does_not_last_stays_in_memory(tmp_path):
    first = Cache(tmp_path)
    first.put(KEY, b"data", lasting=False)
    assert first.get(KEY) == b"data"
    assert not entries(tmp_path)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(cache, "_IN_MEMORY", 10)
    held = Cache()
    held.put(KEY, b"1234")
    held.put(OTHER, b"123456")
    assert (held.get(KEY), held.get(OTHER)) == (b"1234", b"123456")
    held.put(KEY, b"12345")
    assert (held.get(KEY), held.get(OTHER)) == (b"12345", None)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "zeros", "text", "foreign"])
def test_a_damaged_entry_is_a_miss_and_is_replaced(damage, tmp_path):
    Cache(tmp_path).put(KEY, bytes(range(256)))
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    Cache(tmp_path).put(OTHER, b"other")
    foreign = next(other for other in entries(tmp_path) if other != path)
    flipped = bytearray(whole)
    flipped[-7] ^= 1
    wrong = {"flip": bytes(flipped), "cut": whole[:-1], "empty": b"", "zeros": bytes(len(whole)), "text": b"hello"}
    path.write_bytes(foreign.read_bytes() if damage == "foreign" else wrong[damage])
    again = Cache(tmp_path)
    assert again.get(KEY) is None
    again.put(KEY, bytes(range(256)))
    assert Cache(tmp_path).get(KEY) == bytes(range(256))


def test_an_entry_of_another_kind_is_a_miss():
    held = Cache()
    source = open_source(net())
    results = Results(held, source)
    info = source.infos[0]
    key = results.key("coded", info)
    results.put(key, ["no", "tensor"], info.size)
    assert results.get(key, execute.CodedTensor) is None
    held.put(key, b"\xc1 no msgpack")
    assert results.get(key, execute.CodedTensor) is None


def test_the_folder_is_bounded_and_the_oldest_go_first(tmp_path):
    held = Cache(tmp_path, limit=100_000)
    keys = [f"{i:02x}" + 62 * "0" for i in range(60)]
    for i, key in enumerate(keys):
        held.put(key, bytes(4000))
        path = tmp_path / key[:2] / key[2:]
        os.utime(path, (i, i))
        if i == 10:
            assert Cache(tmp_path).get(keys[0])  # used: now it is the youngest
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 100_000
    fresh = Cache(tmp_path)
    assert fresh.get(keys[-1])
    assert fresh.get(keys[0])
    assert fresh.get(keys[1]) is None


def test_what_is_larger_than_the_folder_is_not_kept(tmp_path):
    Cache(tmp_path, limit=1000).put(KEY, bytes(1000))
    assert not entries(tmp_path)


def test_other_files_in_the_folder_are_left_alone_and_leftovers_are_not(tmp_path):
    (tmp_path / "ab").mkdir()
    others = [tmp_path / "notes.txt", tmp_path / "ab" / "thesis.pdf"]
    for other in others:
        other.write_bytes(bytes(5000))
        os.utime(other, (1, 1))
    leftover = tmp_path / "ab" / f".{62 * '0'}.1234.tmp"
    leftover.write_bytes(b"half")
    os.utime(leftover, (time.time() - 7200,) * 2)
    held = Cache(tmp_path, limit=3000)
    held.put(KEY, bytes(1000))
    held.put(OTHER, bytes(1000))
    assert all(other.exists() for other in others)
    assert not leftover.exists()


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    held = Cache(tmp_path / "file" / "folder")
    with pytest.warns(CacheUnusable, match="name another folder in CODEWORD_CACHE"):
        held.put(KEY, b"data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        held.put(OTHER, b"more")
    assert (held.get(KEY), held.get(OTHER), held.lasts) == (b"data", b"more", False)
    with pytest.warns(CacheUnusable):
        codeword.compress(net(), "8x", cache=tmp_path / "file" / "folder")


def test_the_folder_is_that_of_the_platform_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEWORD_CACHE", "")
    assert default_folder() is None
    assert not Cache.of(True).lasts
    monkeypatch.setenv("CODEWORD_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    assert Cache.of(True).lasts
    assert not Cache.of(False).lasts
    monkeypatch.delenv("CODEWORD_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache" / "codeword"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "codeword"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder() == tmp_path / "Library" / "Caches" / "codeword"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder() == tmp_path / "local" / "codeword" / "cache"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("LOCALAPPDATA")
    assert default_folder() is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_is_the_same_with_a_cache_and_without(workers, tmp_path):
    without = saved(codeword.compress(net(), "12x"), tmp_path / "without.cw")
    folder = tmp_path / "cache"
    for name in ("empty", "full"):
        made = codeword.compress(net(), "12x", cache=folder, workers=workers)
        assert saved(made, tmp_path / f"{name}.cw") == without
        assert entries(folder)
    for entry in entries(folder):
        entry.write_bytes(entry.read_bytes()[:-3])
    made = codeword.compress(net(), "12x", cache=folder, workers=workers)
    assert saved(made, tmp_path / "damaged.cw") == without


def test_what_is_known_is_not_coded_again(coded, tmp_path):
    codeword.compress(net(), "12x", cache=tmp_path)
    assert "conv.weight" in coded
    coded.clear()
    codeword.compress(net(), "12x", cache=tmp_path)
    assert {name for name in coded if name != "fc.bias"} == set()
    codeword.compress(net(1), "12x", cache=tmp_path)
    assert "conv.weight" in coded


def test_another_target_meets_lambdas_that_are_known(coded):
    held = Cache()
    codeword.fit(net(), "12x", cache=held)
    first = coded.count("conv.weight")
    codeword.fit(net(), "12.5x", cache=held)
    assert coded.count("conv.weight") < 2 * first


@pytest.mark.parametrize("change", ["seed", "method", "weight", "importance", "moments", "dtype", "keep_nonfinite"])
def test_a_key_depends_on_all_that_a_result_does(change, coded):
    values = {"w": net()["fc.weight"]}
    held, method, seed, importance, keep_nonfinite = Cache(), RateAware(0.1), 0, None, False

    def compress():
        source = open_source(values)
        results = Results(held, source, importance)
        options = {"seed": seed, "importance": importance, "keep_nonfinite": keep_nonfinite, "results": results}
        return run(source, {"w": method}, **options)

    compress()
    compress()
    assert coded == ["w"]
    match change:
        case "seed":
            seed = 1
        case "method":
            method = RateAware(0.1000001)
        case "weight":
            values = {"w": np.nextafter(values["w"], 9)}
        case "importance":
            importance = {"w": np.ones((100, 64), np.float32)}
        case "moments":
            importance = {"w": Moments(np.eye(64, dtype=np.float32)[None])}
        case "dtype":
            values = {"w": values["w"].astype(np.float64)}
        case "keep_nonfinite":
            keep_nonfinite = True
    compress()
    assert coded == ["w", "w"]
    if importance is not None:
        other = importance["w"]
        importance = {"w": Moments(2 * other.second) if isinstance(other, Moments) else 2 * other}
        compress()
        assert coded == ["w", "w", "w"]


def test_a_method_of_ones_own_is_never_kept(coded):
    class Own:
        def compress(self, weight, importance, *, generator):
            return KMeans(4).compress(weight, importance, generator=generator)

    source = open_source(net())
    results = Results(Cache(), source)
    for _ in range(2):
        run(source, dict.fromkeys(net(), Own()), results=results)
    assert len(coded) == 6


def test_two_processes_share_a_folder(tmp_path):
    code = f"""
import numpy as np, codeword
rng = np.random.default_rng(0)
net = {{f"w{{i}}": rng.laplace(size=(80, 80)).astype(np.float32) for i in range(6)}}
print(codeword.compress(net, "10x", cache={str(tmp_path)!r}).nbytes)
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sizes = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sizes[0] == sizes[1]
    assert not [path for path in entries(tmp_path) if path.name.endswith(".tmp")]
    assert all(cache._unsealed(path.parent.name + path.name, path.read_bytes()) for path in entries(tmp_path))


def test_the_command_line_keeps_what_it_codes_unless_told_not_to(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "net.safetensors", [(n, "float32", w.shape) for n, w in net().items()], net().get)
    monkeypatch.setenv("CODEWORD_CACHE", str(tmp_path / "cache"))
    command = ["compress", str(tmp_path / "net.safetensors"), "--target", "12x", "-o"]
    sizes = []
    for name, *more in (("without.cw", "--no-cache"), ("first.cw",), ("second.cw",)):
        done = CliRunner().invoke(app, [*command, str(tmp_path / name), *more])
        assert (done.exit_code, done.stderr) == (0, "")
        sizes.append(len(entries(tmp_path / "cache")))
    assert sizes[0] == 0 < sizes[1] == sizes[2]
    files = [(tmp_path / f"{name}.cw").read_bytes() for name in ("without", "first", "second")]
    assert files[0] == files[1] == files[2]
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CODEWORD_CACHE", str(tmp_path / "file"))
    done = CliRunner().invoke(app, [*command, str(tmp_path / "third.cw")])
    assert done.exit_code == 0
    assert "warning: results are not kept for the next time" in done.stderr
    assert (tmp_path / "third.cw").read_bytes() == files[0]
