"""Rotary embedding as `config.json` describes it: which of its places transformers obeys, and what is supported.

Settings are in `rope_scaling` (before transformers 5) or `rope_parameters`; where both are, the former is obeyed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from common.models.config_keys import ALL_LAYER_TYPES
from common.models.json_object import JsonObject, is_same

_DEFAULT_THETA: Final = 10000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factor` stretches positions; the last three fields are for `llama3` only."""

    kind: Literal["default", "linear", "llama3"]
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


def parse_rope(config: JsonObject) -> RopeConfig:
    """Raises `ModelError`."""
    settings = _settings(config)
    for key in settings.values:
        if key in ALL_LAYER_TYPES:
            raise settings.refused(key, "settings of single layer types are not supported")
    if not any(is_same(settings.get("partial_rotary_factor", 1.0), whole) for whole in (1.0, 1)):
        raise settings.refused("partial_rotary_factor", "supported is only 1.0")
    theta = _theta(config, settings)
    named = "rope_type" if "rope_type" in settings or "type" not in settings else "type"
    kind = settings.get(named, "default")
    if kind == "default":
        return RopeConfig("default", theta)
    if kind == "linear":
        return RopeConfig("linear", theta, settings.number("factor"))
    if kind == "llama3":
        return _llama3(config, settings, theta)
    raise settings.refused(named, "supported are default, linear, llama3")


def _settings(config: JsonObject) -> JsonObject:
    old, new = config.inner("rope_scaling"), config.inner("rope_parameters")
    if old is not None and old.values:
        return old
    return new if new is not None else JsonObject(config.file, {}, "rope_parameters.")


def _theta(config: JsonObject, settings: JsonObject) -> float:
    """The settings' own, else the one beside them; one in settings that are not obeyed must not be another."""
    inside = "rope_theta" in settings
    theta = settings.number("rope_theta") if inside else config.number("rope_theta", _DEFAULT_THETA)
    passed_over = config.inner("rope_parameters")
    if passed_over is not None and passed_over.values is not settings.values and "rope_theta" in passed_over:
        lost = passed_over.number("rope_theta")
        if lost != theta:
            limit = f"but rope_scaling, which goes before it, is used with rope_theta {theta}: name it in one place"
            raise passed_over.refused("rope_theta", limit)
    return theta


def _llama3(config: JsonObject, settings: JsonObject, theta: float) -> RopeConfig:
    factor = settings.number("factor")
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if high <= low:
        raise settings.refused("high_freq_factor", f"expected more than low_freq_factor, which is {low}")
    original = config.positive("max_position_embeddings")
    # One beside the settings goes before theirs, in this kind alone; but theirs must be a number all the same.
    for place in (settings, config):
        if "original_max_position_embeddings" in place:
            original = place.positive("original_max_position_embeddings")
    return RopeConfig("llama3", theta, factor, low, high, original)
