"""Every kind of checkpoint gives its tensors, and none gets to run code or to end in a foreign exception."""

import json
import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from codeword.artifact.layout import MAGIC
from codeword.errors import MissingDependencyError, SourceError
from codeword.expr import DTYPES
from codeword.sources import Source, TensorInfo, kind_of, open_source

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch: quantized and sparse tensors, old pickles


def all_sorts():
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "float32": base,
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "float64": base.double(),
        "float8_e4m3": base.to(torch.float8_e4m3fn),
        "float8_e5m2": base.to(torch.float8_e5m2),
        "int64": torch.arange(3),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "transposed": base.clone().T,
        "sliced": torch.randn(8, 8)[1::2, 3:],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.randn(2)),
    }


def check(source, tensors):
    """`source` holds exactly `tensors`, in this order, bit for bit."""
    assert isinstance(source, Source)
    assert [info.name for info in source.infos] == list(tensors)
    for info in source.infos:
        tensor, array = tensors[info.name].detach(), source.load(info.name)
        assert array.shape == info.shape == tuple(tensor.shape)
        assert array.dtype == DTYPES[info.dtype]
        assert array.flags.c_contiguous
        assert info.size == tensor.numel()
        assert array.astype(np.float64).tolist() == tensor.double().tolist()


def save(tmp_path, content, **options):
    torch.save(content, tmp_path / "net.pt", **options)
    return tmp_path / "net.pt"


@pytest.mark.parametrize("form", ["mapping", "zip", "legacy", "safetensors"])
def test_every_form_gives_the_same_tensors(tmp_path, form):
    tensors = all_sorts()
    if form == "mapping":
        check(open_source(tensors), tensors)
    elif form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "net.safetensors")
        source = open_source(tmp_path / "net.safetensors")
        check(source, {info.name: tensors[info.name] for info in source.infos})
        assert {info.name for info in source.infos} == tensors.keys()
    else:
        if form == "legacy":  # torch itself writes these in its old format but does not read them
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("float8", "uint16"))}
        check(open_source(str(save(tmp_path, tensors, _use_new_zipfile_serialization=form == "zip"))), tensors)


def test_dtypes_are_named_and_kept():
    source = open_source(all_sorts())
    dtypes = {info.name: info.dtype for info in source.infos}
    for name in DTYPES.keys() & dtypes.keys():
        assert dtypes[name] == name
    assert source.load("bfloat16").dtype == ml_dtypes.bfloat16
    assert source.load("float8_e4m3").dtype == ml_dtypes.float8_e4m3fn


def test_a_mapping_of_arrays():
    arrays = {
        "a": np.arange(6, dtype=">f4").reshape(2, 3).T,
        "b": np.array(3, np.int8),
        "c": np.ones(2, ml_dtypes.bfloat16),
    }
    source = open_source(arrays)
    assert [info.dtype for info in source.infos] == ["float32", "int8", "bfloat16"]
    a = source.load("a")
    assert a.dtype == np.float32
    assert a.flags.c_contiguous
    assert a.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert source.load("b").shape == ()


@pytest.mark.parametrize("tensors", [{"a": np.ones(3, np.float32)}, {"a": torch.ones(3)}])
def test_what_is_loaded_cannot_be_used_to_change_the_network(tensors):
    array = open_source(tensors).load("a")
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 7


def test_a_source_is_returned_as_it_is():
    class Mine:
        location = "mine"
        infos = (TensorInfo("a", (2,), "float32", "other"),)

        def load(self, name):
            return np.ones(2, np.float32)

    for source in (Mine(), open_source({"a": torch.ones(1)})):
        assert open_source(source) is source


@pytest.mark.parametrize("name", ["net.safetensors", "net.safetensors.index.json", "net.pt"])
def test_file_sources_pickle_as_their_path(tmp_path, name):
    tensors = {"w": torch.randn(300, 300), "b": torch.randn(300)}
    save(tmp_path, tensors)
    save_file(tensors, tmp_path / "net.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "net.safetensors")}
    (tmp_path / "net.safetensors.index.json").write_text(json.dumps(index))
    source = open_source(tmp_path / name)
    data = pickle.dumps(source)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.infos == source.infos
    assert again.location == source.location == str(tmp_path / name)
    assert again.load("w").tobytes() == tensors["w"].numpy().tobytes()


# Where the state dict is.


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "module", "ema"])
def test_a_nested_state_dict_is_found(tmp_path, key):
    content = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}, key: nn.Linear(2, 3).state_dict()}
    assert [info.name for info in open_source(save(tmp_path, content)).infos] == ["weight", "bias"]


def test_a_state_dict_two_levels_down_and_before_its_average(tmp_path):
    content = {"ema": {"b": torch.ones(1)}, "model": {"state_dict": {"a": torch.ones(1)}, "config": {"lr": 0.1}}}
    assert [info.name for info in open_source(save(tmp_path, content)).infos] == ["a"]


def test_extra_state_is_left_out(tmp_path):
    content = {"a": torch.ones(1), "_extra_state": None, "m._extra_state": {"x": 1}}
    assert [info.name for info in open_source(save(tmp_path, content)).infos] == ["a"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefix_of_a_wrapper_is_stripped_if_all_names_have_it(tmp_path, prefix):
    path = save(tmp_path, {f"{prefix}a.weight": torch.ones(2, 2), f"{prefix}b": torch.ones(2)})
    assert [info.name for info in open_source(path).infos] == ["a.weight", "b"]
    path = save(tmp_path, {f"{prefix}a": torch.ones(2, 2), "b": torch.ones(2)})
    assert [info.name for info in open_source(path).infos] == [f"{prefix}a", "b"]


def test_no_state_dict_says_what_was_found(tmp_path):
    cyclic = {"epoch": 1, "optimizer": {}}
    cyclic["model"] = cyclic
    for content in (cyclic, {"epoch": 1, "optimizer": {"a": torch.ones(1)}}):
        with pytest.raises(
            SourceError, match=r"net\.pt: no state dict found, only a dict with keys \['epoch', 'optimizer'"
        ):
            open_source(save(tmp_path, content))
    with pytest.raises(SourceError, match="only a list;"):
        open_source(save(tmp_path, [torch.ones(1)]))
    with pytest.raises(SourceError, match="only a dict with keys"):
        open_source(save(tmp_path, {}))


# Modules.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.c = nn.Conv1d(4, 4, 3, groups=2)
        self.x = nn.BatchNorm1d(4)
        self.y = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("table", torch.ones(4, 4))
        self.head = nn.Linear(4, 10)
        self.head.weight = self.tokens.weight
        self.again = self.head


def test_a_module_says_what_its_tensors_are():
    model = Net()
    source = open_source(model)
    check(source, model.state_dict())
    assert source.location == "Net module"
    kinds: dict[str, str] = {}
    for info in source.infos:
        kinds[info.kind] = f"{kinds.get(info.kind, '')} {info.name}".lstrip()
    assert kinds == {
        "embedding": "tokens.weight",
        "conv": "c.weight",
        "linear": "attention.in_proj_weight attention.out_proj.weight head.weight again.weight",
        "bias": "c.bias attention.in_proj_bias attention.out_proj.bias head.bias again.bias",
        "norm": "x.weight x.bias x.running_mean x.running_var y.weight y.bias",
        "other": "scale table x.num_batches_tracked",
    }


@pytest.mark.parametrize("form", ["module", "mapping", "zip", "legacy"])
def test_shared_weights_are_tied_to_the_first_of_their_names(tmp_path, form):
    state = Net().state_dict()
    what = {"module": Net(), "mapping": state}.get(form)
    if what is None:
        what = save(tmp_path, state, _use_new_zipfile_serialization=form == "zip")
    ties = {info.name: info.tied_to for info in open_source(what).infos if info.tied_to}
    assert ties == {"head.weight": "tokens.weight", "again.weight": "tokens.weight", "again.bias": "head.bias"}


def test_views_that_differ_and_empty_tensors_are_not_tied():
    base = torch.arange(4.0).reshape(2, 2)
    tensors = {"a": base, "t": base.T, "row": base[0], "flat": base.reshape(4), "int": base.view(torch.int32)}
    tensors |= {"e1": torch.zeros(0), "e2": torch.zeros(0)}
    assert [info.tied_to for info in open_source(tensors).infos] == [None] * len(tensors)


# Kinds without a module.


@pytest.mark.parametrize(
    ("kind", "shape", "names"),
    [
        ("conv", (8, 3, 3, 3), "conv1.weight patch_embed.proj.weight weight"),
        ("conv", (8, 3, 3), "audio.weight"),
        ("linear", (8, 3), "fc.weight time_embedding.linear_1.weight norm.weight q_proj"),
        ("embedding", (8, 3), "model.embed_tokens.weight bert.embeddings.word_embeddings.weight pos_embed"),
        ("embedding", (8, 3), "transformer.wte.weight transformer.wpe.weight tok_embeddings.weight"),
        ("bias", (8,), "fc.bias attn.in_proj_bias rnn.bias_ih_l0 bias"),
        ("norm", (8,), "layer1.0.bn1.bias layers.0.input_layernorm.weight h.0.ln_1.bias norm.bias block.norm2.bias"),
        ("norm", (8,), "downsample.1.weight downsample.1.running_mean downsample.1.running_var"),
        ("other", (8,), "layer_scale.gamma rotary.inv_freq"),
        ("other", (), "logit_scale weight bias"),
    ],
)
def test_kind_by_name_and_shape(kind, shape, names):
    for name in names.split():
        assert kind_of(name, shape, "float32", {name.rpartition(".")[2]: shape}) == kind
        assert kind_of(name, shape, "bfloat16", {}) == kind
        assert kind_of(name, shape, "int64", {}) == "other"
        assert kind_of(name, shape, "bool", {}) == "other"


def test_a_bias_beside_a_norm_is_a_norm():
    assert kind_of("1.bias", (8,), "float32", {"bias": (8,), "running_var": (8,)}) == "norm"
    assert kind_of("1.bias", (8,), "float32", {"bias": (8,), "weight": (8,)}) == "norm"
    assert kind_of("1.bias", (8,), "float32", {"bias": (8,), "weight": (8, 8)}) == "bias"


def test_a_checkpoint_is_told_apart_by_its_siblings(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    kinds = [(info.name, info.kind) for info in open_source(save(tmp_path, model.state_dict())).infos]
    assert kinds == [(info.name, info.kind) for info in open_source(model).infos]


# What is refused.


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    trap = tmp_path / "sprung"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {trap}",)

    for legacy in (False, True):
        path = save(tmp_path, {"a": torch.ones(1), "b": Evil()}, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            SourceError, match=r"net\.pt is a pickle that calls .*system.*refused, nothing was run"
        ) as raised:
            open_source(path)
        assert "weights_only" not in str(raised.value)  # no word on how to walk into it
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "net.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol))
        with pytest.raises(SourceError, match=r"net\.bin") as raised:
            open_source(tmp_path / "net.bin")
        assert "weights_only" not in str(raised.value)
    assert not trap.exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(SourceError, match=r"torch\.save\(model\.state_dict\(\), PATH\)"):
        open_source(save(tmp_path, nn.Linear(2, 2)))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_refused_wherever_it_was_cut(tmp_path, zipped):
    data = save(tmp_path, {"a": torch.ones(20)}, _use_new_zipfile_serialization=zipped).read_bytes()
    for length in range(1, len(data) - 1, 37):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(SourceError, match=r"cut\.pt"):
            open_source(tmp_path / "cut.pt")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.onnx", "net", "net.safetensors.index.json"])
@pytest.mark.parametrize("data", [b"", b"garbage", bytes(100), b"PK\x03\x04" + bytes(50), b"\x80\x02."])
def test_an_empty_or_corrupted_file_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=name):
        open_source(tmp_path / name)


def test_a_missing_file_a_device_and_a_folder_without_a_checkpoint(tmp_path):
    for name in ("a.pt", "a.safetensors", "a.safetensors.index.json", "missing/"):
        with pytest.raises(SourceError, match="does not exist; check the path"):
            open_source(tmp_path / name)
    with pytest.raises(SourceError, match="is a device or pipe"):
        open_source(os.devnull)
    with pytest.raises(SourceError, match=r"is a folder with no \*\.safetensors"):
        open_source(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"x")

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", fail)
    with pytest.raises(SourceError, match=r"cannot read .*a\.pt: Permission denied"):
        open_source(tmp_path / "a.pt")


def test_a_compressed_file_is_no_source(tmp_path):
    (tmp_path / "net.cw").write_bytes(b"x")
    (tmp_path / "renamed.bin").write_bytes(MAGIC + b"x")
    for name in ("net.cw", "renamed.bin"):
        with pytest.raises(SourceError, match=f"compressed already; decompress it first: codeword decompress .*{name}"):
            open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(4).to_sparse_csr(), "sparse"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
            "qint8, Codeword knows .*; dequantize it first",
        ),
        (lambda: torch.ones(2, dtype=torch.complex64), "complex64, Codeword knows float32"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_unsupported_tensors_are_named(tmp_path, tensor, message, stored):
    tensors = {"fine": torch.ones(1), "odd": tensor()}
    with pytest.raises(SourceError, match=f"tensor 'odd' is {message}"):
        open_source(save(tmp_path, tensors) if stored else tensors)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"a": [1, 2]}, "tensor 'a' must be a NumPy array or a torch tensor, got list"),
        ({"a": None}, "got NoneType"),
        ({3: np.ones(2)}, "names of tensors must be strings, got 3"),
        ({"a": np.ones(2, np.complex64)}, "tensor 'a': dtype complex64 cannot be stored"),
        ({"a": np.array(["x"])}, "tensor 'a': dtype <U1"),
        ({"a": np.array([object()])}, "tensor 'a': dtype object"),
        ({"a": torch.ones(2, device="meta")}, "tensor 'a' is on the meta device"),
        (lambda: {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "tensor 'a' is sparse or nested"),
        (lambda: nn.LazyLinear(3), "tensor 'weight' has no shape yet"),
        ({}, "mapping holds no tensors"),
        (nn.ReLU(), "ReLU module holds no tensors"),
        (7, "cannot read tensors from a int"),
        (None, "cannot read tensors from a NoneType"),
    ],
)
def test_what_is_no_source_in_memory(what, message):
    with pytest.raises(SourceError, match=message):
        open_source(what() if isinstance(what, type(lambda: 0)) else what)


def test_an_unknown_name_is_a_source_error(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    for what in (tmp_path / "a.safetensors", {"a": torch.ones(1)}):
        with pytest.raises(SourceError, match="has no tensor 'b'"):
            open_source(what).load("b")


# Shards.


@pytest.fixture
def shards(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.zeros(2, 2)}, tmp_path / "m-1.safetensors")
    save_file({"c": torch.full((3,), 2.0)}, tmp_path / "m-2.safetensors")
    return tmp_path


def index(folder, weight_map, name="m.safetensors.index.json"):
    (folder / name).write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
    return folder / name


WHOLE = {"c": "m-2.safetensors", "b": "m-1.safetensors", "a": "m-1.safetensors"}


def test_shards_are_one_source(shards):
    path = index(shards, WHOLE)
    for what in (path, shards):  # the index, or the folder that holds it
        source = open_source(what)
        check(source, {"a": torch.ones(2), "b": torch.zeros(2, 2), "c": torch.full((3,), 2.0)})
        assert source.location == str(path)


def test_a_folder_with_one_safetensors_file(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    check(open_source(tmp_path), {"a": torch.ones(2)})


def test_a_folder_that_leaves_a_choice(shards):
    with pytest.raises(SourceError, match=r"m-1\.safetensors, m-2\.safetensors; name the one file"):
        open_source(shards)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (WHOLE | {"d": "m-3.safetensors"}, "shard m-3.safetensors is missing"),
        (WHOLE | {"d": "m-2.safetensors"}, "tensor 'd' is not in shard m-2.safetensors"),
        (WHOLE | {"a": "m-2.safetensors"}, "tensor 'a' is not in shard m-2.safetensors"),
        (WHOLE | {"a": "../m-1.safetensors"}, "shard of tensor 'a' must be a file in this folder"),
        (WHOLE | {"a": "/etc/passwd"}, "shard of tensor 'a' must be"),
        (WHOLE | {"a": "x\0"}, "is missing"),
        (WHOLE | {"a": "."}, "shard of tensor 'a' must be"),
        (WHOLE | {"a": ".."}, "shard of tensor 'a' must be"),
        (WHOLE | {"a": ""}, "shard of tensor 'a' must be"),
        (WHOLE | {"a": 5}, "shard of tensor 'a' must be"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ("[]", "has no weight_map"),
        ("{", "is not valid JSON"),
        ('{"weight_map":{"a":"m-1.safetensors","a":"m-2.safetensors"}}', "'a' appears twice"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(shards, weight_map, message):
    with pytest.raises(SourceError, match=message) as raised:
        open_source(index(shards, weight_map))
    assert "m.safetensors.index.json" in str(raised.value)


def test_a_tensor_in_two_shards(shards):
    save_file({"c": torch.ones(3), "a": torch.ones(2)}, shards / "m-2.safetensors")
    with pytest.raises(SourceError, match=r"'a' is in two shards, m-1\.safetensors and m-2\.safetensors"):
        open_source(index(shards, WHOLE))


# Without torch.


def test_safetensors_and_arrays_need_no_torch(shards):
    code = """
import sys
sys.modules["torch"] = None  # importing it now fails
import numpy as np
from codeword.errors import MissingDependencyError
from codeword.sources import open_source
assert open_source(sys.argv[1]).load("c").tolist() == [2, 2, 2]
assert open_source({"a": np.ones(2)}).load("a").tolist() == [1, 1]
try:
    open_source(sys.argv[2])
except MissingDependencyError as error:
    print(error)
"""
    arguments = [index(shards, WHOLE), save(shards, {"a": torch.ones(1)})]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'pip install "codeword[torch]"' in done.stdout


def test_missing_torch_is_the_error_for_it(tmp_path, monkeypatch):
    path = save(tmp_path, {"a": torch.ones(1)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"net\.pt: .*codeword\[torch\]"):
        open_source(path)
