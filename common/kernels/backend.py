"""What a kernel backend provides, and which one serves a device. A backend is a module with these functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from common.errors import InvalidArgument
from common.kernels import reference
from common.kernels.batch import KVShape, Span
from common.kernels.attention_reference import BatchPlan
