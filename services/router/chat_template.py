"""A chat's messages to a prompt, by the Jinja template of the checkpoint, in a sandbox.

The template comes with the model and is trusted to be one; the messages are a client's data. Both the input
and the output are bounded, and whatever goes wrong in rendering is the request's fault. The dialect
(filters, globals, the `generation` block) is the one that transformers documents for chat templates. Knows
nothing of tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from common.errors import InvalidArgument, ModelError
from services.router.checkpoint_files import read_json

MAX_MESSAGES: Final = 4096
MAX_RENDERED_CHARS: Final = 16 << 20
MAX_RENDER_S: Final = 5.0

Message = Mapping[str, object]


class ChatTemplate:
    """The templates of one checkpoint. Rendering is synchronous; for a long chat, call it in a thread."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates = {name: _compile(environment, name, text) for name, text in sources.items()}

    @classmethod
    def from_directory(cls, directory: str | Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """Read the checkpoint's templates; none is not an error until one is asked for."""
        return cls(_read_sources(Path(directory)), special_tokens)

    @property
    def names(self) -> tuple[str, ...]:
        """Empty if this model cannot chat. `default` is the template for when none is named."""
        return tuple(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt, special tokens included: encode it with `add_special_tokens=False`.

        `variables` are what the client adds for the template (`enable_thinking` and the like). Raises
        `InvalidArgument` if there is no template, if it refuses the messages, or if the result is too large.
        """
        template = self._pick(name, has_tools=bool(tools))
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise InvalidArgument("messages", len(messages), f"from 1 to {MAX_MESSAGES} messages")
        context = {
            **(variables or {}),
            **self._special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _bounded(template, context)
        except jinja2.exceptions.SecurityError as error:
            raise InvalidArgument("messages", str(error), "unsafe access in the chat template") from error
        except jinja2.exceptions.TemplateError as error:
            raise InvalidArgument("messages", str(error), "refused by the chat template") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            # A template works on what the client sent, so an error of its Python is an error of that.
            raise InvalidArgument("messages", str(error), "do not fit the chat template") from error

    def _pick(self, name: str | None, *, has_tools: bool) -> jinja2.Template:
        if not self._templates:
            raise InvalidArgument("messages", "chat", "this model has no chat template")
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
            if name not in self._templates and len(self._templates) == 1:
                name = next(iter(self._templates))
        if name not in self._templates:
            raise InvalidArgument("chat_template", name, f"must be one of {', '.join(self._templates)}")
        return self._templates[name]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; for a prompt it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


def _compile(environment: jinja2.Environment, name: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateError as error:
        raise ModelError(f"chat template {name!r}: {error}") from error


def _bounded(template: jinja2.Template, context: Mapping[str, object]) -> str:
    """Render piece by piece, within the limits of size and time."""
    deadline = time.monotonic() + MAX_RENDER_S
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate(context):
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise InvalidArgument("messages", num_chars, f"at most {MAX_RENDERED_CHARS} rendered characters")
        if time.monotonic() > deadline:
            raise InvalidArgument("messages", num_chars, f"must render within {MAX_RENDER_S:g} s")
    return "".join(pieces)


def _read_sources(directory: Path) -> dict[str, str]:
    """Templates by name. A chat_template.jinja file wins over what tokenizer_config.json holds."""
    sources: dict[str, str] = {}
    value = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(value, str):
        sources["default"] = value
    elif isinstance(value, list):
        for entry in value:
            if not (isinstance(entry, dict) and {"name", "template"} <= entry.keys()):
                raise ModelError("tokenizer_config.json: an entry of chat_template has no name or no template")
            sources[str(entry["name"])] = str(entry["template"])
    elif value is not None:
        raise ModelError("tokenizer_config.json: chat_template is neither a string nor a list")
    file = directory / "chat_template.jinja"
    if file.is_file():
        sources["default"] = file.read_text(encoding="utf-8")
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        sources[file.stem] = file.read_text(encoding="utf-8")
    return sources


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.now().strftime(format_string)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes HTML characters, which a model never saw in training."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
