"""Kernels: a plain reference that a person can read beside each fast form, with the same signature."""

__all__: list[str] = []
