"""The two LeNets that the papers of this field compress: 28 x 28 grey images in, 10 logits out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from codeword.zoo._base import Normalized

# Mean and standard deviation of the pixels of MNIST's training images.
_MEAN, _STD = (0.1307,), (0.3081,)


class LeNet300(Normalized):
    """LeNet-300-100: three fully connected layers, 266,610 parameters. (n, 1, 28, 28) in [0, 1] -> (n, 10)."""

    def __init__(self) -> None:
        super().__init__(_MEAN, _STD)
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = self.normalize(x).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class LeNet5(Normalized):
    """LeNet-5 as Caffe has it, 431,080 parameters. (n, 1, 28, 28) in [0, 1] -> (n, 10).

    No ReLU follows the convolutions (only their max pooling does); the one ReLU is between the two linear layers.
    """

    def __init__(self) -> None:
        super().__init__(_MEAN, _STD)
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = F.max_pool2d(self.conv1(self.normalize(x)), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def lenet_300_100() -> LeNet300:
    """LeNet-300-100 with random weights, in eval mode."""
    return LeNet300().eval()


def lenet5() -> LeNet5:
    """LeNet-5 (Caffe's) with random weights, in eval mode."""
    return LeNet5().eval()
