"""Writes the training text: the standard library's sources, and conversations made from its docstrings.

The same Python gives the same bytes. Whole files are held out for validation, chosen by a hash of their path.
Run: python -m training.build_corpus --out build/corpus
"""

import argparse
import hashlib
import json
import random
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from training.chat_format import render
from training.conversations import about, small_talk
from training.entities import Entity, in_c_modules, in_source, reexports

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
"""Tests, and tables (code pages, the help text as one literal) that would teach no Python."""
ONE_IN_VALIDATION = 40


def source_files(root: Path) -> list[PurePosixPath]:
    """Sorted paths of the sources under `root`, without build-time data (it names the building machine)."""
    found = []
    for path in root.rglob("*.py"):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        generated = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
        if not generated and not SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            found.append(relative)
    return sorted(found)


def is_held_out(path: PurePosixPath) -> bool:
    """Whether `path` belongs to validation; depends on nothing but the path."""
    return int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4], "big") % ONE_IN_VALIDATION == 0


def read_source(path: Path) -> str:
    """The text of a source file in the encoding that it declares."""
    with tokenize.open(path) as file:
        return file.read()


def write_shard(path: Path, texts: Sequence[str]) -> None:
    """One JSON string a line."""
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    print(f"{path}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.2f} M characters")


def conversations(entities: Sequence[Entity], seed: int) -> list[str]:
    """Rendered conversations about `entities`, in a shuffled but fixed order."""
    unique = {(entity.name, entity.doc): entity for entity in entities}
    texts = [render(talk) for entity in unique.values() for talk in about(entity, seed)]
    random.Random(seed).shuffle(texts)
    return texts


def build(root: Path, out: Path, seed: int) -> None:
    """Write four shards into `out`: code and chat, each for training and validation."""
    out.mkdir(parents=True, exist_ok=True)
    files = source_files(root)
    lifted = reexports(root, files)
    code: dict[bool, list[str]] = {False: [], True: []}
    entities: dict[bool, list[Entity]] = {False: list(in_c_modules()), True: []}
    for path in files:
        source = read_source(root / path)
        held_out = is_held_out(path)
        if source.strip():
            code[held_out].append(f"# {path}\n{source}")
        entities[held_out].extend(in_source(path, source, lifted))
    random.Random(seed).shuffle(code[False])
    talks = conversations(entities[False], seed) + [render(talk) for talk in small_talk(seed)]
    random.Random(seed).shuffle(talks)
    write_shard(out / "code_train.jsonl", code[False])
    write_shard(out / "code_validation.jsonl", code[True])
    write_shard(out / "chat_train.jsonl", talks)
    write_shard(out / "chat_validation.jsonl", conversations(entities[True], seed))
    print("held out:", ", ".join(str(path) for path in files if is_held_out(path)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, default=Path("build/corpus"))
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()
    build(arguments.root, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
