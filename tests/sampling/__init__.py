"""Tests of `common.sampling`."""
