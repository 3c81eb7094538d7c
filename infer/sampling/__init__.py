"""Sampling: from the logits of many requests to a token of each, and the log-probabilities that they ask for."""

from infer.sampling.logprobs import LogProbs, TokenLogProb, prompt_logprobs
from infer.sampling.row import Row, request_seed
from infer.sampling.sampled import Resolved, Sampled
from infer.sampling.sampler import Sampler

__all__ = ["LogProbs", "Resolved", "Row", "Sampled", "Sampler", "TokenLogProb", "prompt_logprobs", "request_seed"]
