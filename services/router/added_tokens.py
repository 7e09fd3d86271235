"""Which tokens a checkpoint adds to its vocabulary, and which of them are special and so no text: several files say it,
and where they disagree the answer is that of transformers.

`added_tokens_decoder` of tokenizer_config.json, where there is one, overrides the flags that tokenizer.json gives, and
special_tokens_map.json and added_tokens.json are not read; without it they are. A token with a role (`bos_token`, any
`..._token`) that no file lists is added as special; one that is listed keeps its flags. Knows no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import tokenizers

from common.errors import InvalidArgument, ModelError
from services.router.checkpoint_files import Json, read_json

CONFIG: Final = "tokenizer_config.json"
_ROLES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")


Token: TypeAlias = str | tokenizers.AddedToken  # without flags of its own, or with


@dataclass(frozen=True, slots=True)
class ListedTokens:
    """What the files list."""

    added: tuple[tuple[int, tokenizers.AddedToken], ...]  # with the ids that they must have
    added_by: str  # the file that gives these ids
    by_role: Mapping[str, Token]
    extra: tuple[Token, ...]

    def roles(self) -> dict[str, str]:
        """Tokens by role: {"bos_token": "<s>", ...}, as chat templates want them."""
        return {role: _text(token) for role, token in self.by_role.items()}


def read_listed_tokens(directory: Path, tokenizer_json: Json) -> ListedTokens:
    """Read the files beside tokenizer.json. Raises `ModelError`."""
    config = dict(read_json(directory / CONFIG))
    own_roles = _pop_own_roles(config)
    is_listed_with_ids = "added_tokens_decoder" in config
    if not is_listed_with_ids:
        _merge_special_tokens_map(config, read_json(directory / "special_tokens_map.json"), own_roles)
    extra = _extra(config)
    if is_listed_with_ids:
        added = _by_id(config["added_tokens_decoder"])
    else:
        added = _by_id_of_older_files(
            read_json(directory / "added_tokens.json"), tokenizer_json, _named_plainly(config)
        )
    padding = tokenizer_json.get("padding")
    if isinstance(padding, dict):
        config.setdefault("pad_token", padding.get("pad_token"))
    return ListedTokens(
        added=tuple(added),
        added_by=CONFIG if is_listed_with_ids else "added_tokens.json",
        by_role=_by_role(config, own_roles, {token.content: token for _, token in added}),
        extra=tuple(_token(CONFIG, "extra_special_tokens", value) for value in extra),
    )


def add_listed_tokens(backend: tokenizers.Tokenizer, listed: ListedTokens) -> None:
    """Add what the files list to tokenizer.json's vocabulary. Raises `ModelError` if an id cannot be kept."""
    tokens: list[Token] = [token for _, token in listed.added]
    present = {_text(token) for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
    for token in (*listed.by_role.values(), *listed.extra):
        if _text(token) not in present and token not in tokens:
            tokens.append(token)
    named = {_text(token) for token in listed.by_role.values()}
    backend.add_tokens([_with_flags(token, named) for token in tokens])
    for token_id, token in listed.added:
        if token.content and backend.token_to_id(token.content) != token_id:
            raise ModelError(f"{listed.added_by}: {token.content!r} cannot have the id {token_id}")


def special_token_ids(backend: tokenizers.Tokenizer, anchor: int) -> frozenset[int]:
    """The added tokens that decoding leaves out. Asked of the decoder: a token once special stays so in the library,
    whatever its flags say later. `anchor` is a token with a text."""
    alone = backend.decode([anchor])
    return frozenset(
        token_id
        for token_id in backend.get_added_tokens_decoder()
        if backend.decode([anchor, token_id]) == alone
        and backend.decode([anchor, token_id], skip_special_tokens=False) != alone
    )


def _pop_own_roles(config: dict[str, object]) -> dict[str, object]:
    """Roles of this model alone, such as `image_token`, once the old name of the list of tokens is the new one."""
    if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    own = [key for key in config if key.endswith("_token") and key not in _ROLES and isinstance(config[key], str)]
    roles = {key: config.pop(key) for key in own}
    if isinstance(config.get("extra_special_tokens"), dict):
        roles.update(_object(config.pop("extra_special_tokens")))
    return roles


def _merge_special_tokens_map(
    config: dict[str, object], special_tokens_map: Json, own_roles: dict[str, object]
) -> None:
    for key, value in special_tokens_map.items():
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = {**value, "special": True}
        elif key == "extra_special_tokens" and isinstance(value, list):
            listed = config.get(key)
            before = list(listed) if isinstance(listed, list) else []
            value = [*before, *(token for token in value if token not in before)]
        config[key] = value
    if isinstance(config.get("extra_special_tokens"), dict):
        own_roles.update(_object(config.pop("extra_special_tokens")))


def _named_plainly(config: Json) -> set[str | None]:
    """The tokens whose entries in added_tokens.json are special: objects of tokenizer_config.json do not count."""
    extra = config.get("extra_special_tokens")
    named = [*(config.get(role) for role in _ROLES), *(extra if isinstance(extra, list) else ())]
    return {_content(value) for value in named if not (isinstance(value, dict) and "__type" in value)}


def _extra(config: Json) -> list[object]:
    listed = config.get("extra_special_tokens", config.get("additional_special_tokens"))
    if listed is not None and not isinstance(listed, list):
        raise _refusal("extra_special_tokens", listed, "must be a list or an object")
    return listed or []


def _by_role(config: Json, own_roles: Json, known: Mapping[str, tokenizers.AddedToken]) -> dict[str, Token]:
    """In the order in which they get ids, if they are new."""
    found: dict[str, Token | None] = dict.fromkeys(_ROLES)
    for role in _ROLES:
        content = _content(config.get(role))
        if content is not None:
            found[role] = known.get(content) or _token(CONFIG, role, config[role])
    others = {key: value for key, value in config.items() if key.endswith("_token") and key not in _ROLES}
    for role, value in (others | dict(own_roles)).items():
        if _content(value) is not None:
            found[role] = _token(CONFIG, role, value)
    return {role: token for role, token in found.items() if token is not None}


def _by_id(listed: object) -> list[tuple[int, tokenizers.AddedToken]]:
    if not isinstance(listed, dict):
        raise _refusal("added_tokens_decoder", listed, "must be an object")
    if bad := [key for key in listed if not key.isdecimal()]:
        raise _refusal("added_tokens_decoder", bad[0], "must be a token id")
    entries = [(int(key), _added_token(CONFIG, f"added_tokens_decoder.{key}", value)) for key, value in listed.items()]
    return sorted(entries, key=lambda entry: entry[0])


def _by_id_of_older_files(
    added_tokens: Json, tokenizer_json: Json, special: set[str | None]
) -> list[tuple[int, tokenizers.AddedToken]]:
    found: dict[int, tokenizers.AddedToken] = {}
    for content, token_id in added_tokens.items():
        if not isinstance(token_id, int):
            raise ModelError(str(InvalidArgument(f"added_tokens.json: {content}", token_id, "must be a token id")))
        is_special = content in special
        found[token_id] = tokenizers.AddedToken(content, normalized=not is_special, special=is_special)
    listed = tokenizer_json.get("added_tokens")
    for entry in listed if isinstance(listed, list) else ():
        found[entry["id"]] = _added_token("tokenizer.json", "added_tokens", entry)
    return sorted(found.items(), key=lambda entry: entry[0])


def _content(token: object) -> str | None:
    """The text of a token that is written as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _text(token: Token) -> str:
    return token if isinstance(token, str) else token.content


def _with_flags(token: Token, named: AbstractSet[str]) -> tokenizers.AddedToken:
    """A token without flags is special; so is one that has a role, whatever its flag says."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    if token.content in named:
        token.special = True
    return token


def _token(file: str, key: str, value: object) -> Token:
    return value if isinstance(value, str) else _added_token(file, key, value)


def _added_token(file: str, key: str, value: object) -> tokenizers.AddedToken:
    content = _content(value)
    if content is None or not isinstance(value, dict):
        raise ModelError(str(InvalidArgument(f"{file}: {key}", value, "must be a token, an object with `content`")))
    return tokenizers.AddedToken(content, **{flag: bool(value[flag]) for flag in _FLAGS if flag in value})


def _object(value: object) -> Json:
    assert isinstance(value, dict)
    return value


def _refusal(key: str, value: object, limit: str) -> ModelError:
    return ModelError(str(InvalidArgument(f"{CONFIG}: {key}", value, limit)))
