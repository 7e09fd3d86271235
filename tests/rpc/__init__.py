"""Tests of the gRPC plumbing and the configuration."""
