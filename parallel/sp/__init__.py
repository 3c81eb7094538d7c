"""Sequence parallelism: where tokens are cut, and where they are whole again."""

from parallel.sp.region import gather_tokens, local_tokens, split_tokens

__all__ = ["gather_tokens", "local_tokens", "split_tokens"]
