from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np
import pytest

from deskside.errors import DesksideError
from deskside.text.chat import ChatTemplate

QWEN35 = resources.files("deskside").joinpath("data/qwen35-chat-template.jinja").read_text("utf-8")
USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "the <b>weather</b> & more — für dich"},
}
CALL = {"function": {"name": "weather", "arguments": {"town": "Köln", "days": [1, 2], "x": True}}}


@pytest.fixture(scope="module")
def qwen() -> ChatTemplate:
    return ChatTemplate(QWEN35, name="qwen.gguf")


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>", "toy.gguf").render(messages or [USER], **options)


def refused(source: str, **options: Any) -> str:
    with pytest.raises(DesksideError) as caught:
        ChatTemplate(source, name="toy.gguf", seconds=1).render([USER], **options)
    message = str(caught.value)
    assert message.startswith("toy.gguf: the chat template ")
    assert "\n" not in message and len(message) < 400
    return message


# The model's own template.


def test_qwen_system_user_and_thinking(qwen: ChatTemplate) -> None:
    turns = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    messages = [{"role": "system", "content": " be brief\n"}, USER]
    thinks = turns + "<|im_start|>assistant\n<think>\n"
    assert qwen.render(messages) == thinks
    assert qwen.render(messages, enable_thinking=True) == thinks
    assert qwen.render(messages, enable_thinking=False) == thinks + "\n</think>\n\n"
    assert qwen.render(messages, add_generation_prompt=False) == turns


def test_qwen_drops_the_thoughts_before_the_last_question(qwen: ChatTemplate) -> None:
    first = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    last = {"role": "assistant", "content": "no", "reasoning_content": "well"}
    text = qwen.render([USER, first, USER, last], add_generation_prompt=False)
    assert text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nwell\n</think>\n\nno<|im_end|>\n"
    )


def test_qwen_tools_calls_and_results(qwen: ChatTemplate) -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    results = [{"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"}]
    text = qwen.render([USER, calls, *results], tools=[WEATHER])
    assert (  # the tool as one line of plain JSON: no HTML escapes, the order kept
        '<tools>\n{"type": "function", "function": {"name": "weather", '
        '"description": "the <b>weather</b> & more — für dich"}}\n</tools>'
    ) in text
    assert text.endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "<tool_call>\n<function=weather>\n<parameter=town>\nKöln\n</parameter>\n"
        "<parameter=days>\n[1, 2]\n</parameter>\n<parameter=x>\nTrue\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n"
        "<tool_response>\nsun\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "No messages provided."),
        ([{"role": "system", "content": "x"}], "No user query found in messages."),
        ([USER, {"role": "system", "content": "x"}], "System message must be at the beginning."),
        ([USER, {"role": "robot", "content": "x"}], "Unexpected message role."),
    ],
)
def test_qwen_says_what_is_wrong(
    qwen: ChatTemplate, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(DesksideError) as caught:
        qwen.render(messages)
    assert str(caught.value) == f"qwen.gguf: the chat template refuses these messages: {reason}"


CONVERSATIONS = [
    ([USER], {}),
    ([{"role": "system", "content": "s"}, USER], {"tools": [WEATHER]}),
    ([USER, {"role": "assistant", "content": "a", "tool_calls": [CALL, CALL]}], {}),
    (
        [{"role": "user", "content": [{"type": "text", "text": "<a & b>"}, {"type": "image"}]}],
        {"add_vision_id": True, "enable_thinking": False},
    ),
    ([USER, {"role": "assistant", "content": None, "reasoning_content": "r"}, USER], {}),
]


@pytest.mark.external
@pytest.mark.parametrize(("messages", "options"), CONVERSATIONS)
@pytest.mark.parametrize("generation", [True, False])
def test_renders_as_transformers_does(
    qwen: ChatTemplate, messages: list[dict[str, Any]], options: dict[str, Any], generation: bool
) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template(
        [messages], chat_template=QWEN35, add_generation_prompt=generation, **options
    )
    assert qwen.render(messages, add_generation_prompt=generation, **options) == expected[0]


# What templates may use.


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ tools is none }}{{ enable_thinking is defined }}{{ extra }}", "TrueFalse7"),
        ("{{ undefined_name }}", ""),
    ],
)
def test_template_language(source: str, text: str) -> None:
    assert render(source, extra=7) == text


def test_text_of_any_kind_passes_unchanged() -> None:
    content = "\u2028é\x00 😀 <&>\r\n{{ x }}\n"
    assert render("{{ messages[0].content }}", [{"content": content}]) == content


def test_messages_that_are_not_json_are_an_error(qwen: ChatTemplate) -> None:
    with pytest.raises(DesksideError, match="plain JSON"):
        qwen.render([{"role": "user", "content": b"bytes"}])


# A template is a stranger's program.


def test_a_syntax_error_names_file_and_line() -> None:
    with pytest.raises(DesksideError, match=r"^toy.gguf: the chat template has an error on line 2"):
        ChatTemplate("a\n{% if %}", name="toy.gguf")


def test_a_failure_names_file_and_line() -> None:
    assert "failed on line 3" in refused("a\n\n{{ messages.nothing.here }}")


def test_a_refusal_is_one_line() -> None:
    assert refused("{{ raise_exception('no\n way ' * 900) }}").startswith(
        "toy.gguf: the chat template refuses these messages: no way no way"
    )


DOUBLING = (
    "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = STEP %}{% endfor %}"
)

HOSTILE = {
    "escape": "{{ ''.__class__.__mro__ }}",
    "escape unused": "{{ ''.__class__ }}",
    "escape by attr": "{{ ''|attr('__class__') }}",
    "escape by format": "{{ '{0.__class__}'.format('') }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "changes the messages": "{{ messages.append(1) }}",
    "long range": "{% for i in range(10**9) %}a{% endfor %}",
    "silent loop": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "much output": "{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "multiplied": "{{ 'a' * 10**10 }}",
    "power": "{% set n = 9 %}{% set x = 10 ** (10**n) %}",
    "padded": "{{ 'a'.ljust(10**10) }}",
    "formatted": "{{ '%*d' % (10**10, 1) }}",
    "replaced": "{% set a = 'a' * 10**6 %}{{ a.replace('a', a) }}",
    "joined": "{% set a = 'a' * 10**6 %}{{ ([a] * 10**6) | join }}",
    "sliced": "{{ messages | slice(10**9) | list }}",
    "concatenated": DOUBLING.replace("START", "'a'").replace("STEP", "n.x ~ n.x"),
    "nested lists": DOUBLING.replace("START", "[]").replace("STEP", "[n.x, n.x]") + "{{ n.x }}",
    "deep expression": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "long chain": "{{ x" + ".a" * 50_000 + " }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_end_in_one_line(source: str) -> None:
    refused(source)


def test_a_template_that_was_stopped_can_be_used_again() -> None:
    loop = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    template = ChatTemplate("{% if spin %}" + loop + "{% endif %}fine", name="t", seconds=3)
    assert template.render([USER]) == "fine"
    with pytest.raises(DesksideError, match="too much time"):
        template.render([USER], spin=True)
    assert template.render([USER]) == "fine"


# From a file.


def test_from_metadata() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.bos_token_id": np.uint32(1),
    }
    assert ChatTemplate.from_metadata(metadata, "toy.gguf").render([USER]) == "b|"


def test_without_a_template_chatml_if_its_tokens_exist() -> None:
    chatml = ChatTemplate.from_metadata({"tokenizer.ggml.tokens": ["<|im_start|>"]}, "toy.gguf")
    assert chatml.render([{"role": "system", "content": "s"}, USER]) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(DesksideError, match=r"^toy.gguf: .*complete instead"):
        ChatTemplate.from_metadata({"tokenizer.ggml.tokens": ["a"]}, "toy.gguf")


def test_a_template_that_is_not_text_is_an_error() -> None:
    with pytest.raises(DesksideError, match="must be a string"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 7}, "toy.gguf")
