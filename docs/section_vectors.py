"""Sections of docs/clustering.md on codebooks of vectors: beside faiss, beside scalars at equal bytes, shared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from wording import counted, errors, head, listed, percent, speed, times, where

from main_job import table

COMMAND = "python benchmarks/vectors.py --weights FOLDER"
SCALARS = {"kmeans": "k-means", "rate-aware": "rate-aware"}  # one value a weight
# Options that a label tells of, their defaults and how it tells.
USUAL = {
    "granularity": ("tensor", "scales a {}"),
    "codebook_dtype": ("int8", "codebook in {}"),
    "residual_stages": ("0", "residual stages {}"),
}


def options(method: str) -> dict[str, str]:
    """Of a method as it prints itself."""
    return dict(re.findall(r"(\w+)='?([\w.+]+)'?", method))


def product_label(found: dict[str, str]) -> str:
    return f"{found['cluster_dim']} weights, {found['n_clusters']} codewords"


def templates_label(found: dict[str, str]) -> str:
    offset = {"True": "no offset", "False": "offset"}.get(found["drop_offset"], "offset where it pays")
    return f"{found['n_templates']} templates, {offset}"


def label(method: str) -> str:
    found = options(method)
    name = product_label(found) if method.startswith("ProductQuantization") else templates_label(found)
    odd = [told.format(found[key]) for key, (it, told) in USUAL.items() if found.get(key, it) != it]
    return ", ".join([name, *odd])


def usual(method: str) -> bool:
    """Whether nothing but the size of the codebook is set: the table's rows."""
    found = options(method)
    return all(found.get(key, it) == it for key, (it, _) in USUAL.items()) and found.get("drop_offset") != "auto"


def by_number(setting: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", setting)]


def vectors(record: dict) -> list[str]:
    parts = head("Codebooks of vectors: product quantization, kernel templates", COMMAND, "vectors", record)
    if record.get("faiss"):
        parts += beside_faiss(record["faiss"])
    tensors = {name: part["rows"] for name, part in record.items() if isinstance(part, dict) and "rows" in part}
    parts += beside_scalars("ProductQuantization", "Product quantization", tensors)
    parts += beside_scalars("KernelTemplates", "Kernel templates", tensors)
    return parts


def beside_faiss(rows: list[dict]) -> list[str]:
    threads = max(row["threads"] for row in rows)

    def cells(what: str, kept: Callable[[dict], bool] = lambda _: True) -> dict[str, float]:
        return {
            f"{row['n']:,} of {row['d']}, k = {row['k']}, {counted(row['threads'], 'thread')}": 1 / row[what]["ratio"]
            for row in rows
            if kept(row)
        }

    ks = sorted({row["k"] for row in rows})
    found = {
        (row["n"], row["d"], row["k"]): 1 / row["train_and_codes"]["ratio"] for row in rows if row["threads"] == threads
    }
    lines = [
        [f"{n:,} of {d}", *(times(found.get((n, d, k))) for k in ks)]
        for n, d in dict.fromkeys((n, d) for n, d, _ in found)
    ]
    return [
        f"**Beside faiss**: its time over ours to find the codebook and all codes, {counted(threads, 'thread')}, "
        "Laplacian vectors, medians of interleaved runs (empty: not run):",
        table(["vectors, of so many weights", *(f"k = {k}" for k in ks)], lines),
        f"{speed('faiss', cells('train_and_codes'))} The codebook alone: ours is slower {where(cells('train'))}.",
        errors("faiss", cells("mse")),
    ]


def beside_scalars(kind: str, title: str, tensors: dict[str, list[dict]]) -> list[str]:
    """Settings down, tensors across: the ratio of size, and errors of scalar methods at equal bytes over ours."""
    found = {
        (label(row["method"]), name): row
        for name, rows in tensors.items()
        for row in rows
        if row["method"].startswith(kind)
    }
    counts = Counter(name for _, name in found)
    names = [name for name, count in counts.items() if count > 1]
    columns: dict[str, Callable[[dict], str]] = {
        "smaller": lambda row: f"{row['ratio']:.1f}x",
        **{shown: lambda row, key=key: times(over(row, key)) for key, shown in SCALARS.items()},
    }
    if any("multiplications" in row for row in found.values()):
        columns["multiplications"] = lambda row: f"{row['multiplications']:.2f}" if "multiplications" in row else ""
    lines = [
        [
            setting,
            *(
                say(found[setting, name]) if (setting, name) in found else ""
                for name in names
                for say in columns.values()
            ),
        ]
        for setting in sorted(
            {setting for setting, name in found if name in names and usual(found[setting, name]["method"])},
            key=lambda setting: (by_number(setting), setting),
        )
    ]
    parts = [
        f"**{title}**: how many times smaller than float32, and the squared error of scalar clustering (k-means, "
        "rate-aware) at the same bytes over ours: below 1, ours has the larger error.",
        table(["codebook", *(f"{name}: {column}" for name in names for column in columns)], lines),
    ]
    for key, shown in SCALARS.items():
        cells = {
            f"{name}, {setting}": it for (setting, name), row in found.items() if (it := over(row, key)) is not None
        }
        parts.append(f"Beside scalar clustering ({shown}) at equal bytes ours has the larger error {where(cells)}.")
    cells = {
        f"{name}, {setting}": 1 / row["multiplications"]
        for (setting, name), row in found.items()
        if "multiplications" in row
    }
    if cells:
        parts.append(
            "Multiplications are the factored convolution's over the dense one's. Dense over factored, it needs more "
            f"than the dense one {where(cells)}."
        )
    return parts


def over(row: dict, key: str) -> float | None:
    return row[key] / row["error"] if row[key] else None


def shared(rows: list[dict]) -> list[str]:
    """One codebook a layer, a stage, or for the net."""
    parts = head(
        "One codebook for many layers", "CODEWORD_DATA=DATA python benchmarks/shared.py --weights FOLDER", "shared"
    )
    images = sorted({row["images"] for row in rows})
    found = {(row["net"], label(row["method"]), row["codebooks by"]): row for row in rows}
    kinds = list(dict.fromkeys(kind for *_, kind in found))
    parts.append(
        "Files of whole nets, their 3x3 convolutions clustered and nothing retrained: times smaller, SQNR of the "
        f"clustered weights, top-1 on the first {' or '.join(f'{it:,}' for it in images)} test images."
    )
    lines = [
        [
            f"{net}: {method}",
            *(file(found[net, method, kind]) if (net, method, kind) in found else "" for kind in kinds),
        ]
        for net, method in dict.fromkeys((net, method) for net, method, _ in found)
    ]
    parts.append(table(["net: method", *(f"by {kind}" for kind in kinds)], lines))
    for kind in kinds[1:]:
        pairs = [(found[net, method, kinds[0]], row) for (net, method, it), row in found.items() if it == kind]
        saved = [1 - row["bytes"] / own["bytes"] for own, row in pairs]
        lost = [own["top1"] - row["top1"] for own, row in pairs if row["top1"] is not None and own["top1"] is not None]
        cost = f" and cost {min(lost):.2f} to {max(lost):.2f} points of top-1" if lost else ""
        parts.append(
            f"At one setting, codebooks by {kind} save {percent(min(saved))} to {percent(max(saved))} of the "
            f"bytes{cost}."
        )
    return parts + [
        text for score, name in (("sqnr", "SQNR"), ("top1", "top-1")) if (text := beaten(found, score, name))
    ]


def beaten(found: dict[tuple[str, str, str], dict], score: str, name: str) -> str:
    """Which files with shared codebooks lose to one that has a codebook for each layer, whatever its setting."""
    scored = {key: row for key, row in found.items() if row[score] is not None}
    own = [(net, row) for (net, _, kind), row in scored.items() if kind == "layer"]
    joint = {key: row for key, row in scored.items() if key[2] != "layer"}
    lost = [
        f"{net}, {method}, by {kind}"
        for (net, method, kind), row in joint.items()
        if any(net == other and it["bytes"] <= row["bytes"] and it[score] >= row[score] for other, it in own)
    ]
    if not joint:
        return ""
    return (
        f"By {name}, {len(lost)} of {len(joint)} files with shared codebooks are no smaller and no better than one of "
        f"this table with a codebook for each layer{': ' if lost else ''}{listed(lost)}."
    )


def file(row: dict) -> str:
    top1 = "" if row["top1"] is None else f", {row['top1']:.2f} %"
    return f"{row['ratio']:.1f}x, {row['sqnr']:.1f} dB{top1}"
