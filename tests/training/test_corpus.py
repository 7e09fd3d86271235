"""The corpus is made from text alone: public names, answers that stop at a paragraph, windows that wrap around."""

from pathlib import PurePosixPath

import torch

from training.batches import SHORT, Stream, draw
from training.build_corpus import is_held_out
from training.chat_format import render
from training.conversations import MAX_DOC_CHARS, about, summary
from training.entities import in_source

SOURCE = '''"""Boxes."""
__all__ = ["Box", "fold"]


class Box:
    """A container."""

    def __init__(self, sides, *, lid=True):
        self.sides = sides

    def open(self):
        """Take the lid off."""


def fold(box, times=1):
    """Fold the box flat."""
    return box


def _secret():
    """Not for readers."""
'''


def test_public_definitions_are_found_under_the_package_that_lifts_them() -> None:
    found = list(in_source(PurePosixPath("boxes/core.py"), SOURCE, {"boxes.core": "boxes"}))
    assert [(e.kind, e.name) for e in found] == [
        ("module", "boxes.core"),
        ("class", "boxes.Box"),
        ("method", "boxes.Box.open"),
        ("function", "boxes.fold"),
    ]
    assert found[1].signature == "boxes.Box(sides, *, lid=True)"
    assert found[2].signature == "boxes.Box.open()"
    assert found[2].code == 'def open(self):\n    """Take the lid off."""'


def test_private_modules_are_not_asked_about() -> None:
    assert list(in_source(PurePosixPath("_boxes.py"), SOURCE, {})) == []


def test_summary_keeps_whole_paragraphs() -> None:
    first, second = "a" * 100, "b" * MAX_DOC_CHARS
    assert summary(f"{first}\n\n{second}") == first
    assert summary(f"{first}\n\nshort") == f"{first}\n\nshort"


def test_conversations_are_the_same_for_the_same_seed_and_end_with_an_answer() -> None:
    entity = list(in_source(PurePosixPath("boxes.py"), SOURCE, {}))[-1]
    talks = about(entity, seed=1)
    assert talks == about(entity, seed=1)
    assert talks != about(entity, seed=2)
    assert all(talk[-1].role == "assistant" for talk in talks)
    assert all(render(talk).endswith("<|end|>\n") for talk in talks)


def test_held_out_depends_on_the_path_alone() -> None:
    assert is_held_out(PurePosixPath("secrets.py"))
    assert not is_held_out(PurePosixPath("heapq.py"))


def test_targets_are_the_inputs_one_later_and_short_windows_start_at_documents() -> None:
    ids = torch.tensor([5, 6, 0, 7, 8, 9, 0])
    stream = Stream(ids, torch.tensor([0, 3]))
    inputs, targets = draw(SHORT, stream, stream, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (SHORT.num_windows, SHORT.num_tokens)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert set(inputs[:, 0].tolist()) == {5, 7}
