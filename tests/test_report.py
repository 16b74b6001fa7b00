"""The report's three forms: measured facts as JSON, a page of Markdown, one picture."""

import json
import struct
import sys
import tomllib

import numpy as np
import pytest

import codeword
from codeword import report, zoo
from codeword.artifact import Writer, code_tensor
from codeword.errors import MissingDependencyError, WriteError
from codeword.expr import Affine, Lookup, Raw, Reshape, Sum
from codeword.report.draw import codewords, draw
from codeword.report.measure import TensorReport
from codeword.report.words import by_reason, error_text, human_bytes, method_text, shape_text
from codeword.sources import open_source

LENET = zoo.lenet5_path()
ACCURACY = report.Accuracy("digits", 1000, 99.1, 98.9, 0.2, 100.0, 99.9, 0.1, 99.3)


def deep(layers):
    """A net with norms, tied and integer tensors: `layers` convolutions and their batch norms."""
    rng = np.random.default_rng(0)
    net = {}
    for i in range(layers):
        net[f"stage{i}.conv.weight"] = rng.standard_normal((8, 8, 3, 3)).astype(np.float32)
        net[f"stage{i}.bn.weight"] = rng.standard_normal(8).astype(np.float32)
        net[f"stage{i}.bn.num_batches_tracked"] = np.array(7)
    net["empty"] = np.zeros((0, 3), np.float32)
    return net


def write(folder, net, target="6x", **more):
    original = open_source(net)
    made = codeword.fit(original, target)
    path = folder / "model.cw"
    made.artifact.save(path)
    with codeword.load(path) as artifact:
        measured = codeword.inspect(artifact, original)
        options = {"original": original, "kept": made.kept, "plan": made.plan.to_dict()} | more
        files = report.write_report(folder / "report", measured, artifact, file=path.name, **options)
    return path, files, measured


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"), LENET, "30x", accuracy=ACCURACY)


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_json_holds_the_measured_facts(lenet):
    path, files, measured = lenet
    page = json.loads(files["json"].read_text())
    assert page["measured"]["nbytes"] == path.stat().st_size
    assert page["measured"]["ratio"] == pytest.approx(4 * 431_080 / path.stat().st_size)
    assert [tensor["name"] for tensor in page["measured"]["tensors"]] == [t.name for t in measured.tensors]
    assert page["accuracy"]["drop_top1"] == 0.2
    assert page["plan"]["target"] == "30x"


def test_markdown_numbers_are_those_of_the_file(lenet):
    path, files, _ = lenet
    text = files["md"].read_text()
    size = path.stat().st_size
    assert f"**{size:,} bytes** on disk instead of 1,724,320" in text
    assert f"**{1_724_320 / size:.2f}x smaller**" in text
    cells = [line.split("|") for line in text.splitlines() if line.startswith("| `") or line.startswith("| *header")]
    assert len(cells) == 9
    assert sum(int(row[6].replace(",", "")) for row in cells) == size
    assert "| top-1 (%) | 99.10 | 98.90 | +0.20 |" in text
    assert "1,000 examples of `digits`" in text
    assert "](report.png)" in text


def test_the_plan_on_the_page_makes_the_same_file(lenet, tmp_path):
    path, files, _ = lenet
    plan = files["md"].read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "plan.toml").write_text(plan)
    codeword.compress(LENET, plan=tmp_path / "plan.toml").save(tmp_path / "again.cw")
    assert (tmp_path / "again.cw").read_bytes() == path.read_bytes()
    assert tomllib.loads(plan) == json.loads(files["json"].read_text())["plan"]


def test_the_picture_is_a_png_of_sane_size(lenet, tmp_path):
    _, files, _ = lenet
    width, height = png_size(files["png"].read_bytes())
    assert 1000 <= width <= 2000
    assert 400 <= height <= 1200
    _, files, _ = write(tmp_path, deep(15))
    width, height = png_size(files["png"].read_bytes())
    assert 1000 <= width <= 2000
    assert height <= 1200


def test_methods_are_called_what_they_are():
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((8, 24)) < 0.5, 0, rng.normal(size=(8, 24))).astype(np.float32)
    net = {"a": weight, "b": weight[::-1].copy()}
    masked = codeword.ProductQuantization(4, 8, granularity="row", skip_zeros=True)
    book = Lookup(np.zeros((1, 8, 6), np.uint8), rng.normal(size=(1, 4, 4)).astype(np.float32))
    plan = codeword.Plan((codeword.Rule("a", masked), codeword.Rule("b", codeword.Keep())))
    assert codeword.inspect(codeword.compress(net, plan=plan)).tensors[0].method == (
        "pruned, shared vectors of 4, scaled rows"
    )
    writer = Writer()
    for name in ("first", "second"):
        book = Lookup(rng.integers(0, 4, (1, 8, 6)).astype(np.uint8), book.codebook)
        writer.add(code_tensor(name, "float32", (8, 24), Sum((Reshape(book, (8, 24)), Raw(weight)))))
    measured = codeword.inspect(writer.finish()).tensors
    assert measured[0].method == "shared vectors of 4 + raw"
    assert measured[1].method == "shared vectors of 4 + raw; codebook, values in first"
    assert measured[1].nbytes < measured[0].nbytes / 10


def test_the_same_file_gives_the_same_report(tmp_path):
    net = deep(2)
    _, files, _ = write(tmp_path, net)
    (tmp_path / "again").mkdir()
    _, again, _ = write(tmp_path / "again", net)
    for kind, path in files.items():
        assert again[kind].read_bytes() == path.read_bytes()


def test_drawing_leaves_matplotlib_as_it_was(lenet):
    import matplotlib

    path, _, measured = lenet
    names = ("font.family", "font.size", "text.color", "axes.edgecolor")  # all would have pyplot pick a backend
    before, had_pyplot = [matplotlib.rcParams[name] for name in names], "matplotlib.pyplot" in sys.modules
    with codeword.load(path) as artifact:
        png_size(draw(measured, artifact, None, title="without an original, $x$ and _ in the name"))
    assert [matplotlib.rcParams[name] for name in names] == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_nets_with_nothing_to_draw(tmp_path):
    for name, net in {"ints": {"a": np.arange(5)}, "scalar": {"a": np.array(3, np.float32)}}.items():
        (tmp_path / name).mkdir()
        _, files, _ = write(tmp_path / name, net, plan=None)
        png_size(files["png"].read_bytes())
        assert "never approximated" in files["md"].read_text() or name == "scalar"


def test_kept_tensors_and_why(tmp_path):
    _, files, _ = write(tmp_path, deep(2))
    text = files["md"].read_text()
    kept = text.split("## Kept losslessly")[1].split("## Plan")[0]
    assert "int64 values are never approximated: `stage0.bn.num_batches_tracked`, `stage1.bn" in kept
    assert "empty: `empty`" in kept


def test_without_a_picture(tmp_path, monkeypatch):
    _, files, _ = write(tmp_path, deep(1), picture=False)
    assert set(files) == {"json", "md"}
    assert "![" not in files["md"].read_text()
    monkeypatch.setattr("codeword.report.page.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "codeword\[plot\]"'):
        write(tmp_path, deep(1))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "report").touch()
    with pytest.raises(WriteError, match="cannot make folder"):
        write(tmp_path, deep(1))


def test_markdown_survives_names_that_mean_something_to_it(tmp_path):
    _, files, measured = write(tmp_path, {"a|b*[0]$^$": np.random.default_rng(0).standard_normal((64, 64))})
    assert len(measured.tensors) == 1
    assert json.loads(files["json"].read_text())["measured"]["tensors"][0]["name"] == "a|b*[0]$^$"
    row = next(line for line in files["md"].read_text().splitlines() if "64 x 64" in line)
    assert row.replace("\\|", "").count("|") == 9


def test_a_file_that_decodes_to_infinity_is_measured_all_the_same():
    """Errors beyond float64: no number of dB, and `verify` says what is wrong."""
    weight = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    broken = np.where(weight < 0, np.float32(-np.inf), weight)
    artifact = codeword.compress({"w": broken}, plan=codeword.Plan((codeword.Rule("*", codeword.Keep()),)))
    (tensor,) = codeword.inspect(artifact, {"w": weight}).tensors
    assert (tensor.sqnr_db, tensor.exact) == (None, False)
    assert [found.tensor for found in codeword.verify(artifact, {"w": weight})] == ["w"]


def test_codewords_by_hand():
    codes = np.array([[[0, 1, 1, 3]]], np.uint8)
    whole = np.array([-1, 0, 1, 2], np.int8).reshape(1, 4, 1)
    book = codewords(Reshape(Affine(Lookup(codes, whole), np.full((1, 1, 1), 0.5, np.float32)), (4,)))
    assert book is not None
    assert book.values.tolist() == [-0.5, 0, 0.5, 1]
    assert book.shares.tolist() == [0.25, 0.5, 0, 0.25]
    assert book.row_scale is None
    rows = codes.reshape(1, 2, 2)
    scaled = codewords(
        Affine(Lookup(rows, whole.astype(np.float32)), np.array([2.0, 4.0], np.float32).reshape(2, 1, 1))
    )
    assert scaled is not None
    assert scaled.row_scale is not None
    assert scaled.row_scale.tolist() == [2, 4]
    lookup = Lookup(codes, whole.astype(np.float32))
    for other in (Raw(np.ones(3)), Sum((lookup, lookup))):
        assert codewords(other) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 KB"),
        (9_994, "9.99 KB"),
        (9_996, "10.0 KB"),
        (57_195, "57.2 KB"),
        (999_499, "999 KB"),
        (999_500, "1.00 MB"),
        (1_724_320, "1.72 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_words():
    assert shape_text((50, 20)) == "50 x 20"
    assert shape_text(()) == "scalar"
    assert by_reason({"a": "x", "b": "y", "c": "x"}) == {"x": ["a", "c"], "y": ["b"]}
    tensor = TensorReport("a", (4,), "float32", "raw", None, 0.0, 9, 18.0, 31.44, False)
    assert (method_text(tensor), error_text(tensor)) == ("raw, rounded", "31.4")
