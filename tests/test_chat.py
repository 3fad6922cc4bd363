from __future__ import annotations

import contextlib
import copy
import gc
import os
from importlib import resources
from typing import Any

import numpy as np
import pytest

from deskside.errors import DesksideError
from deskside.text.chat import ChatTemplate

QWEN35 = resources.files("deskside").joinpath("data/qwen35-chat-template.jinja").read_text("utf-8")
USER = {"role": "user", "content": "hi"}
BARE = {"content": "hi"}  # nobody's text, which a template may leave out
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "the <b>weather</b> & more — für dich"},
}
CALL = {"function": {"name": "weather", "arguments": {"town": "Köln", "days": [1, 2], "x": True}}}


@pytest.fixture(scope="module")
def qwen() -> ChatTemplate:
    return ChatTemplate(QWEN35, name="qwen.gguf")


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>", "toy.gguf").render(messages or [BARE], **options)


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
        [{"role": "user", "content": [{"type": "text", "text": "<a & b>"}]}],
        {"enable_thinking": False},
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


# Shapes of messages.

LOOP = "{% for m in messages %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
OPENER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
READS = {
    "text": f"{LOOP}{TURN}{{% endfor %}}{OPENER}",
    "joined text": LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + OPENER,
    "parts": f"{LOOP}{TURN.replace('{{ m.content }}', PARTS)}{{% endfor %}}{OPENER}",
    "parts of the user alone": LOOP
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}"
    + f"{PARTS}{{% else %}}{{{{ m.content | trim }}}}{{% endif %}}<|im_end|>\n"
    + f"{{% endfor %}}{OPENER}",
    "either": LOOP + "<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    f"{{% else %}}{PARTS}{{% endif %}}<|im_end|>\n{{% endfor %}}{OPENER}",
}


@pytest.mark.parametrize("source", READS.values(), ids=READS)
@pytest.mark.parametrize("given", ["a", ["a"], ["a", "b c"]], ids=str)
def test_the_texts_are_in_the_prompt_whichever_shape_of_content_is_read(
    source: str, given: Any
) -> None:
    def content(text: str) -> Any:
        pieces = [text] if isinstance(given, str) else [text + piece for piece in given]
        return text + "a" if pieces == [text] else [{"type": "text", "text": p} for p in pieces]

    whole = "".join(given if isinstance(given, str) else ["a", "sb c"][: len(given)])
    messages = [
        {"role": "system", "content": content("s")},
        {"role": "user", "content": content("s")},
        {"role": "assistant", "content": content("s")},
        {"role": "user", "content": content("s")},
    ]
    turns = "".join(f"<|im_start|>{m['role']}\ns{whole}<|im_end|>\n" for m in messages)
    assert render(source, messages) == turns + "<|im_start|>assistant\n"


def test_a_text_that_is_left_out_is_an_error() -> None:
    system = {"role": "system", "content": "be brief"}
    no_system = LOOP + "{% if m.role != 'system' %}[{{ m.content }}]{% endif %}{% endfor %}"
    assert render(no_system, [USER], add_generation_prompt=False) == "[hi]"
    with pytest.raises(DesksideError, match=r"^toy.gguf: .* leaves out the text of the system's"):
        render(no_system, [system, USER], add_generation_prompt=False)
    with pytest.raises(DesksideError, match="leaves out the text of the user's"):
        render("{{ messages[0].text }}", [USER])
    with pytest.raises(DesksideError, match="leaves out the text of the user's"):
        render("{{ messages[-1].content }}", [USER, {**USER, "content": "other"}])


@pytest.mark.parametrize(
    "written",
    ["m.content | trim", "m.content | tojson", "m.content.split() | join(' ')", "m.content"],
)
def test_a_text_may_be_trimmed_or_encoded(written: str) -> None:
    text = '  say "é\u2028"\n\tto <them>  '
    source = f"{LOOP}[{{% if m.role == 'user' %}}{{{{ {written} }}}}]{{% endif %}}{{% endfor %}}"
    assert render(source, [{"role": "user", "content": text}], add_generation_prompt=False)


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, 7, {"type": "text"}])
def test_parts_other_than_text_are_refused(qwen: ChatTemplate, part: Any) -> None:
    with pytest.raises(DesksideError, match="deskside reads text only"):
        qwen.render([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])


def called(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    function = {"name": "weather", "arguments": arguments}
    call = {"type": "function", "function": function} if not more.pop("flat", False) else function
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [USER, answer, {"role": "tool", "content": "rain"}]


ITERATES = (
    LOOP + "{{ m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    "{{ f.name }}{% for k, v in f.arguments | items %}[{{ k }}={{ v }}]{% endfor %}{% endfor %}"
    "{% endfor %}"
)
WRITES_TEXT = (
    LOOP + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ (c.function or c).arguments }}{% endfor %}{% endfor %}"
)
JOINS_TEXT = WRITES_TEXT.replace("{{ (c.function or c)", "{{ '' + (c.function or c)")
ENCODES = WRITES_TEXT.replace(".arguments }}", ".arguments | tojson }}")


@pytest.mark.parametrize("arguments", ['{"town": "Köln"}', {"town": "Köln"}])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("source", "text"),
    [
        (ITERATES, "hiweather[town=Köln]rain"),
        (WRITES_TEXT, 'hi{"town": "Köln"}rain'),
        (JOINS_TEXT, 'hi{"town": "Köln"}rain'),
        (ENCODES, 'hi{"town": "Köln"}rain'),
    ],
)
def test_arguments_of_a_call_may_be_text_or_an_object(
    source: str, text: str, arguments: Any, flat: bool
) -> None:
    messages = called(arguments, flat=flat)
    before = copy.deepcopy(messages)
    assert render(source, messages) == text
    assert messages == before


@pytest.mark.parametrize("nothing", ["", "  ", "{}", {}, None])
def test_a_call_without_arguments(nothing: Any, qwen: ChatTemplate) -> None:
    assert render(ITERATES, called(nothing)) == "hiweatherrain"
    assert "<function=weather>\n</function>" in qwen.render(called(nothing))


@pytest.mark.parametrize("bad", ["{", "[1]", "7", [1], "[" * 100_000])
def test_arguments_that_are_no_object_are_named(bad: Any, qwen: ChatTemplate) -> None:
    with pytest.raises(DesksideError, match="call of 'weather' are no JSON object"):
        qwen.render(called(bad))


def test_an_opener_that_the_template_leaves_out_is_added() -> None:
    no_turn = f"{LOOP}{TURN}{{% endfor %}}"
    template = ChatTemplate(no_turn, name="toy.gguf")
    with pytest.warns(UserWarning, match=r"toy.gguf: .*assistant's opener; it is added"):
        text = template.render([USER])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render([USER]) == text  # told once
    assert template.render([USER], add_generation_prompt=False) + "<|im_start|>assistant\n" == text


def test_a_format_without_an_opener_gets_none() -> None:
    inst = LOOP + (
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    assert render(inst, [USER]) == "[INST] hi [/INST]"


def test_after_a_fork_both_processes_render() -> None:
    template = ChatTemplate("{{ messages[0].content }}", name="toy.gguf")
    assert template.render([USER]) == "hi"
    with template._lock:  # as if another thread were rendering
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = int(template.render([{"content": "child"}]) != "child")
                del template
                gc.collect()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert template._process.poll() is None
    assert template.render([USER]) == "hi"


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
    assert template.render([BARE]) == "fine"
    with pytest.raises(DesksideError, match="too much time"):
        template.render([BARE], spin=True)
    assert template.render([BARE]) == "fine"


# From a file.


def test_from_metadata() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.bos_token_id": np.uint32(1),
    }
    assert ChatTemplate.from_metadata(metadata, "toy.gguf").render([BARE]) == "b|"


def test_without_a_template_chatml_if_its_tokens_exist() -> None:
    chatml = ChatTemplate.from_metadata({"tokenizer.ggml.tokens": ["<|im_start|>"]}, "toy.gguf")
    assert chatml.render([{"role": "system", "content": "s"}, USER]) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(DesksideError, match=r"^toy.gguf: .*complete instead"):
        ChatTemplate.from_metadata({"tokenizer.ggml.tokens": ["a"]}, "toy.gguf")


def test_an_empty_template_is_none() -> None:
    metadata = {"tokenizer.ggml.tokens": ["<|im_start|>"], "tokenizer.chat_template": " \n"}
    assert "<|im_start|>user\nhi" in ChatTemplate.from_metadata(metadata, "toy.gguf").render([USER])


def test_a_template_that_is_not_text_is_an_error() -> None:
    with pytest.raises(DesksideError, match="must be a string"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 7}, "toy.gguf")
