"""What reads a file: `codeword inspect`, `verify`, `decompress`, `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from codeword import api, console, show
from codeword.cli.options import Against, File, Json, Limit
from codeword.console import reported
from codeword.data import load_data


def inspect(file: File, against: Against = None, as_json: Json = False) -> None:
    """Show what each tensor of a file is and takes; with the original, also how close it is.

    Example: `codeword inspect model.cw --against model.safetensors`
    """
    with reported(as_json), console.working("reading"):
        found = api.inspect(file, against)
    if as_json:
        console.print_json({"file": file, "against": against} | msgspec.to_builtins(found))
        return
    show.inspected(found, compared=against is not None)


def verify(file: File, against: Against = None, as_json: Json = False) -> None:
    """Read every byte of a file and check it; with the original, also names, shapes, dtypes and integers.

    Example: `codeword verify model.cw --against model.safetensors`
    """
    with reported(as_json), console.working("verifying"), api.load(file) as artifact:
        differences = api.verify(artifact, against)
        tensors, nbytes = len(artifact), artifact.nbytes
    if as_json:
        facts = {"file": file, "against": against, "ok": not differences, "tensors": tensors, "nbytes": nbytes}
        console.print_json(facts | {"differences": msgspec.to_builtins(differences)})
    elif not differences:
        compared = f", compared with {against}" if against is not None else ""
        console.say(f"{file}: {tensors} tensors in {nbytes:,} bytes, all checksums right{compared}: verified")
    for found in () if as_json else differences:
        console.say(f"{found.tensor} {found.what}")
    if differences:
        raise typer.Exit(1)


def decompress(
    file: File,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT.safetensors", help="The file to write.")],
    as_json: Json = False,
) -> None:
    """Write the dense net as safetensors, in the dtypes it came with.

    Example: `codeword decompress model.cw -o dense.safetensors`
    """
    with reported(as_json), console.working("decoding"), api.load(file) as artifact:
        console.check_writable(out, file)
        api.decompress(artifact, out)
        facts = {"file": file, "output": out, "nbytes": artifact.nbytes, "output_nbytes": out.stat().st_size}
        facts["tensors"] = len(artifact)
    if as_json:
        console.print_json(facts)
    else:
        console.say(f"{out}: {facts['tensors']} tensors, {facts['output_nbytes']:,} bytes (from {facts['nbytes']:,})")


def evaluate(
    file: Annotated[Path, typer.Argument(metavar="FILE|CHECKPOINT", help="A .cw file, or a checkpoint.")],
    model: Annotated[str, typer.Option(metavar="MODULE:FACTORY", help="The net, such as codeword.zoo:lenet5.")],
    data: Annotated[
        str, typer.Option(metavar="SPEC", help="mnist:test, cifar10:test, digits, npz:PATH ($CODEWORD_DATA).")
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="The uncompressed net, to score on the same images.")
    ] = None,
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Examples at a time.")] = 500,
    mean: Annotated[str | None, typer.Option(metavar="A,B,C", help="Per channel, if the net needs it.")] = None,
    std: Annotated[str | None, typer.Option(metavar="A,B,C", help="Per channel, if the net needs it.")] = None,
    as_json: Json = False,
) -> None:
    """Score a net on labelled data, compressed or not; with the original, both on the same images.

    Example: `codeword eval model.cw --model codeword.zoo:lenet5 --data digits --against model.safetensors`
    """
    options: dict[str, Any] = {"batch_size": batch_size, "mean": _per_channel(mean), "std": _per_channel(std)}
    with reported(as_json), console.working("evaluating"):
        dataset = load_data(data, limit=limit)
        from codeword.nets import load_net

        net = load_net(model, file)
        if against is None:
            score = api.evaluate(net, dataset, **options)
            facts = {"top1": score.top1, "top5": score.top5, "n": score.n, "seconds": score.seconds}
        else:
            from codeword.demo import compare

            found = compare(load_net(model, against), net, dataset, **options)
            facts = {key: value for key, value in msgspec.to_builtins(found).items() if key != "data"}
    facts = {"file": file, "against": against, "nbytes": file.stat().st_size, "data": data} | facts
    if as_json:
        console.print_json(facts)
        return
    if against is not None:
        show.compared(facts)
        return
    top5 = "" if facts["top5"] is None else f", top-5 {facts['top5']:.2f} %"
    console.say(f"{file}: top-1 {facts['top1']:.2f} %{top5} on {facts['n']:,} examples of {data}")
    console.say("add --against CHECKPOINT to score another net, such as the uncompressed one, on the same images")


def _per_channel(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 0.49,0.48,0.45") from None
