"""Sampling parameters and replayable draws."""
