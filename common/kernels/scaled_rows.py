"""Rows whose RMSNorm is not finished: the product that reads them divides by their root mean square as it ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """RMSNorm(rows) = values * rsqrt(squares.sum(0) / n + eps), row by row."""

    values: torch.Tensor  # [T, n]: rows * the norm's weight
    squares: torch.Tensor  # [parts, padded T] float32, contiguous: sums of squares, of parts of the rows' columns
    eps: float


# What a product that begins with a norm takes.
NormedRows = torch.Tensor | ScaledRows


def finished(rows: NormedRows) -> torch.Tensor:
    """[T, n], normalised."""
    if isinstance(rows, torch.Tensor):
        return rows
    num_rows, num_columns = rows.values.shape
    mean = rows.squares[:, :num_rows].sum(0) / num_columns
    scale = torch.rsqrt(mean + rows.eps).unsqueeze(1)
    return (rows.values.float() * scale).to(rows.values.dtype)


def values_of(rows: NormedRows) -> torch.Tensor:
    """[T, n], of the type and strides that a product reads, normalised or not."""
    return rows if isinstance(rows, torch.Tensor) else rows.values
