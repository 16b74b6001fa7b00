"""Vector methods: neighbouring weights share a vector of values."""

from __future__ import annotations

import math
from typing import Literal

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
    Scales,
    as_rows,
    narrowed,
    row_scales,
    rows_of,
)
from codeword.methods.scalar import round_mantissa


class ProductQuantization(msgspec.Struct, frozen=True, tag_field="method", tag="product", forbid_unknown_fields=True):
    """Product quantization (Gong et al. 2014; methods B1): `cluster_dim` neighbouring weights of a row are one vector.

    cluster_dim: divides the weights of a row (inputs times kernel) or, with one codebook and no row scales, at least
    those of the tensor, which is then one row. granularity "row": each output row is divided by its own scale before
    clustering. group_size: rows that share a codebook, None for all; divides the number of rows. codebook_dtype:
    "int8" is whole numbers and a step. residual_stages: further codebooks, each for the error left by those before.
    skip_zeros: weights that are exactly 0 (pruned) have no say in clustering and stay 0; their places are stored as a
    mask. engine "faiss" trains codebooks with faiss where no importance and no mask weighs the entries.
    """

    cluster_dim: int
    n_clusters: int = 256
    granularity: Granularity = "tensor"
    group_size: int | None = None
    codebook_dtype: CodebookDtype = "int8"
    residual_stages: int = 0
    skip_zeros: bool = False
    engine: Engine = "numpy"

    def __post_init__(self) -> None:
        if not 2 <= self.cluster_dim <= 16:
            raise PlanError(f"product: cluster_dim must lie in 2..16, got {self.cluster_dim}")
        if not 1 <= self.n_clusters <= 1 << 16:
            raise PlanError(f"product: n_clusters must lie in 1..65536, got {self.n_clusters}")
        if self.group_size is not None and self.group_size < 1:
            raise PlanError(f"product: group_size must be at least 1, got {self.group_size}")
        if not 0 <= self.residual_stages <= 8:
            raise PlanError(f"product: residual_stages must lie in 0..8, got {self.residual_stages}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """A Lookup, or the Sum of one a stage, under an Affine of row scales and one of the mask if asked for."""
        rows, h = as_rows(weight), rows_of(importance)
        if not rows.size:
            return Raw(weight)
        if rows.shape[1] % self.cluster_dim:
            rows = self._one_row(rows, weight.shape)
            h = None if h is None else h.reshape(rows.shape)
        if self.group_size and len(rows) % self.group_size:
            raise PlanError(f"product: group_size {self.group_size} does not divide {len(rows)} rows of {weight.shape}")
        scales = row_scales(rows) if self.granularity == "row" else Scales(None, 1.0)
        values = rows.astype(np.float64)
        if scales.relative is not None:
            values /= scales.relative[:, None].astype(np.float64)
        kept = values != 0 if self.skip_zeros else None
        if kept is not None and kept.all():
            kept = None
        if kept is not None:
            h = kept.astype(np.float32) if h is None else np.where(kept, h, 0)
        expr = self._stages(values, h, generator)
        if scales.relative is not None:
            expr = Affine(expr, scales.relative.reshape(-1, 1, 1))
        if kept is not None:
            expr = Affine(expr, kept.astype(np.uint8).reshape(len(rows), -1, self.cluster_dim))
        return Reshape(expr, weight.shape)

    def _one_row(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if rows.size % self.cluster_dim or self.group_size or self.granularity == "row":
            valid = [d for d in range(2, 17) if rows.shape[1] % d == 0]
            raise PlanError(
                f"product: cluster_dim {self.cluster_dim} does not divide the {rows.shape[1]} weights of a row of "
                f"shape {shape}; " + (f"valid are {', '.join(map(str, valid))}" if valid else "no other does either")
            )
        return rows.reshape(1, -1)

    def _stages(self, values: np.ndarray, h: np.ndarray | None, generator: np.random.Generator) -> Expr:
        rows, columns = values.shape
        vectors = values.reshape(rows // (self.group_size or rows), -1, self.cluster_dim)
        weights = None if h is None else h.reshape(vectors.shape)
        terms: list[Expr] = []
        for stage in range(1 + self.residual_stages):
            if stage:
                vectors = vectors - decode(terms[-1]).reshape(vectors.shape).astype(np.float64)
            terms.append(self._stage(vectors, weights, (rows, columns // self.cluster_dim), generator))
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def _stage(
        self, vectors: np.ndarray, h: np.ndarray | None, shape: tuple[int, int], generator: np.random.Generator
    ) -> Expr:
        """Codebooks for vectors (g, m, d), stored as they will be, and then the codes: nearest in what is shipped."""
        weights = [None] * len(vectors) if h is None else list(h)
        books = [
            kmeans_vectors(group, self.n_clusters, generator=generator, importance=weight, engine=self.engine)
            for group, weight in zip(vectors, weights, strict=True)
        ]
        k = max(map(len, books))
        padded = np.stack([np.pad(book, ((0, k - len(book)), (0, 0)), mode="edge") for book in books])
        book, step = narrowed(padded, self.codebook_dtype)
        shipped = book.astype(np.float64) * step
        codes = [assign_vectors(*group).codes for group in zip(vectors, shipped, weights, strict=True)]
        expr = Lookup(np.stack(codes).reshape(len(vectors), -1, shape[1]), book)
        return expr if step == 1 else Affine(expr, np.full((1, 1, 1), step, np.float32))


class KernelTemplates(msgspec.Struct, frozen=True, tag_field="method", tag="templates", forbid_unknown_fields=True):
    """Kernel templates (Chen, Chen & Su 2019; methods B2): each kernel of a convolution is a * template + b.

    Templates are matched whatever their sign. drop_offset: no b, "auto" where its bytes buy more error elsewhere.
    mantissa_bits: of a and b, 0..7; up to 3 they are float8, and need a byte or less in the file. Importance weighs the
    fit of a and b by entry, and the choice of templates by kernel. cluster_dim: kernels of size 1 are taken over as
    many input channels, or the next smaller number that divides theirs. codebook_dtype "int8": templates that a net's
    fine-tuning leaves as they are, while it trains a and b, as in the paper.
    """

    n_templates: int
    drop_offset: bool | Literal["auto"] = "auto"
    mantissa_bits: int = 2
    cluster_dim: int = 9
    codebook_dtype: CodebookDtype = "int8"

    def __post_init__(self) -> None:
        if not 1 <= self.n_templates <= 1 << 16:
            raise PlanError(f"templates: n_templates must lie in 1..65536, got {self.n_templates}")
        if not 0 <= self.mantissa_bits <= 7:
            raise PlanError(f"templates: mantissa_bits must lie in 0..7, got {self.mantissa_bits}")
        if not 4 <= self.cluster_dim <= 64:
            raise PlanError(f"templates: cluster_dim must lie in 4..64, got {self.cluster_dim}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """A Lookup of templates under an Affine of gains and offsets, and one of their unit."""
        if weight.ndim < 3:
            raise PlanError(f"templates: made for kernels of convolutions, not for a tensor of shape {weight.shape}")
        if not weight.size:
            return Raw(weight)
        kernels = weight.reshape(weight.shape[0], -1, self._dim(weight.shape)).astype(np.float64)
        h = np.ones(1) if importance is None or not importance.any() else importance.astype(np.float64)
        h = np.broadcast_to(h if h.size == 1 else h.reshape(kernels.shape), kernels.shape)
        if self.drop_offset == "auto":
            with_offset, without = (self._fit(kernels, h, offset, generator) for offset in (True, False))
            expr = with_offset if _pays(with_offset, without, kernels, h) else without
        else:
            expr = self._fit(kernels, h, not self.drop_offset, generator)
        return Reshape(expr, weight.shape)

    def _dim(self, shape: tuple[int, ...]) -> int:
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

    def _fit(self, kernels: np.ndarray, h: np.ndarray, offset: bool, generator: np.random.Generator) -> Expr:
        """kernels (out, in, d) as unit * (a * template + b)."""
        rows, columns, d = kernels.shape
        w, h = kernels.reshape(-1, d), h.reshape(-1, d)
        mass = h.sum(axis=1, keepdims=True)
        if not mass.all():
            h = np.where(mass > 0, h, 1)  # a kernel of no importance is fitted as any
        shaped = w - w.mean(axis=1, keepdims=True) if offset else w
        weights = np.sqrt(h.mean(axis=1, keepdims=True) / h.mean())
        templates = kernel_templates(shaped * weights, self.n_templates, generator=generator)
        if self.codebook_dtype == "int8":  # gains make up for a template's scale: each uses all the bits
            book = np.rint(127 * templates / np.abs(templates).max(axis=1, keepdims=True)).astype(np.int8)
        else:
            book = templates.astype(DTYPES[self.codebook_dtype])
        shipped = book.astype(np.float64)
        codes = match_templates(shaped, shipped - shipped.mean(axis=1, keepdims=True) if offset else shipped)
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


def _pays(more: Expr, less: Expr, kernels: np.ndarray, h: np.ndarray) -> bool:
    """Whether an expression of more bytes is better than these bytes at the usual 6 dB a bit and weight."""
    extra, log_gain = 0.0, 0.0
    for expr, sign in ((more, 1), (less, -1)):
        extra += sign * 8 * sum(len(encode_leaf(array)[1]) for _, array in leaves(expr))
        sse = float(np.sum(h * np.square(decode(expr).astype(np.float64) - kernels)))
        log_gain -= sign * math.log2(max(sse, 1e-300))
    return log_gain > 2 * extra / kernels.size
