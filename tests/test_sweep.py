"""The front: files of ours that are really there, peers beside them, a record that goes on where it stopped."""

import json

import numpy as np
import pytest
import torch

import codeword
import codeword.cli
from codeword import peers, zoo
from codeword import report as reports
from codeword.data import load_data
from codeword.errors import MissingDependencyError, PlanError, TargetError
from codeword.evaluate import classes
from codeword.front import Beside, Front, Row, bytes_for, margins, unbeaten
from codeword.nets import load_net
from codeword.peers import Packed, Peer, Subject, by_rows, nf4, sizes, uniform
from codeword.report.front import front_markdown, larger_table, ours_table, write_front
from test_cli import invoke, invoke_json, runner


def row(method, nbytes, top1, settings="s", packing="xz", agreement=None):
    return Row(method, settings, packing, nbytes, top1, top1 if agreement is None else agreement, 0.1)


def front(*rows, dense=99.0):
    return Front("net", "0", "digits", 100, None, 4000, dense, list(rows))


def digits(n=100):
    return load_data("digits", limit=n)


def half_of_all(subject):
    """A peer of two settings, of which one fails."""

    def broken():
        raise RuntimeError("no such luck")

    yield "good", lambda: by_rows(subject.weights, 1 << 62, nf4)
    yield "bad", broken


@pytest.fixture
def only():
    """Sets which peers there are, in this order."""
    before = dict(peers.PEERS)

    def only(**there):
        peers.PEERS.clear()
        peers.PEERS.update(there)

    yield only
    only(**before)


@pytest.fixture
def fake(only):
    """Peers: one that is here, one that is not installed, one that needs data."""
    made = []

    def counted(subject):
        for name, make in half_of_all(subject):
            made.append(name)
            yield name, make

    only(
        fake=Peer("Fake", counted),
        absent=Peer("Absent", counted, "no_such_package"),
        learned=Peer("Learned", counted, needs_data=True),
    )
    return made


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """LeNet-5 at two targets beside two peers that need nothing, and the folder of it."""
    folder = tmp_path_factory.mktemp("sweep")
    net = zoo.lenet5_trained()
    return codeword.sweep(net, ("10x", "30x"), data=digits(), peers=("float16", "nf4"), folder=folder), folder


def test_points_are_files_on_the_disk_scored_as_they_are(swept):
    found, folder = swept
    assert [row.file for row in found.ours] == ["30x.cw", "10x.cw"]
    for row in found.ours:
        path = folder / row.file
        assert row.nbytes == path.stat().st_size <= found.dense_nbytes / float(row.settings[:-1])
        assert row.top1 == codeword.evaluate(path, digits(), model=zoo.lenet5()).top1
        assert codeword.verify(path, zoo.lenet5_trained()) == []
        said = [classes(net, digits()) for net in (zoo.lenet5_trained(), load_net("codeword.zoo:lenet5", path))]
        assert row.agreement == 100 * float((said[0] == said[1]).mean())
    assert (found.dense_nbytes, found.n, found.data) == (4 * 431_080, 100, "digits")
    assert found.dense_top1 == codeword.evaluate(zoo.lenet5_trained(), digits()).top1
    assert found.missing == {}


def test_a_sweep_makes_the_bytes_that_compress_makes(swept):
    _, folder = swept
    for target in ("10x", "30x"):
        codeword.compress(zoo.lenet5_trained(), target).save(folder / "again.cw")
        assert (folder / "again.cw").read_bytes() == (folder / f"{target}.cw").read_bytes()


def test_the_record_reads_back_as_the_front(swept):
    found, folder = swept
    facts = json.loads((folder / "front.json").read_bytes())
    assert [len(facts.pop(f"margins_by_{by}")) for by in ("top1", "agreement")] == [2, 2]
    assert codeword.Front(**{**facts, "rows": [Row(**row) for row in facts["rows"]]}) == found


def test_a_record_goes_on_and_what_it_has_is_not_made_again(swept, tmp_path):
    found, folder = swept
    (tmp_path / "front.json").write_bytes((folder / "front.json").read_bytes())
    told = []
    again = codeword.sweep(
        zoo.lenet5_trained(),
        ("10x", "20x", "30x"),
        data=digits(),
        peers=("float16",),
        folder=tmp_path,
        on_row=lambda front, row: told.append((row.settings, len(front.rows))),
    )
    assert told == [("20x", len(found.rows) + 1)]
    assert again.rows[:-1] == found.rows
    assert [path.name for path in tmp_path.glob("*.cw")] == ["20x.cw"]


def test_points_can_be_made_again_by_name(swept, tmp_path):
    found, folder = swept
    (tmp_path / "front.json").write_bytes((folder / "front.json").read_bytes())
    told = []
    again = codeword.sweep(
        zoo.lenet5_trained(), ("10x", "30x"), data=digits(), peers=(), folder=tmp_path, again=["codeword"],
        on_row=lambda _, row: told.append(row.method),
    )  # fmt: skip
    assert told == ["codeword", "codeword"]
    assert [(r.method, r.nbytes, r.top1) for r in again.ours] == [(r.method, r.nbytes, r.top1) for r in found.ours]


def test_a_record_of_something_else_is_not_gone_on_with(swept, tmp_path):
    _, folder = swept
    before = (folder / "front.json").read_bytes()
    with pytest.raises(PlanError, match=r"front.json is a sweep with n 100, this one has 50: name another folder"):
        codeword.sweep(zoo.lenet5_trained(), ("10x",), data=digits(50), peers=(), folder=folder)
    other = zoo.lenet5()
    with pytest.raises(PlanError, match="is a sweep with digest"):
        codeword.sweep(other, ("10x",), data=digits(), peers=(), folder=folder)
    with pytest.raises(PlanError, match=r"with calibration None, this one has 'digits, 100 examples'"):
        codeword.sweep(zoo.lenet5_trained(), ("10x",), data=digits(), calibrate=digits(), peers=(), folder=folder)
    assert (folder / "front.json").read_bytes() == before
    (tmp_path / "front.json").write_text("{}")
    with pytest.raises(PlanError, match="is no record of a sweep"):
        codeword.sweep(zoo.lenet5_trained(), ("10x",), data=digits(), peers=(), folder=tmp_path)


def test_peers_that_are_missing_or_fail_are_told_and_the_others_run(fake):
    found = codeword.sweep(zoo.lenet5_trained(), (), data=digits(), peers=("fake", "absent", "learned"))
    assert fake == ["good", "bad"]
    assert [(row.method, row.settings, row.packing) for row in found.rows] == [
        ("fake", "good", "packed"),
        ("fake", "good", "xz"),
    ]
    assert found.missing == {
        "fake, bad": "RuntimeError: no such luck",
        "absent": "not installed (pip install no_such_package)",
        "learned": "needs calibration data",
    }


def test_wrong_names_and_targets_are_told_before_any_work(fake):
    with pytest.raises(PlanError, match="'best' is no peer; there are fake, absent, learned"):
        codeword.sweep(zoo.lenet5_trained(), ("10x",), data=digits(), peers=("best",))
    with pytest.raises(TargetError, match="target 'small'"):
        codeword.sweep(zoo.lenet5_trained(), ("10x", "small"), data=digits(), peers=("fake",))
    with pytest.raises(PlanError, match="is only weights: pass the torch module as net"):
        codeword.sweep(zoo.lenet5_path(), ("10x",), data=digits(), peers=())
    assert fake == []


def test_calibration_makes_other_files_and_is_told():
    plain, found = (
        codeword.sweep(zoo.lenet5_path(), ("40x",), data=digits(), net=zoo.lenet5_trained(), peers=(), calibrate=seen)
        for seen in (None, digits(20))
    )
    assert (plain.calibration, found.calibration) == (None, "digits, 20 examples")
    assert "digits, 20 examples without their labels" in front_markdown(found)
    assert plain.ours[0].nbytes != found.ours[0].nbytes


def test_whoever_scores_no_number_scores_nothing(only):
    def nothing(subject):
        yield "nan", lambda: Packed({name: np.full_like(w, np.nan) for name, w in subject.weights.items()}, [], [])

    only(nan=Peer("NaN", nothing))
    found = codeword.sweep(zoo.lenet5_trained(), (), data=digits(), peers=("nan",))
    assert {row.top1 for row in found.rows} == {0.0}


# Who is ahead


def test_unbeaten_rows_are_each_better_than_all_that_are_no_larger():
    a, b, c, d = row("p", 10, 50), row("p", 20, 49), row("p", 30, 60), row("p", 30, 61)
    assert unbeaten([d, c, b, a]) == [a, d]


def test_bytes_between_two_settings_lie_on_a_line_over_their_logarithm():
    rows = [row("p", 100, 50), row("p", 400, 60)]
    assert bytes_for(rows, 55) == pytest.approx(200)
    assert (bytes_for(rows, 40), bytes_for(rows, 60), bytes_for(rows, 61)) == (100, pytest.approx(400), None)
    assert bytes_for([], 50) is None


def test_margins_by_hand():
    small, large = row("codeword", 100, 90, "40x", "cw"), row("codeword", 190, 98, "20x", "cw")
    rounding = [row("uniform", 150, 80), row("uniform", 250, 90), row("uniform", 120, 99, packing="packed")]
    other = [row("other", 90, 20), row("other", 180, 70), row("other", 999, 99)]
    first, second = margins(front(small, large, *rounding, *other))
    assert (first.row, second.row) == (large, small)
    assert first.within == Beside(rounding[2], -1.0)
    assert first.saved is None  # 98 is more than rounding under xz ever has
    assert first.larger == {}  # 999 is more than twice 190, and none of rounding's larger ones is unbeaten
    assert second.within == Beside(other[0], 70.0)
    assert second.saved == pytest.approx(1 - 100 / 250)
    assert second.larger == {"uniform": Beside(rounding[2], -9.0), "other": Beside(other[1], 20.0)}


def test_margins_by_agreement_are_those_of_agreement():
    """By hand: 97 beside 95 in as many bytes, and rounding is where 97 is halfway, in logarithms, from 200 to 800."""
    mine = row("codeword", 100, 90, "40x", "cw", agreement=97.0)
    rounding = [row("uniform", 100, 91, agreement=95.0), row("uniform", 200, 91, agreement=96.0)]
    (found,) = margins(front(mine, *rounding, row("uniform", 800, 91, agreement=98.0)), "agreement")
    assert found.within == Beside(rounding[0], 2.0)
    assert found.larger == {"uniform": Beside(rounding[0], 2.0)}
    assert found.saved == pytest.approx(1 - 100 / 400)


def test_a_file_that_a_smaller_one_of_ours_beats_is_not_said_to_save():
    rows = [row("codeword", 100, 90, "40x", "cw"), row("codeword", 200, 90, "20x", "cw"), row("uniform", 250, 90)]
    assert [margin.saved for margin in margins(front(*rows))] == [None, pytest.approx(0.6)]


def test_tables_say_what_margins_say():
    rows = [row("codeword", 100, 90, "40x", "cw"), row("nf4", 80, 85.5, "blocks of 64"), row("uniform", 160, 90)]
    found = front(*rows)
    columns, ours = ours_table(found, margins(found))
    assert len(columns) == len(ours[0])
    assert ours == [["40x", "100", "40.00x", "90.00", "+9.00", "85.50 (NF4, blocks of 64, xz)", "+4.50", "-38%"]]
    assert larger_table(found, margins(found)) == (["target", "rounding a channel"], [["40x", "+0.00 (1.60x)"]])
    text = front_markdown(found)
    assert "| 40x | 100 | 40.00x | 90.00 | +9.00 | 85.50 (NF4, blocks of 64, xz) | +4.50 | -38% |" in text
    assert "| NF4 | blocks of 64 | xz | 80 | 50.00x | 85.50 | 85.50 |" in text
    assert "| 40x | 100 | 40.00x | 90.00 | 85.50 (NF4, blocks of 64, xz) | +4.50 | -38% |" in text
    assert "no header" in text


def test_a_front_without_peers_or_files_is_drawn_too(tmp_path):
    for number, found in enumerate((front(), front(row("codeword", 100, 90, "40x", "cw")), front(row("nf4", 9, 10)))):
        files = write_front(tmp_path / str(number), found)
        assert files["png"].read_bytes().startswith(b"\x89PNG")
        assert files["md"].read_text().startswith("# net: bytes against accuracy\n\n100 images of digits")


# Peers


def test_int3_by_hand():
    made = uniform(np.array([[-3.0, 1.2, 0.4, 3.0]], np.float32), 3, clip=False)
    assert made.weights[""].tolist() == [[-3, 1, 0, 3]]
    codes, bits = made.codes[0]
    assert (codes.tolist(), bits, made.side[0].tolist()) == ([[0, 4, 3, 6]], 3, [[1.0]])
    # 12 bits of codes and one float16.
    assert sizes(made)["packed"] == 2 + 2


def test_a_scale_of_least_error_errs_no_more():
    rows = np.random.default_rng(0).laplace(size=(8, 64)).astype(np.float32)
    errors = [np.square(uniform(rows, 3, clip).weights[""] - rows).sum(1) for clip in (False, True)]
    assert (errors[1] <= errors[0]).all()


def test_nf4_keeps_zero_and_the_largest_of_each_block():
    rows = np.zeros((1, 100), np.float32)
    rows[0, 3], rows[0, 70] = 2, -8
    made = nf4(rows)
    assert np.array_equal(made.weights[""], rows.reshape(-1))
    assert [side.size for side in made.side] == [2]


def test_what_is_stored_is_no_more_than_float16_and_codes():
    subject = Subject(zoo.lenet5_trained())
    plain = sizes(by_rows(subject.weights, 1 << 62, nf4))
    four = sizes(by_rows(subject.weights, 0, nf4))
    matrices, vectors = 430_500, 580
    assert plain["packed"] == 2 * (matrices + vectors)
    assert four["packed"] == matrices // 2 + 2 * sum(-(-n // 64) for n in (500, 25_000, 400_000, 5000)) + 2 * vectors
    assert plain["xz"] <= plain["packed"]


def test_a_subject_counts_tied_weights_once_and_whole_numbers_not_at_all():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    net[1].weight = net[0].weight
    weights = Subject(net).weights
    assert {name for name, value in weights.items() if value.ndim > 1} == {"0.weight"}
    assert "2.num_batches_tracked" not in weights
    assert all(value.dtype == np.float32 for value in weights.values())


def test_every_peer_says_whether_it_can_run():
    subject = Subject(zoo.lenet5_trained())
    for name, peer in peers.PEERS.items():
        why_not = peer.why_not(subject)
        assert why_not is None or "install" in why_not or "data" in why_not
        assert list(dict(peer.settings(subject))), name  # what there is to try is told without trying it
    names = [name for name, peer in peers.PEERS.items() if peer.package is None]
    assert names == ["float16", "uniform", "nf4"]


# The command line


def test_sweep_on_the_command_line(tmp_path):
    args = ("sweep", zoo.lenet5_path(), "--model", "codeword.zoo:lenet5", "--data", "digits", "--limit", 50)
    args += ("--targets", "20x, 40x", "--peers", "float16,nf4", "-o", tmp_path / "front")
    result = runner.invoke(codeword.cli.app, list(map(str, args)))
    assert result.exit_code == 0, result.output
    assert "top-1" in result.stderr  # a line for each point, as it is made
    assert "best peer in these bytes" in result.stdout
    assert {path.name for path in (tmp_path / "front").iterdir()} == {
        "20x.cw",
        "40x.cw",
        "front.json",
        "front.md",
        "front.png",
    }
    facts = invoke_json(*args)  # all is there already: nothing to tell
    assert [row["settings"] for row in facts["rows"] if row["method"] == "codeword"] == ["20x", "40x"]
    assert [margin["row"]["settings"] for margin in facts["margins_by_top1"]] == ["20x", "40x"]
    assert "40x" in invoke(*args)


def test_wrong_command_lines(tmp_path):
    args = ("sweep", zoo.lenet5_path(), "--model", "codeword.zoo:lenet5", "--data", "digits", "-o", tmp_path / "f")
    facts = invoke_json(*args, "--peers", "nobody", code=5)
    assert facts["error"].startswith("'nobody' is no peer; there are float16, uniform")
    assert "--calibrate-limit is about --calibrate" in invoke_json(*args, "--calibrate-limit", 10, code=2)["error"]
    assert invoke_json(*args, "--targets", "tiny", code=6)["type"] == "TargetError"


def test_pictures_are_asked_for_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("codeword.report.page.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError):
        reports.need_pictures()
    args = ("sweep", zoo.lenet5_path(), "--model", "codeword.zoo:lenet5", "--data", "digits", "-o", tmp_path / "f")
    assert invoke_json(*args, code=10)["type"] == "MissingDependencyError"
    assert not (tmp_path / "f").exists()
