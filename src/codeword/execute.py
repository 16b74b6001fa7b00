"""Methods times weights: the map from a source to an artifact, with the same bytes for any number of workers."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from codeword.artifact import Artifact, CodedTensor, Writer, code_tensor, tied_tensor
from codeword.cache import Results
from codeword.errors import NonFiniteError, PlanError, WorkerError
from codeword.expr import FLOATS, Affine, Expr, Lookup, Permute, Raw, Reshape, Scatter, Sum, decode, dtype_name, shape
from codeword.math.moments import Moments
from codeword.methods import BuiltIn, Keep, Method
from codeword.methods.base import MomentsMethod, Sample, SharedMethod
from codeword.sources import Source, TensorInfo

# What an error costs: of each weight an array of its shape, or moments of what the rows of the weight multiply.
Cost: TypeAlias = np.ndarray | Moments
Importance: TypeAlias = Mapping[str, Cost]
Progress: TypeAlias = Callable[[int, int, str], None]  # values done, values in all, tensor at work


def run(
    source: Source,
    methods: Mapping[str, Method],
    *,
    seed: int = 0,
    workers: int = 1,
    importance: Importance | None = None,
    keep_nonfinite: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    results: Results | None = None,
) -> Artifact:
    """Compress every tensor by its method and code it. `methods` names each tensor that is not tied.

    results: where coded tensors of this source and importance are kept, and looked for first. Raises NonFiniteError for
    NaN or infinity in a tensor to be clustered, unless keep_nonfinite, which keeps that tensor losslessly.
    """
    own = [info for info in source.infos if info.tied_to is None]
    total, done = sum(info.size for info in own), 0
    methods = bind_groups(source, own, methods, seed, importance or {}, keep_nonfinite=keep_nonfinite)
    jobs = [_Job(info, methods[info.name], seed, (importance or {}).get(info.name), keep_nonfinite) for info in own]
    coded = _coded(source, jobs, workers, results)
    writer, index = Writer(), {}
    for info in source.infos:
        if info.tied_to is not None:
            writer.add(tied_tensor(info.name, info.dtype, info.shape, index[info.tied_to]))
            continue
        if progress is not None:
            progress(done, total, info.name)
        index[info.name] = writer.add(next(coded))
        done += info.size
    if progress is not None:
        progress(total, total, "")
    return writer.finish(dict(metadata or {}))


def load_checked(source: Source, info: TensorInfo, *, keep_nonfinite: bool) -> tuple[np.ndarray, bool]:
    """(weight, whether all its values are finite in float32, where clustering works).

    Raises NonFiniteError if they are not and keep_nonfinite is not given.
    """
    weight = source.load(info.name)
    if info.dtype not in FLOATS:
        return weight, True
    bad = _first_nonfinite(weight)
    if bad is not None and not keep_nonfinite:
        place, value = np.unravel_index(bad, weight.shape), weight.reshape(-1)[bad]
        beyond = ", which float32, where clustering works, cannot hold" if np.isfinite(value) else ""
        raise NonFiniteError(
            f"{source.location}: tensor {info.name!r} holds {value} at {[int(i) for i in place]}{beyond}; "
            "repair it, or keep such tensors losslessly with keep_nonfinite=True (--keep-nonfinite)"
        )
    return weight, bad is None


def bind_groups(
    source: Source,
    infos: Sequence[TensorInfo],
    methods: Mapping[str, Method],
    seed: int,
    importance: Importance,
    *,
    keep_nonfinite: bool,
) -> dict[str, Method]:
    """The methods, those of groups with their common codebooks. Reads the tensors of groups, one at a time."""
    groups: dict[tuple[SharedMethod, str, int], list[TensorInfo]] = {}
    for info in sorted(infos, key=lambda info: info.name):  # whatever their order in the source
        method = methods[info.name]
        if isinstance(method, SharedMethod) and method.shared is not None and info.size:
            with _naming(info.name):
                length = method.vector_length(info.shape)
            groups.setdefault((method, info.kind, length), []).append(info)
    bound = dict(methods)
    for (method, kind, length), members in groups.items():
        label = f"shared:{method.shared}:{kind}:{length}"
        total, samples = sum(info.size for info in members), list[Sample]()
        for info in members:
            weight, finite = load_checked(source, info, keep_nonfinite=keep_nonfinite)
            if finite and not _vanishes(weight):
                generator = tensor_seed(seed, f"{label}:{info.name}")
                with _naming(info.name):
                    h, share = by_weight(importance.get(info.name), info.shape), info.size / total
                    samples.append(method.gather(weight, h, share=share, generator=generator))
        if any(len(sample.vectors) for sample in samples):
            common = method.bind(samples, generator=tensor_seed(seed, label))
            bound |= dict.fromkeys((info.name for info in members), common)
    return bound


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except PlanError as error:
        raise PlanError(f"tensor {name!r}: {error}") from error


def tensor_seed(seed: int, name: str) -> np.random.Generator:
    """The generator of one tensor: a hash of the plan's seed and its name, so that order and workers do not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def compress_tensor(
    source: Source, info: TensorInfo, method: Method, seed: int, importance: Cost | None, keep_nonfinite: bool
) -> CodedTensor:
    """Load, compress and code one tensor; losslessly if its dtype or float32 could not hold its codewords."""
    if isinstance(method, Keep) and method.mantissa_bits is None:
        weight, finite = source.load(info.name), True
    else:
        weight, finite = load_checked(source, info, keep_nonfinite=keep_nonfinite)
    expr = express(weight, method if finite else Keep(), info.name, seed, importance)
    del weight
    return code_tensor(info.name, info.dtype, info.shape, expr)


def express(weight: np.ndarray, method: Method, name: str, seed: int, importance: Cost | None) -> Expr:
    """One tensor by its method, or as it is if its dtype or float32 could not hold its codewords."""
    chosen = Keep() if _vanishes(weight) else method
    # What overflows, and becomes NaN from there, is found below.
    with np.errstate(over="ignore", invalid="ignore"), _naming(name):
        generator = tensor_seed(seed, name)
        if isinstance(importance, Moments) and isinstance(chosen, MomentsMethod):
            expr = chosen.compress_by_moments(weight, importance, generator=generator)
        else:
            expr = chosen.compress(weight, by_weight(importance, weight.shape), generator=generator)
    if shape(expr) != weight.shape:
        raise PlanError(f"tensor {name!r}: {method!r} made shape {shape(expr)} of {weight.shape}")
    if chosen == Keep() or _stays_finite(weight, expr):
        return expr
    return Keep().compress(weight, None, generator=tensor_seed(seed, name))


def by_weight(cost: Cost | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """What a squared error of each weight of that shape costs, of moments the diagonal."""
    return cost.diagonal(shape[0]).reshape(shape) if isinstance(cost, Moments) else cost


class _Job(NamedTuple):
    """What is to be done with one tensor."""

    info: TensorInfo
    method: Method
    seed: int
    importance: Cost | None
    keep_nonfinite: bool


class _Known(NamedTuple):
    """A job whose result may be known. Looked up and kept by one process, whoever codes."""

    job: _Job
    results: Results | None
    key: str | None  # None: not to be kept

    @classmethod
    def of(cls, job: _Job, results: Results | None) -> _Known:
        """Methods of one's own are not kept: they may change without showing it."""
        if results is None or not isinstance(job.method, BuiltIn):
            return cls(job, None, None)
        facts = {"method": job.method, "seed": job.seed, "keep_nonfinite": job.keep_nonfinite}
        return cls(job, results, results.key("coded", job.info, **facts))

    def is_there(self) -> bool:
        """Whether there seems to be a result."""
        return self.results is not None and self.key is not None and self.results.has(self.key)

    def get(self) -> CodedTensor | None:
        """The result, if there is one."""
        return None if self.results is None or self.key is None else self.results.get(self.key, CodedTensor)

    def put(self, coded: CodedTensor) -> CodedTensor:
        """Keeps the result, and returns it."""
        if self.results is not None and self.key is not None:
            self.results.put(self.key, coded, self.job.info.size)
        return coded


def _coded(source: Source, jobs: Sequence[_Job], workers: int, results: Results | None) -> Iterator[CodedTensor]:
    """Coded tensors in order."""
    known = [_Known.of(job, results) for job in jobs]
    if workers <= 1 or sum(not it.is_there() for it in known) < 2:
        for it in known:
            yield it.get() or it.put(compress_tensor(source, *it.job))
        return
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # This is a worker that imports a script without a main guard: a pool that cannot start would wait for ever.
        raise WorkerError('put the work of the script under: if __name__ == "__main__": (workers import the script)')
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (torch, BLAS) can hang
    try:
        with ProcessPoolExecutor(min(workers, len(jobs)), context, _open_in_worker, (source,)) as pool:
            waiting: deque[tuple[_Known, CodedTensor | Future[CodedTensor]]] = deque()
            # A window, not the whole net: finished tensors that wait for their turn take memory.
            for it in known:
                waiting.append((it, it.get() or pool.submit(_in_worker, it.job)))
                if len(waiting) > 2 * workers:
                    yield _ready(*waiting.popleft())
            while waiting:
                yield _ready(*waiting.popleft())
    except BrokenProcessPool as error:
        raise WorkerError(
            f"{source.location}: a worker process of {workers} ended before its work did: out of memory, killed, or "
            "started by a script that does all its work again when it is imported; take fewer workers, or put the "
            'work of the script under: if __name__ == "__main__":'
        ) from error


_source: Source | None = None  # of this worker process


def _open_in_worker(source: Source) -> None:
    global _source  # noqa: PLW0603 - a worker has one source for its life; sending it with each job would copy the net
    _source = source


def _in_worker(job: _Job) -> CodedTensor:
    if _source is None:
        raise PlanError("a worker was given a tensor before its source")
    return compress_tensor(_source, *job)


def _ready(it: _Known, found: CodedTensor | Future[CodedTensor]) -> CodedTensor:
    return found if isinstance(found, CodedTensor) else it.put(found.result())


def _stays_finite(weight: np.ndarray, expr: Expr) -> bool:
    """Whether finite values stay finite: a codeword beside the largest value of a dtype may round to infinity.

    So a mask of 0 and the lowest float32 would become one of 0 and -inf, and a softmax over it NaN.
    """
    if dtype_name(weight.dtype) not in FLOATS or not weight.size:
        return True
    limit = min(float(ml_dtypes.finfo(weight.dtype).max), float(np.finfo(np.float32).max))
    if _bound(expr) < limit / 2:
        return True  # no need to decode
    with np.errstate(over="ignore", invalid="ignore"):
        return _first_nonfinite(decode(expr).astype(weight.dtype, copy=False)) is None


def _bound(expr: Expr) -> float:
    """What no decoded value exceeds in size, from the leaves alone; NaN or infinite where one of them is."""
    match expr:
        case Raw(values):
            return _top(values)
        case Lookup(_, codebook):
            return _top(codebook)
        case Affine(inner, scale, offset):
            scaled = _bound(inner) * (1.0 if scale is None else _top(scale))
            return scaled + (0.0 if offset is None else _top(offset))
        case Sum(terms):
            return sum(map(_bound, terms))
        case Scatter(inner=inner) | Permute(inner) | Reshape(inner):
            return _bound(inner)


def _top(values: np.ndarray) -> float:
    return max(float(values.max()), -float(values.min())) if values.size else 0.0


def _vanishes(weight: np.ndarray) -> bool:
    """Whether float64 values are nothing, or next to nothing, in float32, where clustering works."""
    return dtype_name(weight.dtype) == "float64" and 0 < _top(weight) < float(np.finfo(np.float32).smallest_normal)


def _first_nonfinite(weight: np.ndarray) -> int | None:
    """Flat index of the first value that is not finite in float32, in pieces that stay small."""
    flat = weight.reshape(-1)
    for at in range(0, flat.size, 1 << 20):
        with np.errstate(over="ignore"):
            finite = np.isfinite(flat[at : at + (1 << 20)].astype(np.float32))
        if not finite.all():
            return at + int(np.argmin(finite))
    return None
