"""Draws training windows from the encoded shards. It knows token ids and lengths, no model.

Windows start where a document starts, or anywhere in the long ones, so that the model learns to begin cold.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

END_OF_TEXT_ID = 0
Ids = np.ndarray[tuple[int], np.dtype[np.uint16]]


@dataclass(frozen=True, slots=True)
class Stream:
    """An encoded shard: `ids` int64 [num_tokens], and where documents start, int64 [num_documents]."""

    ids: Tensor
    starts: Tensor

    @staticmethod
    def load(path: Path, device: torch.device) -> "Stream":
        """Read a shard written by train_tokenizer onto `device`."""
        raw: Ids = np.load(path, allow_pickle=False)
        ids = torch.from_numpy(raw.astype(np.int64)).to(device)
        ends = (ids == END_OF_TEXT_ID).nonzero().flatten()
        starts = torch.cat((torch.zeros(1, dtype=torch.int64, device=device), ends[:-1] + 1))
        return Stream(ids, starts)

    def window(self, offsets: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets, each int64 [num_offsets, num_tokens]; the stream wraps around."""
        index = offsets[:, None] + torch.arange(num_tokens + 1, device=offsets.device)
        picked = self.ids[index % len(self.ids)]
        return picked[:, :-1], picked[:, 1:]


@dataclass(frozen=True, slots=True)
class Mixture:
    """One kind of batch: how many windows of which length, and the share that each source has."""

    num_windows: int
    num_tokens: int
    chat_share: float
    aligned_share: float  # of the code windows; chat windows always start with a conversation


LONG = Mixture(num_windows=16, num_tokens=4096, chat_share=0.2, aligned_share=0.3)
SHORT = Mixture(num_windows=128, num_tokens=512, chat_share=0.75, aligned_share=1.0)


def draw(mixture: Mixture, code: Stream, chat: Stream, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each int64 [num_windows, num_tokens]. `generator` lives on the streams' device."""
    device = code.ids.device
    size = (mixture.num_windows,)

    def pick(limit: int) -> Tensor:
        return torch.randint(limit, size, generator=generator, device=device)

    def chance(share: float) -> Tensor:
        return torch.rand(size, generator=generator, device=device) < share

    starts = code.starts[pick(len(code.starts))]
    code_offsets = torch.where(chance(mixture.aligned_share), starts, pick(len(code.ids)))
    chat_offsets = chat.starts[pick(len(chat.starts))]
    code_ids, code_targets = code.window(code_offsets, mixture.num_tokens)
    chat_ids, chat_targets = chat.window(chat_offsets, mixture.num_tokens)
    is_chat = chance(mixture.chat_share)[:, None]
    return torch.where(is_chat, chat_ids, code_ids), torch.where(is_chat, chat_targets, code_targets)
