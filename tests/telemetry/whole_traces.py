"""What the traces of a deployment's requests must be: one for each, its spans within each other and in order."""

from __future__ import annotations

from collections import Counter

from loadtest.record import RequestRecord
from tests.telemetry.collector import CollectedSpan, Collector


def traces_are_whole(collector: Collector, records: tuple[RequestRecord, ...]) -> None:
    """One trace for each record, and one more: that of a request that was refused."""
    roots = {
        str(span.attributes["baton.request_id"]): span
        for span in collector.spans
        if span.name == "request" and span.attributes["baton.outcome"] == "ok"
    }
    assert roots.keys() == {f"load-{record.index}" for record in records}
    for record in records:
        root = roots[f"load-{record.index}"]
        spans = [span for span in collector.spans if span.trace_id == root.trace_id]
        _children_are_within_their_parents(root, spans)
        _spans_come_in_order(spans, record.num_output_tokens)
    assert len({span.trace_id for span in collector.spans}) == len(records) + 1, "and that which was refused"


def _children_are_within_their_parents(root: CollectedSpan, spans: list[CollectedSpan]) -> None:
    by_id = {span.span_id: span for span in spans}
    assert not root.parent_id
    parent_names = {"prefill": "request", "chunk": "prefill", "transfer": "prefill", "receive": "prefill"}
    for span in spans:
        if span is root:
            continue
        parent = by_id[span.parent_id]
        assert parent.start_ns <= span.start_ns <= span.end_ns, f"{span.name} is not in {parent.name}"
        # A chunk that an output of one token does not need may still arrive when prefill is done.
        is_unwanted = root.attributes["baton.output_tokens"] == 1 and span.service == "baton-decode"
        assert is_unwanted or span.end_ns <= parent.end_ns, f"{span.name} is not in {parent.name}"
        assert parent.name == parent_names.get(span.name, parent.name)
        if span.service == "baton-router" or span.name == "decode":
            assert parent is root


def _spans_come_in_order(spans: list[CollectedSpan], num_tokens: int) -> None:
    counts = Counter((span.service, span.name) for span in spans)
    once = ["tokenize", "place", "request"]
    assert [counts["baton-router", name] for name in once] == [1] * len(once)
    assert counts["baton-prefill", "prefill"] == counts["baton-prefill", "queue"] == 1
    assert counts["baton-prefill", "chunk"] >= 1
    first = {(s.service, s.name): s for s in sorted(spans, key=lambda span: span.start_ns, reverse=True)}
    queue, chunk = first["baton-prefill", "queue"], first["baton-prefill", "chunk"]
    # Opening and prefill begin at once.
    assert first["baton-router", "place"].end_ns <= queue.start_ns <= queue.end_ns <= chunk.start_ns
    # An output that ends with its first token may be over before decode has answered the open.
    assert counts["baton-router", "open"] == 1 or (num_tokens == 1 and not counts["baton-router", "open"])
    if counts["baton-router", "open"]:
        assert first["baton-router", "place"].end_ns <= first["baton-router", "open"].start_ns
    if num_tokens == 1:
        assert counts["baton-decode", "decode"] == 0
        return
    transfers = [span for span in spans if span.name == "transfer"]
    assert counts["baton-decode", "receive"] == counts["baton-decode", "verify"] == len(transfers) >= 1
    # Only what was cached can be sent before a chunk is being computed.
    num_early = sum(int(span.attributes["baton.num_blocks"]) for span in transfers if span.start_ns < chunk.start_ns)
    assert num_early <= int(chunk.attributes["baton.first_block"])
    assert all(
        span.attributes["baton.lane"] == "ucx:tcp" and span.attributes["baton.is_verified"] for span in transfers
    )
    decode = first["baton-decode", "decode"]
    assert max(span.end_ns for span in spans if span.name == "verify") <= decode.start_ns
    assert first["baton-decode", "queue"].end_ns == decode.start_ns
    assert decode.attributes["baton.num_tokens"] == num_tokens - 1
