"""Section of docs/results.md on other methods than scalars, by tensors and in files, of benchmarks/candidates.json."""

from __future__ import annotations

from wording import head

from main_job import table

COMMAND = "CODEWORD_DATA=DATA python benchmarks/candidates.py --weights FOLDER --lenet300 FILE"
RATE_AWARE = ", rate-aware"


def candidates(record: dict) -> list[str]:
    parts = head("What other methods than scalars are worth (`--candidates all`)", COMMAND, "candidates")
    nets = {name: tensors for name, tensors in record.get("tensors", {}).items() if tensors}
    if nets:
        names = dict.fromkeys(name for tensors in nets.values() for it in tensors for name in it["families"])
        parts += [
            "Error of each family of methods over that of rate-aware scalars of as many bits, 0.25 to 8 a weight: the "
            "least over a net's tensors, and which that is. Below 1 the family is better there, and `all` can take it. "
            'Families without "rate-aware" stand for comparison; a plan has them in their rate-aware form.',
            table(["family", *nets], [[it, *(least(tensors, it) for tensors in nets.values())] for it in names]),
            f"Measuring those that a plan is made of took {measuring(nets)}; after that the cache has them.",
        ]
    pairs: dict[tuple[str, str, int], dict[str, dict]] = {}
    for row in record.get("files", []):
        pairs.setdefault((row["net"], row["data"], row["ratio"]), {})[row["candidates"]] = row
    lines = [
        [
            f"{net} {ratio}x",
            "" if data == "none" else data,
            *(f"{pair[kind]['nbytes']:,}" for kind in ("fast", "all")),
            *(f"{pair[kind]['kl']:.2g}" for kind in ("fast", "all")),
            times(pair),
        ]
        for (net, data, ratio), pair in pairs.items()
        if pair.keys() >= {"fast", "all"}
    ]
    if lines:
        parts += [
            "Files of equal bytes by both, and how far their outputs are from the uncompressed net's on 3,000 training "
            "images (Kullback-Leibler, nats an image):",
            table(["net, target", "data", "bytes, fast", "all", "divergence, fast", "all", "all is"], lines),
        ]
    return parts


def least(tensors: list[dict], family: str) -> str:
    """'0.81 (fc1.weight)': on which tensor a family is best beside scalars."""
    found = [(it["families"][family]["factor"], it["tensor"]) for it in tensors if it["families"].get(family)]
    return f"{min(found)[0]:.2f} ({min(found)[1]})" if found else ""


def measuring(nets: dict[str, list[dict]]) -> str:
    """'34 s (lenet5), 120 s (lenet300)'."""
    sums = {
        name: sum(took for it in tensors for family, took in it["seconds"].items() if family.endswith(RATE_AWARE))
        for name, tensors in nets.items()
    }
    return ", ".join(f"{took:.0f} s ({name})" for name, took in sums.items())


def times(pair: dict[str, dict]) -> str:
    fast, everything = (pair[kind]["kl"] for kind in ("fast", "all"))
    if pair["fast"]["nbytes"] == pair["all"]["nbytes"] and fast == everything:
        return "the same"
    return f"{fast / everything:.1f} times nearer" if everything <= fast else f"{everything / fast:.1f} times farther"
