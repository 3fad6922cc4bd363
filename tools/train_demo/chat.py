"""Turn library documentation into chat pairs in ChatML form."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from api import Api
from corpus import words

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are deskside's demo model. Answer briefly.",
    "You answer questions about Python.",
)
# Imperatives that open docstrings; "Return x" can be told as "returns x" and asked as "how do I
# return x".
VERBS = set(
    words(
        "add append apply build call change check clear close compare compile compute "
        "concatenate construct convert copy count create decode decrease delete determine "
        "disable display divide emulate enable encode evaluate execute expand extract fill find "
        "flush format generate get handle increase indicate initialize insert install invoke "
        "iterate join list load lock log look make map merge modify move normalize obtain open "
        "parse perform pop prepare print process produce provide push put raise read receive "
        "record register release remove rename repeat replace report represent request reset "
        "resize resolve restore retrieve return reverse rotate round run save scan search seek "
        "select send serialize set shuffle signal skip sort split start stop store strip submit "
        "substitute swap test transform translate truncate try turn unpack update validate "
        "verify wait wrap write yield"
    )
)
MAX_ANSWER = 600


@dataclass(frozen=True)
class Pair:
    """One question and answer; ``weight`` is how often an epoch repeats it."""

    question: str
    answer: str
    weight: int = 1


def render(turns: Iterable[tuple[str, str]], system: str | None = None) -> str:
    """A whole conversation as the chat template writes it, closed by the end-of-text token."""
    text = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    for question, answer in turns:
        text += f"{TURN_START}user\n{question}{TURN_END}\n"
        text += f"{TURN_START}assistant\n{answer}{TURN_END}\n"
    return text + END_OF_TEXT


def conversations(pairs: list[Pair], rng: random.Random) -> Iterator[str]:
    """Render shuffled pairs: mostly single turns, some with a system prompt or several turns."""
    queue = [pair for pair in pairs for _ in range(pair.weight)]
    rng.shuffle(queue)
    while queue:
        turns = 1 if rng.random() < 0.85 else rng.randint(2, 3)
        chosen = [queue.pop() for _ in range(min(turns, len(queue)))]
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
        yield render([(pair.question, pair.answer) for pair in chosen], system)


def paragraphs(doc: str) -> list[str]:
    """Prose paragraphs of a docstring, unwrapped; indented examples and doctests are dropped."""
    found = []
    for block in re.split(r"\n\s*\n", doc.strip("\n")):
        if not (lines := block.splitlines()):
            continue
        if ">>>" in block or lines[0].startswith(" ") or re.search(r"^[=*~-]{4,}$", block, re.M):
            continue
        is_listing = any(line.startswith((" ", "-", "*")) for line in lines[1:])
        found.append(block if is_listing else " ".join(lines))
    return found


def shorten(text: str, limit: int = MAX_ANSWER) -> str:
    """Cut at the last sentence end before ``limit``; empty if there is none."""
    if len(text) <= limit:
        return text
    cut = max(text.rfind(". ", 0, limit), text.rfind(".\n", 0, limit))
    return text[: cut + 1] if cut > 0 else ""


def third_person(sentence: str) -> str | None:
    """ "Join two paths." to "joins two paths."; None if it does not open with a known verb."""
    word, _, rest = sentence.partition(" ")
    verb = word.lower()
    if rest and verb in VERBS:
        if verb.endswith(("s", "x", "ch", "sh")):
            return f"{verb}es {rest}"
        if verb.endswith("y") and verb[-2] not in "aeiou":
            return f"{verb[:-1]}ies {rest}"
        return f"{verb}s {rest}"
    if rest and verb.endswith("s") and verb[:-1] in VERBS:
        return f"{verb} {rest}"
    return None


def imperative(text: str) -> str | None:
    """The first sentence as a phrase that fits after "How do I"."""
    sentence = re.split(r"[.;:]\s|[.:]$|, (?:and|or|which|with)\b|\(", text, maxsplit=1)[0].strip()
    word, _, rest = sentence.partition(" ")
    verb = word.lower()
    if verb not in VERBS and verb.endswith("s"):
        verb = verb[:-1]
    if verb not in VERBS or not 8 < len(rest) < 80 or verb in ("return", "test", "indicate"):
        if verb != "return" or not 8 < len(rest) < 80:
            return None
        verb = "get"
        if rest.lower().startswith(("true", "false", "none", "whether", "self")):
            return None
    return f"{verb} {rest}"


def describe(api: Api, text: str) -> str:
    told = third_person(text)
    call = f"`{api.name}{api.signature or ''}`"
    if told:
        return f"{call} {told}"
    if api.kind in ("class", "exception", "module"):
        return f"`{api.name}` is a Python {api.kind}. {text}"
    return f"{call}: {text}"


def name_list(names: list[str], limit: int = 16) -> str:
    quoted = [f"`{name}`" for name in names[:limit]]
    if len(names) > limit:
        return ", ".join(quoted) + " and more"
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]


def api_pairs(api: Api) -> Iterator[tuple[str, str]]:
    """Questions and answers about one documented object."""
    prose = paragraphs(api.doc)
    if api.signature is None and prose and re.match(r"[\w.]+\(.*\)( -> .*)?$", prose[0]):
        prose = prose[1:]  # C docstrings open with the signature
    first = shorten(prose[0]) if prose else ""
    if len(first) < 12:
        return
    if api.kind == "module":
        yield from module_pairs(api, first)
        return
    answer = describe(api, first)
    long_answer = answer
    for more in prose[1:3]:
        if len(long_answer) + len(more) < MAX_ANSWER:
            long_answer += f"\n\n{more}"
    call = f"{api.name}()" if api.kind in ("function", "method") else api.name
    yield f"What does {api.name} do?", answer
    yield f"What does {call} do in Python?", answer
    yield f"What is {api.name}?", answer
    yield f"Explain {api.name}.", long_answer
    yield f"Tell me about {api.name}", long_answer
    if api.popular:
        yield f"what does `{call}` do", answer
        yield f"How do I use {api.name}?", long_answer
        yield f"Can you explain {call}?", long_answer
        yield f"Describe the {api.kind} {api.name}.", answer
    if task := imperative(first):
        usage = f"Use `{api.name}{api.signature or ''}`. It {third_person(first)}"
        for question in ("How do I {} in Python?", "How can I {}?", "How to {}"):
            yield question.format(task), usage
        if api.source:
            header = f"{api.name.rpartition('.')[2]}{api.signature}"
            code = f"```python\n{api.source}\n```"
            yield f"Write a Python function `{header}` that {third_person(task)}.", code
            yield f"Write a function to {task}.", code
    if api.source:
        code = f"Here is the source:\n\n```python\n{api.source}\n```"
        yield f"Show me the source of {api.name}.", code
        yield f"How is {api.name} implemented?", code
    yield from signature_pairs(api)
    if api.base and api.kind == "exception":
        yield (
            f"What is the base class of {api.name}?",
            f"`{api.name}` is derived from `{api.base}`.",
        )


def signature_pairs(api: Api) -> Iterator[tuple[str, str]]:
    if not api.parameters:
        return
    required = [name for name, default in api.parameters if default is None]
    optional = [f"`{name}` (default `{d}`)" for name, d in api.parameters if d is not None]
    told = [f"The required arguments are {name_list(required)}."] if required else []
    if optional:
        told.append(f"Optional: {', '.join(optional[:8])}.")
    answer = f"The signature is `{api.name}{api.signature}`. {' '.join(told)}"
    yield f"What are the arguments of {api.name}?", answer
    yield f"What is the signature of {api.name}?", answer
    if api.popular:
        yield f"Which parameters does {api.name} take?", answer


def module_pairs(api: Api, first: str) -> Iterator[tuple[str, str]]:
    told = third_person(first)
    about = (
        f"The `{api.name}` module {told}" if told else f"`{api.name}` is a Python module. {first}"
    )
    yield f"What is the {api.name} module?", about
    yield f"What is the {api.name} module for?", about
    yield f"What does the module {api.name} do?", about
    yield f"What is {api.name}?", about
    yield f"Tell me about the {api.name} module.", about
    if len(api.members) > 1:
        listing = f"The module `{api.name}` contains {name_list(api.members)}."
        yield f"List the functions of module {api.name}.", listing
        yield f"What is in the {api.name} module?", listing
        yield f"Which functions does {api.name} have?", listing
        errors = [name for name in api.members if re.search("(Error|Exception|Warning)$", name)]
        if errors:
            answer = f"The module `{api.name}` defines {name_list(errors)}."
            yield f"Which exceptions does {api.name} define?", answer


def topic_pairs(topics: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Questions about the language itself, from the reference topics and their sections."""
    for topic in topics.values():
        sections = re.split(r"^([^\n]+)\n([*=~-])\2{3,}\n", topic, flags=re.M)
        for heading, body in zip(sections[1::3], sections[3::3], strict=True):
            blocks = [b for b in paragraphs(body) if not b.startswith("[")]
            answer = ""
            for block in blocks[:4]:
                if len(answer) + len(block) > MAX_ANSWER + 200:
                    break
                answer += f"\n\n{block}"
            if len(answer) < 60:
                continue
            subject = re.sub(r'"([^"]*)"', r"`\1`", heading.strip())
            if re.match(r"The ", subject):
                subject = f"the {subject[4:]}"
            else:
                subject = subject[0].lower() + subject[1:]
            for question in (
                "Explain {}.",
                "What is {}?",
                "Explain {} in Python.",
                "Tell me about {}",
                "How does {} work in Python?",
            ):
                yield question.format(subject), answer.strip()
