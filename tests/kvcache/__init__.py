"""Tests of `common.kvcache`."""
