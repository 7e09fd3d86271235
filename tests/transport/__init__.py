"""Tests of `common.transport`: one conformance suite over all backends, and what is particular to each."""
