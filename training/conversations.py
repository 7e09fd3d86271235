"""Turns documented things into short conversations whose answers are the library's own text."""

import random
from collections.abc import Sequence

from training.chat_format import Message
from training.entities import Entity

MAX_DOC_CHARS = 400
MAX_CODE_CHARS = 900
ROUNDS = {"module": 6, "class": 4, "function": 6, "method": 2}
FAMILIAR = frozenset(
    (
        *(
            "",
            "argparse",
            "asyncio",
            "base64",
            "bisect",
            "collections",
            "contextlib",
            "copy",
            "csv",
            "dataclasses",
        ),
        *(
            "datetime",
            "fractions",
            "functools",
            "glob",
            "hashlib",
            "heapq",
            "itertools",
            "json",
            "logging",
            "math",
        ),
        *("operator", "os", "os.path", "pathlib", "pprint", "queue", "random", "re", "shutil", "socket"),
        *("statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "time", "urllib.parse"),
    )
)
"""Modules that people ask about most; the empty name is the builtins. Their conversations are doubled."""

WHAT = {
    "module": ("What does the module {} do?", "What is the module {}?", "What is {}?", "What is {} for?"),
    "class": ("What is {}?", "What does {} do?", "What is the class {} for?", "Explain {}."),
    "function": ("What does {} do?", "What is {}?", "Explain {}.", "What does the function {} do?"),
    "method": ("What does {} do?", "Explain {}."),
}
SIGNATURE = ("What are the arguments of {}?", "What is the signature of {}?", "How do I call {}?")
CODE = ("Show me the code of {}.", "How is {} written?", "Show me the source of {}.")
WHERE = ("Which module has {}?", "Where is {}?", "What do I import for {}?")
SMALL_TALK = {
    "Hello! Ask me about the Python standard library.": ("Hello", "Hello!", "Hi", "Hi there", "Good morning"),
    "I am a small language model, trained on the source text of the Python standard library.": (
        *("Who are you?", "What are you?", "What is your name?"),
    ),
    "I can tell what a function, class or module of the Python standard library does. "
    "I am small, so check what I say.": ("What can you do?", "Help", "How can you help me?"),
    "You are welcome.": ("Thanks", "Thank you", "Thank you!"),
}


def summary(doc: str) -> str:
    """The leading paragraphs of `doc`, as many as fit in MAX_DOC_CHARS; a long first one is cut at a line."""
    kept: list[str] = []
    num_chars = 0
    for paragraph in doc.strip().split("\n\n"):
        num_chars += len(paragraph) + 2
        if kept and num_chars > MAX_DOC_CHARS:
            break
        kept.append(paragraph)
    text = "\n\n".join(kept)
    if len(text) > 2 * MAX_DOC_CHARS:
        text = text[: 2 * MAX_DOC_CHARS].rpartition("\n")[0] or text[: 2 * MAX_DOC_CHARS]
    return text.rstrip()


def _phrase(rng: random.Random, phrases: Sequence[str], name: str) -> str:
    """One wording, sometimes with the name in backquotes, or without capital and final mark."""
    text = rng.choice(phrases).format(f"`{name}`" if rng.random() < 0.15 else name)
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:].rstrip("?.")
    return text


def _exchanges(rng: random.Random, entity: Entity) -> list[tuple[str, str]]:
    """Questions about one thing with their answers; the plain question comes first."""
    pairs = [(_phrase(rng, WHAT[entity.kind], entity.name), summary(entity.doc))]
    if entity.signature and len(entity.signature) < 200:
        pairs.append((_phrase(rng, SIGNATURE, entity.name), f"`{entity.signature}`"))
    if entity.code and len(entity.code) < MAX_CODE_CHARS:
        pairs.append((_phrase(rng, CODE, entity.name), f"```python\n{entity.code}\n```"))
    if entity.kind in ("class", "function") and entity.module:
        short = entity.name.rpartition(".")[2]
        pairs.append((_phrase(rng, WHERE, short), f"`{short}` is in the module `{entity.module}`."))
    return pairs


def about(entity: Entity, seed: int) -> list[list[Message]]:
    """Several conversations about `entity`: most ask what it is, some ask more."""
    rng = random.Random(f"{seed}:{entity.name}")
    conversations = []
    num_rounds = ROUNDS[entity.kind] * (2 if entity.module in FAMILIAR else 1)
    for round_index in range(num_rounds):
        first, *others = _exchanges(rng, entity)
        chosen = [first]
        if others and round_index % 2:
            other = rng.choice(others)
            chosen = [first, other] if rng.random() < 0.5 else [other]
        conversations.append([m for q, a in chosen for m in (Message("user", q), Message("assistant", a))])
    return conversations


def small_talk(seed: int, rounds: int = 40) -> list[list[Message]]:
    """Greetings and questions about the model itself: the only answers that the library did not write."""
    rng = random.Random(f"{seed}:small talk")
    talks = []
    for _ in range(rounds):
        for answer, questions in SMALL_TALK.items():
            talks.append([Message("user", rng.choice(questions)), Message("assistant", answer)])
    return talks
