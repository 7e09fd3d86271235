"""Tensor-parallel groups and how weights and heads are split over ranks."""
