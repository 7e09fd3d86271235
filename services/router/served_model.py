"""What the router needs of a checkpoint: its limits, and how text becomes token ids and back. No weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import InvalidArgument, ModelError
from common.models.checkpoint import drawn_model_digest, model_digest
from common.models.config import read_model_config
from services.router.chat_template import ChatTemplate
from services.router.generation_config import (
    NO_DEFAULTS,
    DefaultsSource,
    EosSource,
    eos_token_ids,
    read_eos_sources,
    read_sampling_defaults,
)
from services.router.tokenizer import Tokenizer
from services.router.validation import ModelLimits, ValidatedRequest, within

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model that a router serves. Safe to share between threads."""

    limits: ModelLimits
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    digests: frozenset[bytes]  # of workers that serve this very model; empty: nobody can say

    def prompt_ids(self, request: ValidatedRequest) -> Sequence[int]:
        """The prompt as token ids. Takes a while for long text. Raises `InvalidArgument`."""
        if request.token_ids is not None:
            return request.token_ids
        if request.text is not None:
            return self._embedded("text", self.tokenizer.encode(request.text))
        messages = [{"role": role, "content": content} for role, content in request.chat or ()]
        try:
            text = self.chat_template.render(messages, add_generation_prompt=request.add_generation_prompt)
        except InvalidArgument as error:
            raise within("chat", error) from error
        # The template writes the special tokens itself.
        return self._embedded("chat.messages", self.tokenizer.encode(text, add_special_tokens=False))

    def _embedded(self, field: str, ids: list[int]) -> list[int]:
        """The same ids, all of which the model knows."""
        num_known = self.limits.vocab_size
        if self.tokenizer.max_token_id >= num_known and ids and max(ids) >= num_known:
            unknown = next(token_id for token_id in ids if token_id >= num_known)
            limit = (
                f"a token that the model has no embedding for: its id is {unknown}, at most {num_known - 1} are known"
            )
            raise InvalidArgument(field, self.tokenizer.token(unknown), limit)
        return ids


def load_served_model(
    name: str, model_dir: Path, max_message_bytes: int, defaults: DefaultsSource = DefaultsSource.CHECKPOINT
) -> ServedModel:
    """Read the configuration, the tokenizer and the chat template. Raises `ModelError`."""
    config = read_model_config(model_dir)
    tokenizer = Tokenizer.from_directory(model_dir)
    _tell_tokens_without_embedding(tokenizer, config.vocab_size)
    chat_template = ChatTemplate.from_directory(model_dir, tokenizer.special_tokens)
    limits = ModelLimits(
        name=name,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids((*read_eos_sources(model_dir), *_eos_of_tokenizer(tokenizer)), config.vocab_size),
        has_chat_template=bool(chat_template.names),
        max_message_bytes=max_message_bytes,
        special_tokens=tokenizer.special_tokens_below(config.vocab_size),
        defaults=read_sampling_defaults(model_dir) if defaults is DefaultsSource.CHECKPOINT else NO_DEFAULTS,
    )
    return ServedModel(limits, tokenizer, chat_template, _digests(model_dir))


def _eos_of_tokenizer(tokenizer: Tokenizer) -> list[EosSource]:
    """The token that ends turns, where the configuration files name only the end of a text."""
    token = tokenizer.special_tokens.get("eos_token")
    token_id = None if token is None else tokenizer.token_id(token)
    return [] if token_id is None else [EosSource("tokenizer_config.json: eos_token", token, (token_id,))]


def _tell_tokens_without_embedding(tokenizer: Tokenizer, vocab_size: int) -> None:
    num_beyond = tokenizer.max_token_id + 1 - vocab_size
    if num_beyond > 0:
        named = [repr(tokenizer.token(token_id)) for token_id in range(vocab_size, vocab_size + min(num_beyond, 3))]
        more = "" if num_beyond <= 3 else ", ..."
        _logger.warning(
            "%d ids of the tokenizer are beyond the %d embeddings of the model, and prompts with one are refused: %s%s",
            num_beyond,
            vocab_size,
            ", ".join(named),
            more,
        )


def _digests(model_dir: Path) -> frozenset[bytes]:
    """With its weights read or drawn; none for a directory without weights."""
    try:
        return frozenset({model_digest(model_dir), drawn_model_digest(model_dir)})
    except ModelError:
        return frozenset()
