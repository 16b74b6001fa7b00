"""The zoo: shapes and sizes that the papers state, and the two files that ship with the package."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

torch = pytest.importorskip("torch")

from codeword import zoo  # noqa: E402  torch may be absent
from codeword.data import Dataset, load_data  # noqa: E402
from codeword.evaluate import evaluate  # noqa: E402

# With shortcuts that have parameters the ResNets would be 2,752 larger each.
PARAMETERS = {
    "lenet_300_100": 266_610,
    "lenet5": 431_080,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "alexnet32": 36_054_858,
    "vgg16_32": 14_724_042,
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_every_net_has_its_number_of_parameters_and_gives_ten_logits(name):
    model = getattr(zoo, name)()
    channels, side = (1, 28) if name.startswith("lenet") else (3, 32)
    assert count(model) == PARAMETERS[name]
    assert not model.training
    with torch.inference_mode():
        logits = model(torch.rand(2, channels, side, side))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


def test_resnet20_parameters_add_up():
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert convolutions + norms + 64 * 10 + 10 == PARAMETERS["resnet20"]


def test_lenet5_keys_and_shapes_are_caffes():
    shapes = {name: tuple(value.shape) for name, value in zoo.lenet5().state_dict().items()}
    assert shapes == {
        "conv1.weight": (20, 1, 5, 5),
        "conv1.bias": (20,),
        "conv2.weight": (50, 20, 5, 5),
        "conv2.bias": (50,),
        "fc1.weight": (500, 800),
        "fc1.bias": (500,),
        "fc2.weight": (10, 500),
        "fc2.bias": (10,),
    }


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet32", 5), ("resnet44", 7), ("resnet56", 9)])
def test_resnet_keys_are_those_of_the_public_checkpoints(name, blocks):
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{key}" for key in norm)}
    for stage in (1, 2, 3):
        for block in range(blocks):
            for i in (1, 2):
                expected.add(f"layer{stage}.{block}.conv{i}.weight")
                expected.update(f"layer{stage}.{block}.bn{i}.{key}" for key in norm)
    assert set(getattr(zoo, name)().state_dict()) == expected


def test_resnet_shortcut_takes_every_second_pixel_and_pads_channels_evenly():
    block = zoo.resnet20().layer2[0]
    torch.nn.init.zeros_(block.get_parameter("bn2.weight"))  # silences the convolutions; relu(shortcut) is left
    x = torch.rand(1, 16, 8, 8)
    with torch.inference_mode():
        out = block(x)
    assert out.shape == (1, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_models_normalise_their_input_themselves():
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert torch.allclose(zoo.resnet20().normalize(x), (x - mean) / std)
    grey = torch.rand(2, 1, 28, 28)
    assert torch.allclose(zoo.lenet5().normalize(grey), (grey - 0.1307) / 0.3081)


def test_a_grey_image_does_not_pass_for_a_coloured_one():
    with pytest.raises(ValueError, match=r"ResNet takes images \(n, 3, h, w\), got \(2, 1, 32, 32\)"):
        zoo.resnet20()(torch.rand(2, 1, 32, 32))


def test_num_classes():
    assert zoo.resnet20(100).linear.weight.shape == (100, 64)
    assert zoo.vgg16_32(100).fc.weight.shape == (100, 512)


def test_the_bundled_files_stay_below_two_million_bytes():
    assert zoo.lenet5_path().stat().st_size + zoo.digits_path().stat().st_size < 2_000_000


def test_the_bundled_weights_are_plain_float32_safetensors():
    with safe_open(zoo.lenet5_path(), "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
    state = zoo.lenet5_trained().state_dict()
    assert set(tensors) == set(state)
    for name, values in tensors.items():
        assert values.dtype == np.float32
        assert np.array_equal(values, state[name].numpy())


def test_digits():
    x, y = zoo.digits()
    assert x.shape == (1000, 1, 28, 28)
    assert x.dtype == np.float32
    assert (x.min(), x.max()) == (0, 1)
    assert y.shape == (1000,)
    assert y.dtype == np.int64
    assert (np.bincount(y, minlength=10) > 80).all()
    assert np.array_equal(load_data("digits", limit=3).x, x[:3])


def test_the_bundled_net_reads_the_bundled_digits():
    score = evaluate(zoo.lenet5_trained(), Dataset("digits", *zoo.digits()))
    assert score.n == 1000
    assert score.top1 >= 99.0
    assert score.top5 == 100


def test_importing_codeword_brings_neither_zoo_nor_torch():
    code = (
        "import sys, codeword, codeword.data, codeword.evaluate; codeword.data.load_data('digits')\n"
        "sys.exit('torch' in sys.modules or 'codeword.zoo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
