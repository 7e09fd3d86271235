"""Tests of `common.telemetry`."""
