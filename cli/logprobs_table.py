"""Prints the log-probabilities of an output: a line for each token, with what else might have come."""

from __future__ import annotations

from collections.abc import Sequence

from baton.v1 import inference_pb2
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_logprobs(console: Console, title: str, positions: Sequence[inference_pb2.OutputLogprobs]) -> None:
    """`title` names the output. Without alternatives there is no column of them."""
    has_alternatives = any(position.top for position in positions)
    table = Table(title=title, title_justify="left")
    for heading in ("#", "token", "log-probability"):
        table.add_column(heading, justify="left" if heading == "token" else "right", overflow="fold")
    if has_alternatives:
        table.add_column("most probable", overflow="fold")
    for number, position in enumerate(positions, start=1):
        cells = [Text(str(number)), _shown(position.chosen), Text(f"{position.chosen.logprob:.3f}")]
        if has_alternatives:
            cells.append(Text("  ").join(_with_logprob(token) for token in position.top))
        table.add_row(*cells)
    console.print(table)


def _shown(token: inference_pb2.OutputTokenLogprob) -> Text:
    """Quoted, so that spaces and line ends are seen; a piece of a character as bytes."""
    return Text(repr(token.utf8 if "\ufffd" in token.text else token.text))


def _with_logprob(token: inference_pb2.OutputTokenLogprob) -> Text:
    return _shown(token) + Text(f" {token.logprob:.3f}")
