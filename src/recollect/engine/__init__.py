"""Sequences, sampling and forward passes: everything on token ids."""
