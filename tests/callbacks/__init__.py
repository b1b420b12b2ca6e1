"""Tests of the callbacks, each in a short real training of a tiny model."""
