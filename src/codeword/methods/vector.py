"""Vector methods: neighbouring weights share a vector of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import ml_dtypes
import msgspec
import numpy as np

from codeword.coding import encode_leaf
from codeword.errors import PlanError
from codeword.expr import DTYPES, Affine, Expr, Lookup, Raw, Reshape, Sum, decode, leaves
from codeword.math.templates import fit_gains, fit_offsets, kernel_templates, match_templates
from codeword.math.vectors import Engine, assign_vectors, kmeans_vectors
from codeword.methods.base import (
    LEAST_FLOAT,
    CodebookDtype,
    Granularity,
    Method,
    Sample,
    as_rows,
    narrowed,
    root_mean_square,
    row_scales,
    rows_of,
)
from codeword.methods.scalar import round_mantissa

_Stored: TypeAlias = tuple[np.ndarray, float]  # codebook (g, k, d) and its step
_Term: TypeAlias = tuple[Lookup, float]  # codewords and their step
_BookOf: TypeAlias = Callable[[np.ndarray, np.ndarray | None], _Stored]  # for vectors (g, m, d) and their importance
_GATHERED = 256  # vectors that a group of tensors gives for a codeword
_MOST_GATHERED = 1 << 24  # values that it gives at all: 64 MB


class ProductQuantization(msgspec.Struct, frozen=True, tag_field="method", tag="product", forbid_unknown_fields=True):
    """Product quantization (Gong et al. 2014; methods B1): `cluster_dim` neighbouring weights of a row are one vector.

    cluster_dim: divides the weights of a row (inputs times kernel) or, with one codebook and no row scales, at least
    those of the tensor, which is then one row. granularity "row": each output row is divided by its own scale before
    clustering. group_size: rows that share a codebook, None for all; divides the number of rows. codebook_dtype:
    "int8" is whole numbers and a step. residual_stages: further codebooks, each for the error left by those before.
    skip_zeros: weights that are exactly 0 (pruned) have no say in clustering and stay 0; their places are stored as a
    mask. engine "faiss" trains codebooks with faiss where no importance and no mask weighs the entries; its bytes may
    differ with its version, the machine and the number of threads, those of "numpy", ours, do not with the threads.
    shared: name of a group, whose tensors of one kind and of equal options have one codebook a stage, stored once. It
    is for weights over the root mean square of their tensor: a relative error counts the same in all of them.
    """

    cluster_dim: int
    n_clusters: int = 256
    granularity: Granularity = "tensor"
    group_size: int | None = None
    codebook_dtype: CodebookDtype = "int8"
    residual_stages: int = 0
    skip_zeros: bool = False
    engine: Engine = "numpy"
    shared: str | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.cluster_dim <= 16:
            raise PlanError(f"product: cluster_dim must lie in 2..16, got {self.cluster_dim}")
        if not 1 <= self.n_clusters <= 1 << 16:
            raise PlanError(f"product: n_clusters must lie in 1..65536, got {self.n_clusters}")
        if self.group_size is not None and self.group_size < 1:
            raise PlanError(f"product: group_size must be at least 1, got {self.group_size}")
        if not 0 <= self.residual_stages <= 8:
            raise PlanError(f"product: residual_stages must lie in 0..8, got {self.residual_stages}")
        if self.shared is not None and self.group_size is not None:
            raise PlanError(
                f"product: shared {self.shared!r} is one codebook for all rows, group_size {self.group_size} one for "
                "each group of them: give one or the other"
            )
        _check_group(self.shared, "product")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """A Lookup, or the Sum of one a stage, under an Affine of row scales and one of the mask if asked for."""
        if not weight.size:
            return Raw(weight)
        parts = self._parts(weight, importance)
        books = (lambda vectors, h: self._codebook(vectors, h, generator),) * (1 + self.residual_stages)
        return self._expr(parts, self._terms(parts, books), weight.shape)

    def vector_length(self, shape: tuple[int, ...]) -> int:
        """cluster_dim, whatever the shape."""
        del shape
        return self.cluster_dim

    def gather(
        self, weight: np.ndarray, importance: np.ndarray | None, *, share: float, generator: np.random.Generator
    ) -> Sample:
        """Vectors of scaled rows, without those that are masked whole."""
        parts = self._parts(weight, importance)
        return _sample(parts.vectors[0], parts.root_mean_square(), parts.weights(0), self.n_clusters, share, generator)

    def bind(self, samples: Sequence[Sample], *, generator: np.random.Generator) -> Method:
        """The method with a codebook for each stage."""
        vectors, h = _pooled(samples)
        books: list[_Stored] = []
        for _ in range(1 + self.residual_stages):
            book, step = self._codebook(vectors[None], None if h is None else h[None], generator)
            books.append((book, step))
            shipped = book[0].astype(np.float64) * step
            vectors = vectors - shipped[assign_vectors(vectors, shipped, h).codes]
        return _BoundProduct(self, tuple(books))

    def _parts(self, weight: np.ndarray, importance: np.ndarray | None) -> _Parts:
        rows, h = as_rows(weight), rows_of(importance)
        if rows.shape[1] % self.cluster_dim:
            rows = self._one_row(rows, weight.shape)
            h = None if h is None else h.reshape(rows.shape)
        if self.group_size and len(rows) % self.group_size:
            raise PlanError(f"product: group_size {self.group_size} does not divide {len(rows)} rows of {weight.shape}")
        scales = row_scales(rows).relative if self.granularity == "row" else None
        values = rows.astype(np.float64)
        if scales is not None:
            values /= scales[:, None].astype(np.float64)
        kept = values != 0 if self.skip_zeros else None
        if kept is not None and kept.all():
            kept = None
        if kept is not None:
            h = kept.astype(np.float32) if h is None else np.where(kept, h, 0)
        vectors = values.reshape(len(rows) // (self.group_size or len(rows)), -1, self.cluster_dim)
        return _Parts(vectors, None if h is None else h.reshape(vectors.shape), scales, kept, rows.shape)

    def _terms(self, parts: _Parts, books: Sequence[_BookOf]) -> list[_Term]:
        """Codes for each codebook in turn, for what those before leave."""
        vectors, columns = parts.vectors, parts.shape[1] // self.cluster_dim
        terms: list[_Term] = []
        for book_of in books:
            if terms:
                vectors = vectors - decode(_stepped(terms[-1])).reshape(vectors.shape).astype(np.float64)
            book, step = book_of(vectors, parts.h)
            shipped = book.astype(np.float64) * step
            weights = [parts.weights(group) for group in range(len(vectors))]
            codes = [assign_vectors(*group).codes for group in zip(vectors, shipped, weights, strict=True)]
            terms.append((Lookup(np.stack(codes).reshape(len(vectors), -1, columns), book), step))
        return terms

    def _expr(self, parts: _Parts, terms: Sequence[_Term], shape: tuple[int, ...]) -> Expr:
        expr = _stepped(terms[0]) if len(terms) == 1 else Sum(tuple(map(_stepped, terms)))
        if parts.scales is not None:
            expr = Affine(expr, parts.scales.reshape(-1, 1, 1))
        if parts.kept is not None:
            expr = Affine(expr, parts.kept.astype(np.uint8).reshape(len(parts.kept), -1, self.cluster_dim))
        return Reshape(expr, shape)

    def _one_row(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if rows.size % self.cluster_dim or self.group_size or self.granularity == "row":
            valid = [d for d in range(2, 17) if rows.shape[1] % d == 0]
            raise PlanError(
                f"product: cluster_dim {self.cluster_dim} does not divide the {rows.shape[1]} weights of a row of "
                f"shape {shape}; " + (f"valid are {', '.join(map(str, valid))}" if valid else "no other does either")
            )
        return rows.reshape(1, -1)

    def _codebook(
        self, vectors: np.ndarray, h: np.ndarray | None, generator: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """(codebook, step) for vectors (g, m, d), as they will be stored: codes are the nearest in what is shipped."""
        weights = [None] * len(vectors) if h is None else list(h)
        books = [
            kmeans_vectors(group, self.n_clusters, generator=generator, importance=weight, engine=self.engine)
            for group, weight in zip(vectors, weights, strict=True)
        ]
        k = max(map(len, books))
        padded = np.stack([np.pad(book, ((0, k - len(book)), (0, 0)), mode="edge") for book in books])
        return narrowed(padded, self.codebook_dtype)


class _Parts(NamedTuple):
    """A weight as product quantization sees it."""

    vectors: np.ndarray  # (g, m, d) float64, of rows over their scales
    h: np.ndarray | None  # (g, m, d) importance, 0 where masked
    scales: np.ndarray | None  # (rows,) float8
    kept: np.ndarray | None  # (rows, columns) bool, None for all
    shape: tuple[int, int]  # rows, columns

    def weights(self, group: int) -> np.ndarray | None:
        """Importance (m, d) of a group's vectors."""
        return None if self.h is None else self.h[group]

    def root_mean_square(self) -> float:
        """Of all entries that are not masked; 0 if all are zero."""
        n = self.vectors.size if self.kept is None else np.count_nonzero(self.kept)
        return math.sqrt(float(np.vdot(self.vectors, self.vectors)) / max(n, 1))


@dataclass(frozen=True, slots=True)
class _BoundProduct:
    """Product quantization with the codebooks of a group: a tensor's own are its codes, its scales and its mask."""

    method: ProductQuantization
    books: tuple[_Stored, ...]  # (1, k, d), for weights of mean square 1

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """As the method itself, but that codebooks are given; steps are those of the group times the tensor's scale.

        A last fit of the scale, by least squares, makes up for what a tensor differs in from the others.
        """
        del generator
        parts = self.method._parts(weight, importance)
        unit = parts.root_mean_square()
        most = float(np.finfo(np.float32).max)
        scaled = [(book, float(np.float32(min(step * unit, most)))) for book, step in self.books]
        terms = self.method._terms(parts, [lambda *_, found=found: found for found in scaled])
        found = sum(decode(_stepped(term)).astype(np.float64).reshape(parts.vectors.shape) for term in terms)
        weighted = found if parts.h is None else found * parts.h
        energy = float(np.vdot(weighted, found))
        factor = float(np.vdot(weighted, parts.vectors)) / energy if energy else 1.0
        return self.method._expr(parts, [(lookup, step * factor) for lookup, step in terms], weight.shape)


def _stepped(term: _Term) -> Expr:
    lookup, step = term
    return lookup if step == 1 else Affine(lookup, np.full((1, 1, 1), step, np.float32))


def _check_group(shared: str | None, method: str) -> None:
    if shared == "":
        raise PlanError(f"{method}: shared must be the name of a group, got ''; leave it out for a codebook each")


def _sample(
    vectors: np.ndarray,
    unit: float,
    h: np.ndarray | None,
    k: int,
    share: float,
    generator: np.random.Generator,
) -> Sample:
    """A share of what k codewords want: of vectors (n, d) over the unit, none if that is 0, and importance (n, d)."""
    n, d = vectors.shape if unit else (0, vectors.shape[1])
    if h is not None and not h.any():
        h = None
    candidates = np.arange(n) if h is None else np.flatnonzero(np.any(h[:n], axis=1))
    count = min(len(candidates), math.ceil(share * min(_GATHERED * k, _MOST_GATHERED // d)))
    some = candidates[np.sort(generator.choice(len(candidates), count, replace=False))]
    importance = None if h is None else (h[some] / np.mean(h[h > 0], dtype=np.float64)).astype(np.float32)
    return Sample((vectors[some] / (unit or 1)).astype(np.float32), importance)


def _pooled(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors (n, d) and importance (n, d) of all samples."""
    vectors = np.concatenate([sample.vectors for sample in samples])
    if all(sample.importance is None for sample in samples):
        return vectors, None
    each = (np.ones_like(s.vectors) if s.importance is None else s.importance for s in samples)
    return vectors, np.concatenate(list(each))


class KernelTemplates(msgspec.Struct, frozen=True, tag_field="method", tag="templates", forbid_unknown_fields=True):
    """Kernel templates (Chen, Chen & Su 2019; methods B2): each kernel of a convolution is a * template + b.

    Templates are matched whatever their sign. drop_offset: no b, "auto" where its bytes buy more error elsewhere.
    mantissa_bits: of a and b, 0..7; up to 3 they are float8, and need a byte or less in the file. Importance weighs the
    fit of a and b by entry, and the choice of templates by kernel. cluster_dim: kernels of size 1 are taken over as
    many input channels, or the next smaller number that divides theirs. codebook_dtype "int8": templates that a net's
    fine-tuning leaves as they are, while it trains a and b, as in the paper. shared: name of a group, whose tensors of
    one kind, of equal options and kernels of one size have one codebook, stored once: strong kernels of a layer count
    for more in it, but not those of strong layers. drop_offset "auto" then decides for all of them.
    """

    n_templates: int
    drop_offset: bool | Literal["auto"] = "auto"
    mantissa_bits: int = 2
    cluster_dim: int = 9
    codebook_dtype: CodebookDtype = "int8"
    shared: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.n_templates <= 1 << 16:
            raise PlanError(f"templates: n_templates must lie in 1..65536, got {self.n_templates}")
        if not 0 <= self.mantissa_bits <= 7:
            raise PlanError(f"templates: mantissa_bits must lie in 0..7, got {self.mantissa_bits}")
        if not 4 <= self.cluster_dim <= 64:
            raise PlanError(f"templates: cluster_dim must lie in 4..64, got {self.cluster_dim}")
        _check_group(self.shared, "templates")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """A Lookup of templates under an Affine of gains and offsets, and one of their unit."""
        if weight.ndim > 2 and not weight.size:
            return Raw(weight)
        kernels, h = self._kernels(weight, importance)
        if self.drop_offset == "auto":
            books = {offset: self._codebook(kernels, h, offset, generator) for offset in (True, False)}
            with_offset, without = (self._fit(kernels, h, *item) for item in books.items())
            expr = with_offset if _pays(with_offset, without, kernels, h) else without
        else:
            offset = not self.drop_offset
            expr = self._fit(kernels, h, offset, self._codebook(kernels, h, offset, generator))
        return Reshape(expr, weight.shape)

    def gather(
        self, weight: np.ndarray, importance: np.ndarray | None, *, share: float, generator: np.random.Generator
    ) -> Sample:
        """Kernels, whole."""
        kernels, h = self._kernels(weight, importance)
        d = kernels.shape[2]
        unit = root_mean_square(kernels.reshape(-1, d)) if kernels.any() else 0.0
        weights = None if importance is None else h.reshape(-1, d)
        return _sample(kernels.reshape(-1, d), unit, weights, self.n_templates, share, generator)

    def bind(self, samples: Sequence[Sample], *, generator: np.random.Generator) -> Method:
        """The method with its templates."""
        vectors, h = _pooled(samples)
        kernels = vectors[:, None].astype(np.float64)
        weights = np.broadcast_to(1.0, kernels.shape) if h is None else h[:, None].astype(np.float64)
        choices = (True, False) if self.drop_offset == "auto" else (not self.drop_offset,)
        found = [
            _BoundTemplates(self, offset, self._codebook(kernels, weights, offset, generator)) for offset in choices
        ]
        if len(found) == 1:
            return found[0]
        with_offset, without = (self._fit(kernels, weights, bound.offset, bound.book) for bound in found)
        return found[0] if _pays(with_offset, without, kernels, weights) else found[1]

    def _kernels(self, weight: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Kernels (out, in, d) and their importance, float64."""
        d = self.vector_length(weight.shape)
        kernels = weight.reshape(weight.shape[0], -1, d).astype(np.float64)
        h = np.ones(1) if importance is None or not importance.any() else importance.astype(np.float64)
        return kernels, np.broadcast_to(h if h.size == 1 else h.reshape(kernels.shape), kernels.shape)

    def vector_length(self, shape: tuple[int, ...]) -> int:
        """Weights of a kernel, or of as many kernels of size 1 as are taken together."""
        if len(shape) < 3:
            raise PlanError(f"templates: made for kernels of convolutions, not for a tensor of shape {shape}")
        size = math.prod(shape[2:])
        if size > 1:
            return size
        valid = [d for d in range(4, self.cluster_dim + 1) if shape[1] % d == 0]
        if not valid:
            raise PlanError(
                f"templates: no number from 4 to cluster_dim {self.cluster_dim} divides the {shape[1]} input channels "
                f"of a kernel of size 1, shape {shape}"
            )
        return valid[-1]

    def _codebook(self, kernels: np.ndarray, h: np.ndarray, offset: bool, generator: np.random.Generator) -> np.ndarray:
        """Templates (k, d) for kernels (out, in, d), as they will be stored."""
        w, h = _flat(kernels, h)
        weights = np.sqrt(h.mean(axis=1, keepdims=True) / h.mean())
        templates = kernel_templates(_shaped(w, offset) * weights, self.n_templates, generator=generator)
        if self.codebook_dtype == "int8":  # gains make up for a template's scale: each uses all the bits
            return np.rint(127 * templates / np.abs(templates).max(axis=1, keepdims=True)).astype(np.int8)
        return templates.astype(DTYPES[self.codebook_dtype])

    def _fit(self, kernels: np.ndarray, h: np.ndarray, offset: bool, book: np.ndarray) -> Expr:
        """kernels (out, in, d) as unit * (a * template + b)."""
        rows, columns, _ = kernels.shape
        w, h = _flat(kernels, h)
        shipped = book.astype(np.float64)
        codes = match_templates(_shaped(w, offset), _shaped(shipped, offset))
        matched = shipped[codes]
        gains = fit_gains(w, matched, h, offset=offset)
        unit = self._unit(max(float(np.abs(gains).max()), float(np.abs(w).max()) if offset else 0.0))
        a = self._rounded(gains / unit)
        b = self._rounded(fit_offsets(w, matched, h, a.astype(np.float64) * unit) / unit) if offset else None
        each = (rows, columns, 1)
        lookup = Lookup(codes.reshape(1, rows, columns), book[None])
        expr = Affine(lookup, a.reshape(each), None if b is None else b.reshape(each))
        return expr if unit == 1 else Affine(expr, np.full((1, 1, 1), unit, np.float32))

    def _unit(self, top: float) -> float:
        """The power of two that places the largest value below, but not far below, the largest of the dtype."""
        room = (15, 8, 2)[(self.mantissa_bits > 2) + (self.mantissa_bits > 3)]
        return max(2.0 ** (math.floor(math.log2(top)) + 2 - room), LEAST_FLOAT) if top > 0 else 1.0

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        dtype = "float8_e5m2" if self.mantissa_bits < 3 else "float8_e4m3" if self.mantissa_bits == 3 else "bfloat16"
        most = float(ml_dtypes.finfo(DTYPES[dtype]).max)
        rounded = round_mantissa(values.astype(np.float32), self.mantissa_bits)
        return np.clip(rounded, -most, most).astype(DTYPES[dtype])


@dataclass(frozen=True, slots=True)
class _BoundTemplates:
    """Kernel templates with the codebook of a group."""

    method: KernelTemplates
    offset: bool
    book: np.ndarray  # (k, d)

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """As the method itself, but that templates are given."""
        del generator
        return Reshape(
            self.method._fit(*self.method._kernels(weight, importance), self.offset, self.book), weight.shape
        )


def _flat(kernels: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kernels and importance as (n, d); a kernel of no importance is fitted as any."""
    w, h = kernels.reshape(-1, kernels.shape[2]), h.reshape(-1, kernels.shape[2])
    mass = h.sum(axis=1, keepdims=True)
    return w, h if mass.all() else np.where(mass > 0, h, 1)


def _shaped(kernels: np.ndarray, offset: bool) -> np.ndarray:
    """Kernels (n, d) without what an offset takes over."""
    return kernels - kernels.mean(axis=1, keepdims=True) if offset else kernels


def _pays(more: Expr, less: Expr, kernels: np.ndarray, h: np.ndarray) -> bool:
    """Whether an expression of more bytes is better than these bytes at the usual 6 dB a bit and weight."""
    extra, log_gain = 0.0, 0.0
    for expr, sign in ((more, 1), (less, -1)):
        extra += sign * 8 * sum(len(encode_leaf(array)[1]) for _, array in leaves(expr))
        sse = float(np.sum(h * np.square(decode(expr).astype(np.float64) - kernels)))
        log_gain -= sign * math.log2(max(sse, 1e-300))
    return log_gain > 2 * extra / kernels.size
