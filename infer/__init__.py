"""Serving: requests, their cached keys and values, and generation."""

from infer.build import EngineConfig
from infer.completion import Choice, Completion, Event
from infer.engine import Engine
from infer.llm import LLM
from infer.params import SamplingParams
from infer.request import RequestError

__all__ = ["LLM", "Choice", "Completion", "Engine", "EngineConfig", "Event", "RequestError", "SamplingParams"]
