"""Top-1, top-5 and agreement against hand-counted cases, and what is said when data and model do not fit."""

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import codeword  # noqa: E402  torch may be absent
from codeword import zoo  # noqa: E402
from codeword.data import Dataset  # noqa: E402
from codeword.errors import DataError, MissingDependencyError, SourceError  # noqa: E402
from codeword.evaluate import compare, evaluate, load_factory  # noqa: E402


class Same(torch.nn.Module):
    """Logits are the input."""

    def forward(self, x):
        return x


def dataset(x, y, name="by hand"):
    return Dataset(name, np.asarray(x, np.float32), np.asarray(y, np.int64))


LOGITS = [
    [9, 8, 7, 6, 5, 4],  # label 0: first
    [9, 8, 7, 6, 5, 4],  # label 4: fifth
    [9, 8, 7, 6, 5, 4],  # label 5: sixth
    [0, 0, 0, 0, 0, 1],  # label 5: first
    [0, 0, 0, 0, 0, 0],  # label 5: all equal, so last
    [0, 0, 0, 0, 0, 0],  # label 0: all equal, so first
    [1, 2, 3, 4, 5, 6],  # label 1: fifth
    [1, 2, 3, 4, 5, 6],  # label 0: sixth
]
LABELS = [0, 4, 5, 5, 5, 0, 1, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 500])
def test_top1_and_top5_by_hand(batch_size):
    score = evaluate(Same(), dataset(LOGITS, LABELS), batch_size=batch_size)
    assert score.top1 == 100 * 3 / 8
    assert score.top5 == 100 * 5 / 8
    assert score.n == 8
    assert score.seconds > 0


def test_top5_says_nothing_about_five_classes():
    assert evaluate(Same(), dataset(np.eye(5), [0, 1, 2, 3, 0])).top5 is None
    assert evaluate(Same(), dataset(np.eye(5), [0, 1, 2, 3, 0])).top1 == 80


def test_mean_and_std_are_applied_for_each_channel():
    class Channels(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    x = np.tile(np.array([4.0, 5.0], np.float32).reshape(1, 2, 1, 1), (1, 1, 3, 3))
    data = dataset(x, [0])
    assert evaluate(Channels(), data).top1 == 0
    assert evaluate(Channels(), data, mean=[0, 2]).top1 == 100
    assert evaluate(Channels(), data, mean=[0, 0], std=[1, 10]).top1 == 100
    assert data.x[0, 1, 0, 0] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, r"mean has 1 values but by hand is float32 \(2, 3, 4, 4\)"),
        ({"std": [1, 1, 0]}, "std must be positive"),
        ({"batch_size": 0}, "batch_size must be a positive number"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(DataError, match=message):
        evaluate(zoo.resnet20(), dataset(np.zeros((2, 3, 4, 4)), [0, 1]), **options)


def test_every_module_gets_its_mode_back():
    model = zoo.resnet20().train()
    model.bn1.eval()
    before = [module.training for module in model.modules()]
    data = dataset(np.random.default_rng(0).random((3, 3, 32, 32)), [0, 1, 2])
    mean = model.get_buffer("layer1.0.bn1.running_mean").clone()
    evaluate(model, data)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model.get_buffer("layer1.0.bn1.running_mean"), mean)
    with pytest.raises(DataError) as error:
        evaluate(model, dataset(data.x, [0, 1, 99]), batch_size=1)
    assert not torch.is_inference_mode_enabled(), error
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(("labels", "wrong"), [([0, 6], 6), ([0, -1], -1)])
def test_label_outside_the_logits(labels, wrong):
    with pytest.raises(DataError, match=rf"by hand: label {wrong} but the model has 6 classes \(0 to 5\)"):
        evaluate(Same(), dataset(np.zeros((2, 6)), labels))


def test_wrong_input_shape_names_both():
    data = dataset(np.zeros((2, 1, 32, 32)), [0, 1], "small")
    with pytest.raises(DataError, match=r"its first weight is conv1\.weight \(20, 1, 5, 5\)") as error:
        evaluate(zoo.lenet5(), data)
    assert str(error.value).startswith("small: LeNet5 (")
    assert "does not take a batch (2, 1, 32, 32)" in str(error.value)
    # Of a net that runs from codes too, where the first parameter is the codebook's.
    coded = codeword.swap(zoo.lenet5(), codeword.compress(zoo.lenet5(), "20x"))
    with pytest.raises(DataError, match=r"its first weight is conv1\.weight \(20, 1, 5, 5\)"):
        evaluate(coded, data)
    with pytest.raises(DataError, match=r"takes images \(n, 3, h, w\), got \(2, 1, 32, 32\)"):
        evaluate(zoo.resnet20(), data)


def test_output_that_is_no_logits():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(DataError, match=r"Twice returned tuple; expected logits \(2, classes\)"):
        evaluate(Twice(), dataset(np.zeros((2, 6)), [0, 1]))
    with pytest.raises(DataError, match=r"Same returned \(2, 3, 4, 4\); expected logits"):
        evaluate(Same(), dataset(np.zeros((2, 3, 4, 4)), [0, 1]))


def test_nan_logits_are_not_scored():
    x = np.zeros((5, 6))
    x[3, 2] = np.nan
    with pytest.raises(DataError, match=r"NaN logits for 1 of the examples 2 to 3, first for 3"):
        evaluate(Same(), dataset(x, [0] * 5), batch_size=2)


def test_without_torch_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'codeword\[torch\]'"):
        evaluate(Same(), dataset(LOGITS, LABELS))


def test_empty_set():
    with pytest.raises(DataError, match="no examples"):
        evaluate(Same(), dataset(np.zeros((0, 6)), []))


def test_data_that_may_not_be_written_to():
    x = np.eye(6, dtype=np.float32)
    x.flags.writeable = False
    assert evaluate(Same(), Dataset("fixed", x, np.arange(6))).top1 == 100


def test_agreement_by_hand():
    calls = []

    class Reverse(torch.nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x.flip(1)

    data = dataset([[3, 1, 2], [1, 3, 2], [1, 2, 3], [0, 5, 0]], [0, 0, 0, 0])
    assert compare(Same(), Same(), data)[2] == 100
    same, reverse, agreement = compare(Same(), Reverse(), data, batch_size=3)
    assert agreement == 50
    assert calls == [3, 1], "each net runs once"
    assert (same.top1, reverse.top1) == (evaluate(Same(), data).top1, evaluate(Reverse(), data).top1)


# Factories


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_factory_of_an_installed_module():
    assert load_factory("codeword.zoo:lenet5") is zoo.lenet5


def test_factory_of_a_module_in_the_current_folder(folder):
    (folder / "my_nets_here.py").write_text("def tiny():\n    import my_other_net\n    return my_other_net.value\n")
    (folder / "my_other_net.py").write_text("value = 42\n")
    assert load_factory("my_nets_here:tiny")() == 42


@pytest.mark.parametrize("name", ["", "codeword.zoo", "codeword.zoo:", ":lenet5", "a:b:c"])
def test_factory_name_of_another_form(name):
    with pytest.raises(SourceError, match="expected 'module:factory'"):
        load_factory(name)


def test_factory_that_is_not_there_names_the_nearest():
    with pytest.raises(SourceError, match=r"module 'codeword\.zoo' \(.*has no 'lenet_5'; did you mean 'lenet5'\?"):
        load_factory("codeword.zoo:lenet_5")
    with pytest.raises(SourceError, match="'__all__' is a list, not callable"):
        load_factory("codeword.zoo:__all__")


def test_module_that_is_not_there(folder):
    with pytest.raises(SourceError, match="no module 'no_such_module', neither installed nor in"):
        load_factory("no_such_module:f")
    with pytest.raises(SourceError, match=r"no module 'codeword\.zu'"):
        load_factory("codeword.zu:f")


def test_module_that_fails_to_import(folder):
    (folder / "needs_more.py").write_text("import no_such_dependency\n")
    with pytest.raises(SourceError, match="'needs_more' needs 'no_such_dependency'"):
        load_factory("needs_more:f")
    (folder / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(SourceError, match=r"importing 'breaks' failed: ZeroDivisionError"):
        load_factory("breaks:f")
    (folder / "no_python.py").write_text("def\n")
    with pytest.raises(SourceError, match="importing 'no_python' failed: SyntaxError"):
        load_factory("no_python:f")


def test_a_factory_that_needs_torch_where_there_is_none_says_which_extra_brings_it(tmp_path, monkeypatch):
    (tmp_path / "needs_torch_module.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"codeword\[torch\]"):
        load_factory("needs_torch_module:net")
