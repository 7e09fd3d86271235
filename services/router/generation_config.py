"""What a checkpoint says of how it is to be sampled: defaults of requests, tokens that end an output, and what cannot
be done and so is refused.

As in transformers, `generation_config.json` speaks, and `config.json` where there is none. Unlike there, a checkpoint
that says nothing of `do_sample` is drawn from, as servers do; only `do_sample` false makes greedy the default. Pure but
for the reading. Knows no request.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import InvalidArgument, ModelError
from common.sampling import params
from common.sampling.limits import MAX_EOS_TOKEN_IDS
from services.router.checkpoint_files import Json, read_json

GENERATION_CONFIG: Final = "generation_config.json"
MODEL_CONFIG: Final = "config.json"

# Keys that change what transformers generates and that nothing here can do, with the values that change nothing.
_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


class DefaultsSource(enum.StrEnum):
    """Where defaults of sampling come from that a request leaves open."""

    CHECKPOINT = "checkpoint"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What holds where a request says nothing. As they stand here: for a checkpoint that says nothing either."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None  # None: as many as the context allows
    max_length: int | None = None  # the same, prompt included
    min_new_tokens: int = 0
    min_length: int = 0  # the same, prompt included

    def max_tokens(self, num_prompt_tokens: int, room: int) -> int:
        """How long an output may become, at least one token, where the context has this room."""
        of_length = room if self.max_length is None else self.max_length - num_prompt_tokens
        of_output = room if self.max_new_tokens is None else self.max_new_tokens
        return max(1, min(room, of_length, of_output))

    def min_tokens(self, num_prompt_tokens: int, max_tokens: int) -> int:
        """Before how many tokens an output does not end."""
        return min(max_tokens, max(0, self.min_new_tokens, self.min_length - num_prompt_tokens))


NO_DEFAULTS: Final = SamplingDefaults()


@dataclass(frozen=True, slots=True)
class EosSource:
    """A place that names tokens that end an output: `file: key` and what stands there."""

    place: str
    value: object
    token_ids: tuple[int, ...]


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """Raises `ModelError` naming file, key and value if one is out of bounds or asks for what cannot be done."""
    name = GENERATION_CONFIG if (directory / GENERATION_CONFIG).is_file() else MODEL_CONFIG
    return parse_sampling_defaults(name, read_json(directory / name))


def parse_sampling_defaults(file: str, config: Json) -> SamplingDefaults:
    """The pure half of `read_sampling_defaults`."""
    for key, neutral in _UNSUPPORTED.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            limit = " or ".join(["null", *(str(item) for item in neutral)])
            raise _refusal(file, key, value, f"cannot be served, only {limit}; --generation-defaults none ignores it")
    do_sample = config.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise _refusal(file, "do_sample", do_sample, "must be true or false")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: config[name] for name in names if config.get(name) is not None}
    try:
        params.validate(params.SamplingParams(max_tokens=1, seed=0, **sampling), vocab_size=1)  # type: ignore[arg-type]
    except InvalidArgument as error:
        raise _refusal(file, error.field, config[error.field], error.limit) from error
    if do_sample is False:
        sampling["temperature"] = 0.0
    return SamplingDefaults(
        max_new_tokens=_count(file, config, "max_new_tokens", 1),
        max_length=_count(file, config, "max_length", 1),
        min_new_tokens=_count(file, config, "min_new_tokens", 0) or 0,
        min_length=_count(file, config, "min_length", 0) or 0,
        **sampling,  # type: ignore[arg-type]
    )


def read_eos_sources(directory: Path) -> list[EosSource]:
    """What both configuration files say, whose union is served: chat models end turns with more than one token."""
    sources = []
    for name in (GENERATION_CONFIG, MODEL_CONFIG):
        value = read_json(directory / name).get("eos_token_id")
        if value is not None:
            ids = tuple(value) if isinstance(value, list) else (value,)
            if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
                raise _refusal(name, "eos_token_id", value, "neither a token id nor a list of them")
            sources.append(EosSource(f"{name}: eos_token_id", value, ids))
    return sources


def eos_token_ids(sources: Iterable[EosSource], vocab_size: int) -> tuple[int, ...]:
    """All of them, once each. Raises `ModelError` for one that the model cannot draw, and for too many."""
    found: dict[int, None] = {}
    for source in sources:
        for token_id in source.token_ids:
            if token_id >= vocab_size:
                raise _refusal_at(source.place, source.value, f"token ids are from 0 to {vocab_size - 1}")
            found[token_id] = None
        if len(found) > MAX_EOS_TOKEN_IDS:
            raise _refusal_at(source.place, source.value, f"at most {MAX_EOS_TOKEN_IDS} tokens may end an output")
    return tuple(found)


def _count(file: str, config: Json, key: str, lowest: int) -> int | None:
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
        raise _refusal(file, key, value, f"must be an integer from {lowest}")
    return value


def _refusal(file: str, key: str, value: object, limit: str) -> ModelError:
    return _refusal_at(f"{file}: {key}", value, limit)


def _refusal_at(place: str, value: object, limit: str) -> ModelError:
    """One line, in the form of every refusal of a field."""
    return ModelError(str(InvalidArgument(place, value, limit)))
