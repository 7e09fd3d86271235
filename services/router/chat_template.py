"""A chat's messages to a prompt, by the Jinja template of the checkpoint, in a sandbox.

The template comes with the model and is trusted to be one; the messages are a client's data. Whatever goes wrong in
rendering is the request's fault, but for a template that does not compile. The dialect (filters, globals, the
`generation` block, messages without their null fields) is that of transformers. Size is bounded here; time and memory
are by the process that this runs in (`template_process`). Knows nothing of tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from common.errors import InvalidArgument, ModelError
from services.router.checkpoint_files import read_json

MAX_MESSAGES: Final = 4096
MAX_RENDERED_CHARS: Final = 16 << 20
MAX_RENDER_S: Final = 2.0

Message = Mapping[str, object]


class ChatTemplate:
    """The templates of one checkpoint. Rendering is synchronous, and may take as long as a template likes."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        self.broken: dict[str, str] = {}  # templates that do not compile, and why
        for name, text in sources.items():
            try:
                self._templates[name] = environment.from_string(text)
            except (jinja2.exceptions.TemplateError, SyntaxError, RecursionError, ValueError) as error:
                self.broken[name] = f"chat template {name!r} does not compile: {_one_line(error)}"

    @property
    def names(self) -> tuple[str, ...]:
        """Empty if this model cannot chat. `default` is the template for when none is named."""
        return (*self._templates, *self.broken)

    @property
    def fault(self) -> str:
        """Why chats without tools cannot be rendered although there is a template; else empty."""
        return self.broken.get(self._name(None, has_tools=False), "")

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
        `InvalidArgument` if there is no template, if it refuses the messages, or if the result is too large, and
        `ModelError` if the template does not compile.
        """
        template = self._pick(name, has_tools=bool(tools))
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise InvalidArgument("messages", len(messages), f"from 1 to {MAX_MESSAGES} messages")
        context = {
            **(variables or {}),
            **self._special_tokens,
            "messages": [_message(message) for message in messages],
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
        if not self.names:
            raise InvalidArgument("messages", "chat", "this model has no chat template")
        name = self._name(name, has_tools=has_tools)
        if name in self.broken:
            raise ModelError(self.broken[name])
        if name not in self._templates:
            raise InvalidArgument("chat_template", name, f"must be one of {', '.join(self._templates)}")
        return self._templates[name]

    def _name(self, name: str | None, *, has_tools: bool) -> str:
        if name is not None:
            return name
        name = "tool_use" if has_tools and "tool_use" in self.names else "default"
        return self.names[0] if name not in self.names and len(self.names) == 1 else name


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; for a prompt it is only its content, in a scope
    of its own."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    @staticmethod
    def content(caller: jinja2.runtime.Macro) -> str:
        return caller()


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Computes nothing while it compiles, not even `10 ** 10 ** 10`: compiling takes time by the template's length."""

    def _output_child_to_const(
        self,
        node: jinja2.nodes.Expr,
        frame: jinja2.compiler.Frame,
        finalize: jinja2.compiler.CodeGenerator._FinalizeInfo,
    ) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator


class _Dict:
    """`dict` in templates: what makes one, and no attribute of the type."""

    def __call__(self, pairs: Iterable[tuple[object, object]] = (), **named: object) -> dict[object, object]:
        made = dict(pairs)
        made.update(named)
        return made

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[object, object]:
        return dict.fromkeys(keys, value)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
    }
    environment.globals.update(functions)
    return environment


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


def read_template_sources(directory: Path) -> dict[str, str]:
    """Templates by name; none is no error. A chat_template.jinja file wins over what tokenizer_config.json holds."""
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
    files = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    if (default := directory / "chat_template.jinja").is_file():
        sources["default"] = _read_text(default)
    return sources | {file.stem: _read_text(file) for file in files}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise ModelError(f"{file.name} is not UTF-8: {error}") from error


def _message(message: Message) -> dict[str, object]:
    """Without what is null: templates ask for what is there, and would write `None`."""
    return {key: value for key, value in message.items() if value is not None}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
