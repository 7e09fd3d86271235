"""The chat format of the checkpoint, once: training text and served template are the same Jinja text.

It knows no tokenizer; the special tokens are plain strings here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jinja2.sandbox import ImmutableSandboxedEnvironment

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END_OF_TURN)
"""In id order: 0, 1, 2, 3."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['user', 'assistant'] %}"
    "{{- raise_exception('This model knows the roles user and assistant only, not ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|assistant|>\\n' }}"
    "{%- endif %}"
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is user or assistant."""

    role: str
    content: str


def _raise(message: str) -> None:
    raise ValueError(message)


_ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.globals["raise_exception"] = _raise
_TEMPLATE = _ENVIRONMENT.from_string(CHAT_TEMPLATE)


def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The text that the model sees for `messages`."""
    rendered = [asdict(message) for message in messages]
    return _TEMPLATE.render(messages=rendered, add_generation_prompt=add_generation_prompt)
