"""Plans: TOML in and out, which rule decides, and mistakes that name their place and the nearest valid name."""

import numpy as np
import pytest

import codeword
from codeword import Keep, KMeans, Plan, RateAware, Rule
from codeword.errors import PlanError, WriteError
from codeword.expr import Raw
from codeword.plan import select
from codeword.sources import open_source

NET = {
    "conv1.weight": np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32),
    "conv1.bias": np.linspace(-1, 1, 8, dtype=np.float32),
    "fc.weight": np.random.default_rng(1).normal(size=(10, 40)).astype(np.float32),
    "steps": np.arange(5),
}
INFOS = open_source(NET).infos
REST = Rule("*", Keep())
BY_HAND = """
# edited by hand
target = "30x"

[[rule]]
tensors = "fc.*"
method = "kmeans"
n_clusters = 16

[[rule]]
tensors = "conv?.weight"   # the first layers
method = "rate-aware"
lam = 1                    # whole numbers will do
granularity = "tensor"
compensate = false

[[rule]]
tensors = "*.bias"
method = "keep"
mantissa_bits = 7

[[rule]]
tensors = "*"
method = "keep"
"""


class Rounds:
    """A method of a user's own."""

    def compress(self, weight, importance, *, generator):
        return Raw(np.round(weight))


def written(tmp_path, text):
    path = tmp_path / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def saved(artifact, path):
    artifact.save(path)
    return path.read_bytes()


def test_a_plan_edited_by_hand(tmp_path):
    plan = Plan.load(written(tmp_path, BY_HAND))
    assert plan == Plan(
        (
            Rule("fc.*", KMeans(16)),
            Rule("conv?.weight", RateAware(1.0, granularity="tensor", compensate=False)),
            Rule("*.bias", Keep(7)),
            REST,
        ),
        seed=0,
        target="30x",
    )
    assert plan.resolve(INFOS) == {
        "conv1.weight": plan.rules[1].method,
        "conv1.bias": Keep(7),
        "fc.weight": KMeans(16),
        "steps": Keep(),
    }


def test_what_is_saved_is_what_is_loaded(tmp_path):
    plan = Plan(
        (
            Rule("a[[]0].*", RateAware(0.1, granularity="tensor", codebook="free", max_clusters=9, compensate=False)),
            Rule("größe.weight", RateAware(1.2345e-7)),
            Rule('quo"te\\', KMeans(3, granularity="row", zero=True)),
            Rule("k", Keep(0)),
            REST,
        ),
        seed=12345678901,
        target="2.5bpw",
    )
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
    assert Plan.from_dict(plan.to_dict()) == plan
    bare = Plan((REST,))
    bare.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == bare
    assert (tmp_path / "plan.toml").read_text() == 'seed = 0\n\n[[rule]]\ntensors = "*"\nmethod = "keep"\n'


def test_the_first_rule_that_matches_decides():
    specific, general = Rule("fc.weight", KMeans(4)), Rule("*.weight", KMeans(8))
    methods = Plan((specific, general, REST)).resolve(INFOS)
    assert (methods["fc.weight"], methods["conv1.weight"]) == (KMeans(4), KMeans(8))
    with pytest.raises(PlanError, match=r"rule\[1\]: 'fc.weight'.*earlier rule takes them all"):
        Plan((general, specific, REST)).resolve(INFOS)


def test_a_tensor_without_a_rule():
    with pytest.raises(PlanError, match=r"no rule matches tensor 'conv1.bias'; end the plan with"):
        Plan((Rule("*.weight", KMeans(4)),)).resolve(INFOS)


def test_an_idle_rule():
    with pytest.raises(PlanError, match=r"rule\[0\]: 'fv.weight' matches none of 4 tensors.*'fc.weight'"):
        Plan((Rule("fv.weight", KMeans(4)), REST)).resolve(INFOS)
    names = [Rule(info.name, Keep()) for info in INFOS]
    assert len(Plan((*names, REST)).resolve(INFOS)) == 4  # a catch-all may have nothing left


def test_globs_keep_integers_and_names_may_not_cluster_them():
    assert Plan((Rule("*", KMeans(2)),)).resolve(INFOS)["steps"] == Keep()
    assert Plan((Rule("step?", KMeans(2)), REST)).resolve(INFOS)["steps"] == Keep()
    assert Plan((Rule("steps", Keep()), REST)).resolve(INFOS)["steps"] == Keep()
    with pytest.raises(PlanError, match=r"rule\[0\]: tensor 'steps' is int64; only floats can be clustered"):
        Plan((Rule("steps", KMeans(2)), REST)).resolve(INFOS)


def test_case_matters():
    with pytest.raises(PlanError, match=r"'FC.weight' matches none"):
        Plan((Rule("FC.weight", KMeans(2)), REST)).resolve(INFOS)


def test_tied_tensors_need_a_rule_and_get_no_method():
    torch = pytest.importorskip("torch")
    weight = torch.ones(4, 4)
    infos = open_source({"embed": weight, "head": weight}).infos
    assert Plan((REST,)).resolve(infos) == {"embed": Keep()}
    assert list(Plan((Rule("embed", KMeans(2)), Rule("head", Keep()))).resolve(infos)) == ["embed"]


def test_names_with_glob_characters_survive_a_plan(tmp_path):
    names = ["w[0]", "w[1]", "w*", "w?", "w", "[!a]", "*"]
    net = {name: np.random.default_rng(i).normal(size=(9, 9)).astype(np.float32) for i, name in enumerate(names)}
    infos = open_source(net).infos
    methods = {name: KMeans(i + 2) for i, name in enumerate(names)}
    Plan.of(methods, infos, 0, None).save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml").resolve(infos) == methods


def test_a_method_of_ones_own_runs_and_cannot_be_saved(tmp_path):
    plan = Plan((Rule("fc.weight", Rounds()), REST))
    artifact = codeword.compress(NET, plan=plan)
    np.testing.assert_array_equal(artifact.decode("fc.weight"), np.round(NET["fc.weight"]))
    np.testing.assert_array_equal(artifact.decode("conv1.weight"), NET["conv1.weight"])
    with pytest.raises(PlanError, match=r"method of 'fc.weight', .*Rounds.*, is not built in: no plan file holds it"):
        plan.save(tmp_path / "plan.toml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_saved_plan_reproduces_the_bytes(workers, tmp_path):
    made = codeword.fit(NET, "5x", seed=3)
    made.plan.save(tmp_path / "plan.toml")
    assert (made.plan.seed, made.plan.target) == (3, "5x")
    again = codeword.compress(NET, plan=tmp_path / "plan.toml", workers=workers)
    assert saved(again, tmp_path / "b.cw") == saved(made.artifact, tmp_path / "a.cw")


def test_include_and_exclude_are_part_of_the_plan_that_is_told(tmp_path):
    made = codeword.fit(NET, plan=Plan((Rule("*", KMeans(2)),), seed=7), include=["*.weight"], exclude=["conv*"])
    for name in ("conv1.weight", "conv1.bias", "steps"):
        np.testing.assert_array_equal(made.artifact.decode(name), NET[name])
    assert len(np.unique(made.artifact.decode("fc.weight"))) == 2
    assert made.kept["conv1.weight"] == made.kept["conv1.bias"] == "left out by include or exclude"
    assert "fc.weight" not in made.kept
    made.plan.save(tmp_path / "plan.toml")
    again = codeword.compress(NET, plan=tmp_path / "plan.toml")
    assert saved(again, tmp_path / "b.cw") == saved(made.artifact, tmp_path / "a.cw")


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ([], [], set(NET)),
        (["*.weight"], [], {"conv1.weight", "fc.weight"}),
        (["*.weight", "steps"], [], {"conv1.weight", "fc.weight", "steps"}),
        ([], ["conv1.*"], {"fc.weight", "steps"}),
        (["conv1.*"], ["*.bias"], {"conv1.weight"}),
        (["fc.*"], ["fc.*"], set()),
        (["c[aeiou]nv?.weigh[!x]"], [], {"conv1.weight"}),
    ],
)
def test_include_and_exclude(include, exclude, names):
    assert select(INFOS, include, exclude) == names


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_glob_that_matches_nothing(where):
    with pytest.raises(PlanError, match=r"'fc.weihgt' matches none of 4 tensors .the nearest name is 'fc.weight'"):
        codeword.compress(NET, "4x", **{where: ["fc.weihgt"]})


RULE = {"tensors": "*", "method": "rate-aware", "lam": 0.1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"rule": [RULE, RULE | {"lamm": 1}]}, r"p: rule[1].lamm: unknown field; did you mean 'lam'?"),
        ({"rule": [RULE], "rules": []}, "p.rules: unknown field; did you mean 'rule'?"),
        ({"rule": [RULE], "sede": 1}, "p.sede: unknown field; did you mean 'seed'?"),
        ({"rule": [RULE], "qqq": 1}, "p.qqq: unknown field; valid are target, seed, fold_norms, rule"),
        ({"rule": [RULE | {"method": "rate_aware"}]}, "p: rule[0].method: 'rate_aware' is no method; did you mean"),
        ({"rule": [RULE | {"method": "svd"}]}, "'svd' is no method; valid are keep, fixed-point, kmeans, rate-aware"),
        ({"rule": [RULE | {"method": 3}]}, "p: rule[0].method: 3 is no method"),
        ({"rule": [{"tensors": "*"}]}, "p: rule[0].method: None is no method"),
        ({"rule": [RULE | {"n_clusters": 4}]}, "p: rule[0].n_clusters: unknown field"),
        (
            {"rule": [RULE | {"granularity": "rows"}]},
            "p: rule[0].granularity: Invalid enum value 'rows'; did you mean 'row'?",
        ),
        ({"rule": [RULE | {"codebook": "zzz"}]}, "p: rule[0].codebook: Invalid enum value 'zzz'; valid are grid, free"),
        ({"rule": [{"tensors": "*", "method": ["keep"]}]}, "p: rule[0].method: ['keep'] is no method"),
        ({"rule": [RULE | {"lam": "a"}]}, "p: rule[0].lam: Expected `float`, got `str`"),
        ({"rule": [RULE | {"lam": True}]}, "p: rule[0].lam: Expected `float`, got `bool`"),
        ({"rule": [RULE | {"lam": -1.0}]}, "p: rule[0]: rate-aware: lam must be a positive number, got -1.0"),
        ({"rule": [RULE | {"lam": float("nan")}]}, "lam must be a positive number, got nan"),
        ({"rule": [RULE | {"max_clusters": 0}]}, "p: rule[0]: rate-aware: max_clusters must lie in 1..4096, got 0"),
        ({"rule": [{"tensors": "*", "method": "rate-aware"}]}, "p: rule[0]: Object missing required field `lam`"),
        ({"rule": [{"tensors": "*", "method": "kmeans", "n_clusters": 0}]}, "n_clusters must lie in 1..65536, got 0"),
        ({"rule": [{"tensors": "*", "method": "kmeans", "n_clusters": 1.5}]}, "p: rule[0].n_clusters: Expected `int`"),
        ({"rule": [{"tensors": "*", "method": "keep", "mantissa_bits": 53}]}, "mantissa_bits must lie in 0..52"),
        ({"rule": [{"method": "keep"}]}, "p: rule[0].tensors: must be a glob"),
        ({"rule": [{"tensors": "", "method": "keep"}]}, "p: rule[0].tensors: must be a glob"),
        ({"rule": [{"tensors": ["a"], "method": "keep"}]}, "p: rule[0].tensors: must be a glob"),
        ({"rule": ["keep"]}, "p: rule[0]: must be a table, got 'keep'"),
        ({"rule": {"tensors": "*"}}, "p: needs at least one [[rule]]"),
        ({"rule": []}, "p: needs at least one [[rule]]"),
        ({}, "p: needs at least one [[rule]]"),
        ({"rule": [RULE], "seed": -1}, "p: seed must be a whole number >= 0, got -1"),
        ({"rule": [RULE], "seed": 1.0}, "p: seed must be a whole number >= 0, got 1.0"),
        ({"rule": [RULE], "seed": True}, "p: seed must be a whole number >= 0, got True"),
        ({"rule": [RULE], "target": 30}, "p: target must be a string such as"),
    ],
)
def test_mistakes_name_their_place_and_the_way_out(content, says):
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(content, "p")
    assert says in str(caught.value)


def test_mistakes_in_a_file_name_the_file(tmp_path):
    path = written(tmp_path, BY_HAND.replace("n_clusters", "n_cluster"))
    with pytest.raises(PlanError) as caught:
        codeword.compress(NET, plan=path)
    assert str(caught.value) == f"{path}: rule[0].n_cluster: unknown field; did you mean 'n_clusters'?"


def test_one_glob_is_not_its_letters():
    assert select(INFOS, "conv1.*", "*.bias") == {"conv1.weight"}


@pytest.mark.parametrize("seed", [-1, 1.0, "0", True])
def test_a_seed_that_no_plan_could_hold(seed):
    with pytest.raises(PlanError, match="seed must be a whole number >= 0"):
        codeword.compress(NET, "4x", seed=seed)


def test_a_name_with_brackets_is_told_as_the_glob_it_needs():
    infos = open_source({"[x]": NET["fc.weight"]}).infos
    with pytest.raises(PlanError, match=r"nearest name is '\[x\]', as a glob '\[\[\]x\]'"):
        select(infos, ["[x]"], [])
    assert select(infos, ["[[]x]"], []) == {"[x]"}


def test_files_that_are_no_plans(tmp_path):
    with pytest.raises(PlanError, match=r"absent.toml: cannot be read: No such file"):
        Plan.load(tmp_path / "absent.toml")
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match=r"not TOML: .*line 3"):
        Plan.load(written(tmp_path, "\nseed = 1\n[[rule\n"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not TOML"):
        Plan.load(tmp_path / "binary.toml")


def test_a_plan_that_cannot_be_written(tmp_path):
    with pytest.raises(WriteError):
        Plan((REST,)).save(tmp_path / "absent" / "plan.toml")


def test_plan_and_target_are_one_too_many():
    with pytest.raises(PlanError, match="give target or plan, not both"):
        codeword.compress(NET, "4x", plan=Plan((REST,)))
