"""Chat templates: the same prompts as transformers renders, and what a template may not do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from common.errors import InvalidArgument, ModelError
from services.router import chat_template
from services.router.chat_template import MAX_MESSAGES, ChatTemplate, read_template_sources

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = 'none' %}
{%- endif %}
<|start|>system<|end|>
{{ system_message }}<|eot|>
{% for message in messages %}
    {% if message['role'] == 'tool' %}{% continue %}{% endif %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
<|start|>{{ message.role }}<|end|>{% generation %}{{ message.content }}<|eot|>{% endgeneration %}
    {% else %}
<|start|>{{ message.role }}<|end|>{{ message.content | trim }}<|eot|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}
"""
TOOLS = """{% set ns = namespace(seen=false) %}
{% if tools %}{% for tool in tools %}{{ tool | tojson(indent=2) }}{{ tool | tojson }}
{% endfor %}{% endif %}
{% for m in messages %}{% if not loop.first %}{{ eos_token }}{% endif %}{% set ns.seen = true %}
{{ m.content if m.content is string else m.content | map(attribute='text') | join(' ') }}
{% endfor %}{{ ns.seen }} {{ strftime_now('%Y') | length }} {{ mode | default('plain') }}"""

CHAT: list[dict[str, object]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Is 1 < 2 & 'ü' > \"u\"? {{ messages }} {% raw %}"},
    {"role": "assistant", "content": "Yes.\n"},
    {"role": "user", "content": " 你好 \U0001f600 "},
]
PARTS: list[dict[str, object]] = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
]
TOOL: list[dict[str, object]] = [
    {"type": "function", "function": {"name": "find", "description": "<é> & co", "parameters": {}}}
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def reference(
    template: str,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None = None,
    add_generation_prompt: bool = True,
    **variables: object,
) -> str:
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    rendered = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    assert isinstance(rendered, str)
    return rendered


def from_directory(directory: Path) -> ChatTemplate:
    return ChatTemplate(read_template_sources(directory), SPECIAL)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "messages"),
    [
        *itertools.product((CHATML, HEADERS, TOOLS), (CHAT, CHAT[1:], CHAT[1:3])),
        (TOOLS, PARTS),
    ],
)
def test_prompt_is_the_one_that_transformers_renders(
    template: str, messages: list[dict[str, object]], add_generation_prompt: bool
) -> None:
    ours = ChatTemplate({"default": template}, SPECIAL).render(messages, add_generation_prompt=add_generation_prompt)
    assert ours == reference(template, messages, add_generation_prompt=add_generation_prompt)


def test_tools_and_variables_reach_the_template_unescaped() -> None:
    ours = ChatTemplate({"default": TOOLS}, SPECIAL).render(CHAT, tools=TOOL, variables={"mode": "deep"})
    assert ours == reference(TOOLS, CHAT, tools=TOOL, mode="deep")
    assert '"description": "<é> & co"' in ours
    assert ours.endswith("deep")


def test_client_variables_cannot_replace_messages_or_special_tokens() -> None:
    template = ChatTemplate({"default": "{{ bos_token }}{{ messages[0].content }}"}, SPECIAL)
    assert template.render(PARTS[:1], variables={"bos_token": "x", "messages": []}).startswith("<s>[")


def test_model_without_a_template_refuses_chat(tmp_path: Path) -> None:
    template = from_directory(tmp_path)
    assert template.names == ()
    with pytest.raises(InvalidArgument, match="this model has no chat template"):
        template.render(CHAT)


def test_refusal_of_the_template_names_its_reason() -> None:
    with pytest.raises(InvalidArgument, match="roles must alternate") as caught:
        ChatTemplate({"default": HEADERS}, SPECIAL).render([CHAT[1], CHAT[1]])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_unsafe_template_is_refused(source: str) -> None:
    with pytest.raises(InvalidArgument, match="chat template"):
        ChatTemplate({"default": source}, SPECIAL).render([{"role": "user", "content": "x"}])


def test_formatting_does_not_reach_behind_a_value() -> None:
    source = "{{ '[{0.__class__}]'.format(messages) }}"
    assert ChatTemplate({"default": source}, SPECIAL).render(CHAT) == "[]"


@pytest.mark.parametrize("source", ["{{ messages[0].content + 1 }}", "{{ messages[9].content }}", "{{ 1 / 0 }}"])
def test_messages_that_do_not_fit_the_template_are_refused(source: str) -> None:
    with pytest.raises(InvalidArgument, match="chat template"):
        ChatTemplate({"default": source}, SPECIAL).render([{"role": "user", "content": "x"}])


def test_number_of_messages_is_bounded() -> None:
    template = ChatTemplate({"default": CHATML}, SPECIAL)
    for messages in ([], [CHAT[1]] * (MAX_MESSAGES + 1)):
        with pytest.raises(InvalidArgument, match=str(MAX_MESSAGES)):
            template.render(messages)


def test_size_of_the_prompt_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    source = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(InvalidArgument, match="rendered characters"):
        ChatTemplate({"default": source}, SPECIAL).render([{"role": "user", "content": "x" * 10}])


def test_time_of_rendering_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", -1.0)
    with pytest.raises(InvalidArgument, match="must render within"):
        ChatTemplate({"default": CHATML}, SPECIAL).render(CHAT)


def test_broken_template_is_an_error_of_the_model_that_leaves_others_alone() -> None:
    template = ChatTemplate({"default": "{% for x in %}", "tool_use": "tools"}, SPECIAL)
    assert template.names == ("tool_use", "default")
    assert template.fault == template.broken["default"]
    with pytest.raises(ModelError, match="'default' does not compile"):
        template.render(CHAT)
    assert template.render(CHAT, tools=TOOL) == "tools"
    assert not ChatTemplate({"default": "plain", "tool_use": "{{"}, SPECIAL).fault


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% generation %}{{ m.role }}{{ loop.index }}{% endgeneration %}{% endfor %}",
        "{% macro say(m) %}{% generation %}{{ m.role }}{% endgeneration %}{% endmacro %}{{ say(messages[0]) }}",
    ],
)
def test_a_generation_block_is_a_scope(source: str) -> None:
    assert ChatTemplate({"default": source}, SPECIAL).render(CHAT) == reference(source, CHAT)


def test_fields_that_are_null_are_not_there() -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": None, "tool_calls": None, "name": "n"}]
    source = (
        "{% for m in messages %}{{ m.content }}|{{ m.name }}|{{ m.tool_calls is defined }}|{{ m | tojson }}{% endfor %}"
    )
    assert (
        ChatTemplate({"default": source}, SPECIAL).render(messages)
        == reference(source, messages)
        == '|n|False|{"role": "user", "name": "n"}'
    )


def test_dictionaries_are_made_as_in_transformers() -> None:
    source = "{% set d = dict(a=1) %}{{ d.a }}{{ dict.fromkeys(['x'], 2) }}{{ dict.__mro__ is defined }}"
    assert ChatTemplate({"default": source}, SPECIAL).render(CHAT) == reference(source, CHAT)


@pytest.mark.parametrize("source", ["{{ 10 ** 10 ** 9 }}", "{{ 'a' | center(10 ** 12) }}", "{{ 'a' * 10 ** 12 }}"])
def test_compiling_computes_nothing(source: str) -> None:
    assert not ChatTemplate({"default": source}, SPECIAL).broken


def test_template_is_chosen_by_name_tools_and_file(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config = {"chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = from_directory(tmp_path)
    assert template.render(CHAT) == "plain"
    assert template.render(CHAT, tools=TOOL) == "tools"
    assert template.render(CHAT, tools=TOOL, name="default") == "plain"
    with pytest.raises(InvalidArgument, match="default, tool_use"):
        template.render(CHAT, name="rag")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert from_directory(tmp_path).render(CHAT) == "<s>file"


def test_template_that_is_neither_text_nor_list_is_an_error_of_the_model(tmp_path: Path) -> None:
    for value in (7, [{"name": "default"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        with pytest.raises(ModelError, match="chat_template"):
            from_directory(tmp_path)
