"""What Hugging Face transformers says about the same weights: greedy tokens and log-probabilities in float32."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

PROMPT_LENGTHS = (1, 63, 64, 65, 500, 2000)


class Reference:
    """One checkpoint in transformers. Answers are kept, because several tests ask the same."""

    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.vocab_size = int(self.model.config.vocab_size)
        self._generated: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def prompts(self, lengths: tuple[int, ...], seed: int) -> list[list[int]]:
        """Random token ids, one prompt for each length."""
        source = random.Random(seed)
        return [[source.randrange(self.vocab_size) for _ in range(length)] for length in lengths]

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The next `num_tokens` tokens of greedy decoding, end-of-sequence ignored."""
        key = (tuple(prompt), num_tokens)
        if key not in self._generated:
            with torch.inference_mode():
                out = self.model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    max_new_tokens=num_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            self._generated[key] = [int(token) for token in out[0, len(prompt) :]]
        return self._generated[key]

    def logprobs(self, prompt: list[int], output: list[int]) -> torch.Tensor:
        """Log-probabilities of every token after each output position: [len(output), vocab] float32."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + output])).logits[0]
        return torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)
