"""Codeword beside coremltools' palettizer at equal bytes, data-free: k-means to 2**bits codewords, one table a tensor.

    pip install coremltools scikit-learn
    CODEWORD_DATA=DATA python benchmarks/peers.py --weights FOLDER

The peer's bytes are counted kindly: the shorter of bit-packed codes and of codes under xz -9e, tables and all other
tensors in fp16, no header. Ours is the file on disk, at most as large. Writes benchmarks/peers.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

import codeword
from codeword import zoo
from codeword.data import load_data
from codeword.evaluate import evaluate

JSON = Path(__file__).with_suffix(".json")


def peer(path: Path, factory, bits: int, dataset) -> dict:
    model = factory()
    model.load_state_dict(codeword.state_dict(codeword.compress(path, plan=keep_all())), strict=False)
    config = PostTrainingPalettizerConfig.from_dict(
        {
            "global_config": {
                "n_bits": bits,
                "granularity": "per_tensor",
            }
        }
    )
    start = time.perf_counter()
    palettized = PostTrainingPalettizer(model, config).compress()
    seconds = time.perf_counter() - start
    codes, nbytes = [], 0
    for name, value in palettized.state_dict().items():
        array = value.detach().numpy()
        if "_COREML_" in name or not np.issubdtype(array.dtype, np.floating):
            continue  # its tables are counted with the tensor they belong to
        table, index = np.unique(array, return_inverse=True)
        if array.ndim > 1 and len(table) <= 2**bits:
            codes.append(index.astype(np.uint8).tobytes())
            nbytes += 2 * 2**bits
        else:
            nbytes += 2 * array.size
    packed = sum((len(code) * bits + 7) // 8 for code in codes)
    coded = len(lzma.compress(b"".join(codes), preset=9 | lzma.PRESET_EXTREME))
    return {
        "bits": bits,
        "tensors": len(codes),
        "bytes": nbytes + min(packed, coded),
        "top1": evaluate(palettized.eval(), dataset).top1,
        "seconds": seconds,
    }


def keep_all() -> codeword.Plan:
    return codeword.Plan((codeword.Rule("*", codeword.Keep()),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    nets = {
        "lenet5": (zoo.lenet5_path(), zoo.lenet5, "mnist:test", (1, 2, 3, 4)),
        "resnet20": (arguments.weights / "cifar10_resnet20.safetensors", zoo.resnet20, "cifar10:test", (2, 3, 4, 6)),
    }
    for name, (path, factory, spec, widths) in nets.items():
        dataset, rows = load_data(spec), []
        for bits in widths:
            row = peer(path, factory, bits, dataset)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.cw"
                start = time.perf_counter()
                made = codeword.fit(path, row["bytes"])
                seconds = time.perf_counter() - start
                made.artifact.save(file)
                score = codeword.evaluate(file, dataset, model=factory())
                row |= {"codeword_bytes": file.stat().st_size, "codeword_top1": score.top1, "codeword_seconds": seconds}
            rows.append(row)
            print(name, row, flush=True)
        results[name] = {"data": spec, "n": len(dataset), "rows": rows}
    JSON.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
