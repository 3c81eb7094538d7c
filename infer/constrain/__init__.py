"""Completions that keep a form: compiled by llguidance, kept by masks over the vocabulary."""

__all__: list[str] = []
