"""What the router needs of a checkpoint: its limits, and how text becomes token ids and back. No weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import InvalidArgument, ModelError
from common.models.checkpoint import drawn_model_digest, model_digest
from common.models.checkpoint_files import holds_weights
from common.models.config import ModelConfig, read_model_config
from common.models.weights_check import check_weights
from services.router.chat_template import ChatTemplate, read_template_sources
from services.router.generation_config import (
    NO_DEFAULTS,
    DefaultsSource,
    EosSource,
    eos_token_ids,
    read_eos_sources,
    read_sampling_defaults,
)
from services.router.template_host import TemplateHost
from services.router.tokenizer import Tokenizer
from services.router.validation import ModelLimits, ValidatedRequest, longest_request_bytes, within

_logger = logging.getLogger(__name__)


LONG_TEXT_CHARS = 4096  # above this, tokenising takes long enough to be worth a thread


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model that a router serves."""

    limits: ModelLimits
    tokenizer: Tokenizer
    chats: TemplateHost
    digests: frozenset[bytes]  # of workers that serve this very model; empty: nobody can say

    async def prompt_ids(self, request: ValidatedRequest) -> Sequence[int]:
        """The prompt as token ids. Raises `InvalidArgument`."""
        if request.token_ids is not None:
            return request.token_ids
        if request.text is not None:
            return self._embedded("text", await self._encode(request.text, add_special_tokens=True))
        try:
            text = await self.chats.render(request.chat or (), add_generation_prompt=request.add_generation_prompt)
        except InvalidArgument as error:
            raise within("chat", error) from error
        # The template writes the special tokens itself.
        return self._embedded("chat.messages", await self._encode(text, add_special_tokens=False))

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens)

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
    eos_sources = read_eos_sources(model_dir)
    config = read_model_config(model_dir)
    tokenizer = Tokenizer.from_directory(model_dir)
    _tell_tokens_without_embedding(tokenizer, config.vocab_size)
    sources, chat_fault = _read_templates(model_dir, tokenizer)
    limits = ModelLimits(
        name=name,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids(
            (*eos_sources, *_eos_of_tokenizer(tokenizer, config.vocab_size)), config.vocab_size
        ),
        has_chat_template=bool(sources) and not chat_fault,
        chat_template_fault=chat_fault,
        max_message_bytes=min(max_message_bytes, longest_request_bytes(config.context_length)),
        special_tokens=tokenizer.special_tokens_below(config.vocab_size),
        defaults=read_sampling_defaults(model_dir) if defaults is DefaultsSource.CHECKPOINT else NO_DEFAULTS,
    )
    digests = _digests(model_dir, config)
    chats = TemplateHost(sources, tokenizer.special_tokens)
    return ServedModel(limits, tokenizer, chats, digests)


def _eos_of_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> list[EosSource]:
    """The token that ends turns, where the configuration files name only the end of a text. One that the model cannot
    draw ends nothing, as other tokens without an embedding are in no output."""
    token = tokenizer.special_tokens.get("eos_token")
    token_id = None if token is None else tokenizer.token_id(token)
    return (
        []
        if token_id is None or token_id >= vocab_size
        else [EosSource("tokenizer_config.json: eos_token", token, (token_id,))]
    )


def _read_templates(model_dir: Path, tokenizer: Tokenizer) -> tuple[dict[str, str], str]:
    """By name, and what is wrong with them: a reason to refuse chats, and none to refuse texts."""
    try:
        sources = read_template_sources(model_dir)
        template = ChatTemplate(sources, tokenizer.special_tokens)
    except ModelError as error:
        sources, faults, fault = {}, [str(error)], str(error)
    else:
        faults, fault = list(template.broken.values()), template.fault
    for message in faults:
        _logger.error("chats are refused: %s" if fault else "%s", message)
    return sources, fault


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


def _digests(model_dir: Path, config: ModelConfig) -> frozenset[bytes]:
    """With its weights read or drawn; none for a directory without weights. Raises `ModelError`, as workers would."""
    if not holds_weights(model_dir):
        return frozenset()
    check_weights(model_dir, config)
    return frozenset({model_digest(model_dir), drawn_model_digest(model_dir)})
