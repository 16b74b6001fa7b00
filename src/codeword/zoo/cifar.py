"""CIFAR-sized nets: the residual nets of He et al., AlexNet and VGG-16. 32 x 32 colour images in, logits out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from codeword.zoo._base import Normalized

# The usual colour statistics of photographs; the public ResNet checkpoints for CIFAR-10 were trained with them.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters ("option A").

    Where the block halves the image, the shortcut takes every second pixel and fills the new channels with zeros,
    half of them before and half after the old ones.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class ResNet(Normalized):
    """ResNet for CIFAR, 6 * blocks + 2 layers deep: three stages of 16, 32 and 64 channels.

    (n, 3, 32, 32) in [0, 1] -> (n, num_classes).
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__(_MEAN, _STD)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        _init_convolutions(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
        first = _Block(inputs, outputs, 1 if inputs == outputs else 2)
        return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class AlexNet32(Normalized):
    """AlexNet for 32 x 32 images: its five convolutions and three linear layers, with strides and kernels to fit.

    As in the original the linear layers hold nearly all weights (33.6 of 36.1 million). (n, 3, 32, 32) in [0, 1] ->
    (n, num_classes).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(_MEAN, _STD)
        self.conv1 = nn.Conv2d(3, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        self.fc1 = nn.Linear(256 * 4 * 4, 4096)
        self.fc2 = nn.Linear(4096, 4096)
        self.fc3 = nn.Linear(4096, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, 3, 32, 32)."""
        x = F.max_pool2d(F.relu(self.conv1(self.normalize(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(F.relu(self.conv5(x)), 2).flatten(1)
        x = F.relu(self.fc1(F.dropout(x, 0.5, self.training)))
        x = F.relu(self.fc2(F.dropout(x, 0.5, self.training)))
        return self.fc3(x)


# Channels of the convolutions in VGG-16's five stages; a 2 x 2 max pooling ends each.
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(Normalized):
    """VGG-16 with batch normalisation for 32 x 32 images: 13 convolutions (conv1_1 to conv5_3) and one linear layer.

    (n, 3, 32, 32) in [0, 1] -> (n, num_classes).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(_MEAN, _STD)
        channels = 3
        for stage, widths in enumerate(_VGG16, 1):
            for index, width in enumerate(widths, 1):
                self.add_module(f"conv{stage}_{index}", nn.Conv2d(channels, width, 3, padding=1, bias=False))
                self.add_module(f"bn{stage}_{index}", nn.BatchNorm2d(width))
                channels = width
        self.fc = nn.Linear(512, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, 3, 32, 32)."""
        x = self.normalize(x)
        for stage, widths in enumerate(_VGG16, 1):
            for index in range(1, len(widths) + 1):
                conv, norm = self.get_submodule(f"conv{stage}_{index}"), self.get_submodule(f"bn{stage}_{index}")
                x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2)
        return self.fc(x.flatten(1))


def _init_convolutions(model: nn.Module) -> None:
    """He's initialisation: nets this deep do not start to learn from torch's default one without it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20 for CIFAR with random weights, in eval mode."""
    return ResNet(3, num_classes).eval()


def resnet32(num_classes: int = 10) -> ResNet:
    """ResNet-32 for CIFAR with random weights, in eval mode."""
    return ResNet(5, num_classes).eval()


def resnet44(num_classes: int = 10) -> ResNet:
    """ResNet-44 for CIFAR with random weights, in eval mode."""
    return ResNet(7, num_classes).eval()


def resnet56(num_classes: int = 10) -> ResNet:
    """ResNet-56 for CIFAR with random weights, in eval mode."""
    return ResNet(9, num_classes).eval()


def alexnet32(num_classes: int = 10) -> AlexNet32:
    """AlexNet for 32 x 32 images with random weights, in eval mode."""
    return AlexNet32(num_classes).eval()


def vgg16_32(num_classes: int = 10) -> VGG16:
    """VGG-16 with batch normalisation for 32 x 32 images with random weights, in eval mode."""
    return VGG16(num_classes).eval()
