"""Runs the rows of `claims_rows.py`: what papers claim of pruning and shared weights, and our own beside it.

    CODEWORD_DATA=FOLDER python recipes/claims.py --weights resnet20=FILE ... [--only 'deep*'] [--seeds 0,1]

Each row is what a user would write: prune while training, compress by a method, plan or target, train what the file
holds. Bytes are those of the written file, read back and verified; accuracy is that of the file on the whole test set,
beside the uncompressed net's. The last 5,000 training images are held out: epochs are kept and options were chosen by
them. Rows that recipes/claims.json has are not run again; it is written after each.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import statistics
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from claims_rows import NETS, NOTES, ROWS, Pruned, Row
from safetensors.torch import load_file
from torch import nn

import codeword
from codeword import Plan, Rule
from codeword.atomic import replacing
from codeword.data import Dataset, load_data
from codeword.finetune import History
from codeword.methods import Keep, Method, Prune
from codeword.train import Pruner, Tuner
from codeword.train.loop import train

HELD_OUT = 5_000
JSON = Path(__file__).with_suffix(".json")

log = logging.getLogger("claims")


class Data:
    """The parts of a data set, read when they are first asked for."""

    def __init__(self, name: str) -> None:
        whole = load_data(f"{name}:train")
        self.fit = Dataset(f"{name}:train, but the last {HELD_OUT:,}", whole.x[:-HELD_OUT], whole.y[:-HELD_OUT])
        self.held_out = Dataset(f"{name}:train, the last {HELD_OUT:,}", whole.x[-HELD_OUT:], whole.y[-HELD_OUT:])
        self.test = load_data(f"{name}:test")


def run(row: Row, seed: int, model: nn.Module, data: Data, file: Path, done: list[Any]) -> dict[str, Any]:
    """What came of a row: of the file, of its accuracy, of its training.

    done: the last pruning, (key, net, Pruner, History), which a row that begins with the same one takes over.
    """
    start, before = time.perf_counter(), 0.0
    if isinstance(row.compress, str) and row.pruned is None and row.pace is None:  # what one call does
        options = None if row.tuned is None else msgspec.structs.replace(row.tuned, seed=seed)
        parts = {"data": data.fit, "validation": data.held_out, "on_epoch": told}
        made = codeword.fit(model, row.compress, finetune=options, seed=seed, **parts)
        artifact, histories, facts = made.artifact, list(made.histories), {}
    else:
        if row.pruned is not None and (not done or done[0] != (row.net, row.pruned, seed)):
            net = copy.deepcopy(model)
            done[:] = [(row.net, row.pruned, seed), net, *pruned(net, model, row.pruned, data, seed)]
        elif row.pruned is not None:
            before = sum(it.seconds for it in done[3].done)
        artifact, histories, facts = shared(row, seed, model, data, [] if row.pruned is None else done)
    artifact.save(file)
    if wrong := codeword.verify(file):
        raise SystemExit(f"{row.name}, seed {seed}: {wrong}")
    facts |= sizes(file) | scored(codeword.load(file), model, data)
    return facts | {
        "seconds": round(time.perf_counter() - start + before),
        "epochs": sum(history.epochs for history in histories),
        "histories": [curve(history) for history in histories],
    }


def shared(
    row: Row, seed: int, model: nn.Module, data: Data, done: list[Any]
) -> tuple[codeword.Artifact, list[History], dict[str, Any]]:
    """(artifact, histories, its bytes and accuracy before it was trained) of a row in steps."""
    how = row.compress
    net, pruner, histories = copy.deepcopy(model), None, []
    if done:
        _, net, pruner, history = done
        histories = [history]
    if isinstance(how, str):
        artifact = codeword.compress(net, how, seed=seed, fold_norms=False)  # they are to be trained
    elif pruner is not None:
        artifact = pruner.finalize(how, seed=seed)
    else:
        artifact = codeword.compress(net, **({"plan": how} if isinstance(how, Plan) else {"method": how, "seed": seed}))
    facts: dict[str, Any] = {}
    if row.tuned is not None:
        before = {} if isinstance(how, str) else scored(artifact, model, data)
        facts = {"before_tuning": {"nbytes": artifact.nbytes, **before}}
        nbytes = None if row.ratio is None else int(artifact.dense_nbytes / row.ratio)
        tuner = Tuner(artifact, reassign_every=row.tuned.reassign_every, train=row.kinds, pace=row.pace, nbytes=nbytes)
        tuned = tuner.prepare(net.train())
        options = msgspec.structs.replace(row.tuned, seed=seed)
        histories.append(train(tuned, tuner, data.fit, options, teacher=model, validation=data.held_out, on_epoch=told))
        artifact = tuner.finalize()
    return artifact, histories, facts


def pruned(net: nn.Module, teacher: nn.Module, how: Pruned, data: Data, seed: int) -> tuple[Pruner, History]:
    """Prunes a net in place while it trains; (what holds its masks, its history)."""
    options = msgspec.structs.replace(how.options, seed=seed, keep="last")
    if how.plan is not None:
        net.load_state_dict(codeword.state_dict(codeword.compress(net, plan=_only_zeros(how.plan))))
        pruner = Pruner(None)
    else:
        steps = round(how.ramp * options.epochs * (len(data.fit) // options.batch_size))
        pruner = Pruner(how.sparsity, steps=steps, criterion=how.criterion, scope=how.scope, seed=seed)
    held_out = data.held_out
    history = train(
        pruner.prepare(net.train()), pruner, data.fit, options, teacher=teacher, validation=held_out, on_epoch=told
    )
    return pruner, history


def _only_zeros(plan: Plan) -> Plan:
    """The plan's pruning alone."""

    def zeros(method: Method) -> Method:
        return Prune(method.sparsity) if isinstance(method, Prune) else Keep()

    return Plan(tuple(Rule(rule.tensors, zeros(rule.method)) for rule in plan.rules), plan.seed)


def told(history: History) -> None:
    """A line for each epoch."""
    it = history.last
    loss, top1 = (math.nan if value is None else value for value in (it.loss, it.held_out_top1))
    line = "    %s %d/%d  loss %.4f  held out %.2f  %.0f s"
    log.info(line, history.stage, it.epoch, history.epochs, loss, top1, it.seconds)


def scored(artifact: codeword.Artifact, model: nn.Module, data: Data) -> dict[str, float]:
    """Top-1 in percent."""
    parts = {"held_out_top1": data.held_out, "test_top1": data.test}
    return {name: round(codeword.evaluate(artifact, part, model=model).top1, 2) for name, part in parts.items()}


def sizes(file: Path) -> dict[str, Any]:
    """Bytes of a file and what it holds."""
    report = codeword.inspect(file)
    matrices = [it for it in report.tensors if len(it.shape) > 1]
    convs = [it for it in matrices if len(it.shape) > 2]
    count = sum(int(np.prod(it.shape)) for it in matrices)
    return {
        "nbytes": file.stat().st_size,
        "ratio": round(report.dense_nbytes / file.stat().st_size, 2),
        "conv_ratio": _ratio(convs),
        "sparsity": round(sum(it.sparsity * int(np.prod(it.shape)) for it in matrices) / count, 4),
        "k": {it.name: it.n_clusters for it in matrices},
        "bytes_by_tensor": {it.name: it.nbytes for it in matrices},
    }


def _ratio(tensors: list[Any]) -> float | None:
    """float32 bytes over bytes in the file."""
    if not tensors:
        return None
    return round(sum(4 * int(np.prod(it.shape)) for it in tensors) / sum(it.nbytes for it in tensors), 2)


def curve(history: History) -> dict[str, Any]:
    """A history, rounded: of each epoch the loss, what is held out, the rate and seconds."""
    epochs = [
        [
            it.epoch,
            None if it.loss is None else round(it.loss, 5),
            None if it.held_out_top1 is None else round(it.held_out_top1, 2),
            round(it.seconds, 1),
        ]
        for it in history.done
    ]
    return {"stage": history.stage, "kept": history.kept, "epoch_loss_heldout_seconds": epochs}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and spreads over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["claim"], row["row"]), []).append(row)
    lines = []
    for (claim, name), group in groups.items():
        line: dict[str, Any] = {"claim": claim, "row": name, "seeds": sorted(it["seed"] for it in group)}
        for key in ("nbytes", "ratio", "conv_ratio", "sparsity", "held_out_top1", "test_top1", "drop"):
            values = [it[key] for it in group if it[key] is not None]
            if values:
                line[key] = {"mean": round(statistics.mean(values), 4), "least": min(values), "most": max(values)}
        lines.append(line | {"dense_top1": group[0]["dense_top1"]})
    return lines


def read(path: Path) -> dict[str, Any]:
    """What a file of results holds."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"dense": {}, "rows": []}


def write(path: Path, rows: list[dict[str, Any]], dense: dict[str, Any]) -> None:
    """Adds to what the file holds by now: another process may have written there."""
    known = read(path)
    order = {(it.claim, it.name): at for at, it in enumerate(ROWS)}
    rows = sorted([*known["rows"], *rows], key=lambda it: (order.get((it["claim"], it["row"]), 999), it["seed"]))
    content = {"notes": NOTES, "dense": known["dense"] | dense, "summary": summary(rows), "rows": rows}
    with replacing(path) as out:
        out.write((json.dumps(content, indent=1) + "\n").encode())


class Session:
    """What the rows of one call share: nets, data, the last pruning, and where results go."""

    def __init__(self, out: Path, files: Path, weights: dict[str, str]) -> None:
        self._out, self._files, self._weights = out, files, weights
        self._nets: dict[str, nn.Module] = {}
        self._data: dict[str, Data] = {}
        self._done: list[Any] = []

    def can_run(self, row: Row, seed: int) -> bool:
        """Whether the row is not there yet and its weights are."""
        if any((it["claim"], it["row"], it["seed"]) == (row.claim, row.name, seed) for it in read(self._out)["rows"]):
            return False
        if NETS[row.net].weights is None and row.net not in self._weights:
            log.info("%s/%s: skipped, give --weights %s=FILE", row.claim, row.name, row.net)
            return False
        return True

    def run(self, row: Row, seed: int) -> None:
        """Runs a row and writes what came of it."""
        log.info("%s/%s, seed %d", row.claim, row.name, seed)
        data, model = self._data_of(row), self._net_of(row)
        dense = self._dense_of(row, model, data)["test_top1"]
        facts = run(row, seed, model, data, self._files / f"{row.name}-{seed}.cw", self._done)
        record = {
            "claim": row.claim,
            "row": row.name,
            "net": row.net,
            "data": NETS[row.net].data,
            "how": row.how,
            "command": f"python recipes/claims.py --only '{row.claim}/{row.name}' --seeds {seed}",
            "seed": seed,
            "dense_top1": dense,
            "drop": round(dense - facts["test_top1"], 2),
            **row.options(),
            **facts,
        }
        write(self._out, [record], {})
        words = "    %(nbytes)d bytes, %(ratio).1fx, held out %(held_out_top1).2f, test %(test_top1).2f, %(seconds)d s"
        log.info(words, record)

    def _data_of(self, row: Row) -> Data:
        name = NETS[row.net].data
        if name not in self._data:
            self._data = {name: Data(name)}  # one at a time: they are large
        return self._data[name]

    def _net_of(self, row: Row) -> nn.Module:
        if row.net not in self._nets:
            model = NETS[row.net].factory()
            path = self._weights.get(row.net) or NETS[row.net].weights
            # Not strict: counters of batches, which old checkpoints lack, matter to nothing here.
            missing, unknown = model.load_state_dict(load_file(str(path)), strict=False)
            if unknown or not all(name.endswith("num_batches_tracked") for name in missing):
                raise SystemExit(f"{path} does not fit {row.net}: it lacks {missing} and has {unknown}")
            self._nets[row.net] = model.eval()
        return self._nets[row.net]

    def _dense_of(self, row: Row, model: nn.Module, data: Data) -> dict[str, Any]:
        known = read(self._out)["dense"]
        if row.net not in known:
            both = {"held_out_top1": data.held_out, "test_top1": data.test}
            found = {name: round(codeword.evaluate(model, it).top1, 2) for name, it in both.items()}
            known = {row.net: {"data": NETS[row.net].data, **found}}
            write(self._out, [], known)
        return known[row.net]


def main() -> None:
    """Reads the options and runs what is not there yet."""
    parser = argparse.ArgumentParser(description="Run the rows of claims_rows.py ($CODEWORD_DATA).")
    parser.add_argument("--only", default="*", help="a glob on CLAIM/ROW")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--weights", action="append", default=[], metavar="NET=FILE")
    parser.add_argument("--files", type=Path, help="keep the .cw files here")
    parser.add_argument("--out", type=Path, default=JSON)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = args.files or Path(folder)
        files.mkdir(parents=True, exist_ok=True)
        rows = [row for row in ROWS if fnmatch(f"{row.claim}/{row.name}", args.only)]
        if not rows:
            raise SystemExit(
                f"--only {args.only}: no row is called so; rows are CLAIM/ROW, such as jia/lenet5-birch-95"
            )
        session = Session(args.out, files, dict(item.split("=", 1) for item in args.weights))
        for seed in map(int, args.seeds.split(",")):
            for row in rows:
                if seed in row.seeds and session.can_run(row, seed):
                    session.run(row, seed)


if __name__ == "__main__":
    main()
