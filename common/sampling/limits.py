"""The bounds of every sampling field, in one place. The router's edge enforces them through
`params.validate`.

This module knows nothing of requests or tensors.
"""

from __future__ import annotations

from typing import Final

MAX_TOKENS: Final = 1 << 20  # the context length is tighter; it is checked where the prompt is known
MAX_TEMPERATURE: Final = 10.0
GREEDY_BELOW_TEMPERATURE: Final = 1e-5  # below this a draw is the argmax to float32 precision, so it is one
MAX_TOP_K: Final = (1 << 31) - 1  # larger than the vocabulary means "off"; clients need not know its size
MAX_ADDITIVE_PENALTY: Final = 2.0  # presence and frequency, either sign
MIN_REPETITION_PENALTY: Final = 0.1
MAX_REPETITION_PENALTY: Final = 10.0
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIAS: Final = 1024  # entries
MAX_LOGIT_BIAS_VALUE: Final = 100.0  # either sign
MAX_STOP_TOKEN_IDS: Final = 64
MAX_EOS_TOKEN_IDS: Final = 64
MAX_CHOICES: Final = 16
MAX_SEED: Final = (1 << 64) - 1
