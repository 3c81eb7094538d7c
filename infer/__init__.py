"""Serving: requests, their cached keys and values, and generation."""

from infer.llm import LLM
from infer.request import Completion, SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams"]
