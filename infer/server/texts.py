"""POST /tokenize, /detokenize and /v1/embeddings."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any

from infer.server.bodies import DetokenizeBody, EmbeddingBody, TokenizeBody
from infer.server.engine import Embeds, ModelInfo
from infer.server.errors import ApiError, invalid
from infer.server.exchange import Exchange
from infer.server.flight import Ended
from infer.server.prompts import check_length, check_tokens, split_prompts
from infer.server.server import Server

__all__ = ["detokenize", "embeddings", "tokenize"]


async def tokenize(server: Server, exchange: Exchange) -> None:
    """Token ids of a text or of a conversation."""
    body = await server.read(exchange, TokenizeBody)
    codec = server.codec
    if body.messages is not None:
        plain = [message.plain() for message in body.messages]
        tokens = await codec.conversation(plain, answer=body.add_generation_prompt is not False)
    else:
        (tokens,) = await codec.encode([body.prompt or ""], special=body.add_special_tokens is not False)
    await exchange.json({"count": len(tokens), "max_model_len": server.model.context, "tokens": tokens})


async def detokenize(server: Server, exchange: Exchange) -> None:
    """The text of token ids."""
    body = await server.read(exchange, DetokenizeBody)
    check_tokens(body.tokens, server.model, "tokens", "tokens")
    if server.codec.tokenizer is None:
        raise invalid("tokens: the model has no tokenizer", "tokens")
    await exchange.json({"prompt": await server.codec.decode(body.tokens)})


async def embeddings(server: Server, exchange: Exchange) -> None:
    """Vectors of texts."""
    server.refuse_new()
    engine = server.engine
    if not isinstance(engine, Embeds):
        raise ApiError(404, "model: this server makes no vectors", param="model")
    body = await server.read(exchange, EmbeddingBody)
    size = _size(body.dimensions, server.model)
    most = server.config.most_prompts
    given = split_prompts(body.input, model=server.model, most=most, param="input")
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    prompts = [prompt for prompt in given if isinstance(prompt, list)]
    if texts:
        truncate = bool(body.truncate)
        prompts = await server.codec.documents(texts, "input", prompt=body.prompt_name, truncate=truncate)
    elif body.prompt_name is not None or body.truncate:
        name = "truncate" if body.truncate else "prompt_name"
        raise invalid(f"{name}: token ids are taken as they are", name)
    for prompt in prompts:
        check_length(len(prompt), 0, server.model, "input")
        check_tokens(prompt, server.model, "input", "input")
    try:
        with server.admission.seat([len(prompt) for prompt in prompts], "input"):
            async with server.flight(exchange) as flight:
                vectors = await engine.embed(prompts)
                flight.begun()
    except Ended as ended:
        if ended.reason == "gone":
            raise
        exchange.outcome = "deadline"
        raise server.unavailable("no vectors within the time that a request may wait", "queue_deadline") from None
    count = sum(map(len, prompts))
    server.metrics.prompt_tokens += count
    if size is not None:
        vectors = [_cut(vector, size, unit=server.model.unit) for vector in vectors]
    packed = body.encoding_format == "base64"
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if packed else list(vector)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    await exchange.json({"object": "list", "data": data, "model": server.model.names[0], "usage": usage})


def _size(asked: int | None, model: ModelInfo) -> int | None:
    """To which vectors are cut; None: they stay whole.

    Raises:
        ApiError: the model was not trained for it.
    """
    if asked is None or asked == model.width:
        return None
    if asked not in model.sizes:
        known = f"{model.sizes.start} to {model.width}" if isinstance(model.sizes, range) else None
        known = known or ", ".join(map(str, sorted({*model.sizes, *filter(None, [model.width])})))
        raise invalid(f"dimensions: {asked}: vectors of this model can have {known or 'one size only'}", "dimensions")
    return asked


def _cut(vector: Sequence[float], size: int, *, unit: bool) -> list[float]:
    """The first numbers of a vector; ``unit``: of the length 1 again."""
    first = list(vector[:size])
    length = math.hypot(*first) if unit else 1.0
    return [value / length for value in first] if length else first


def _packed(vector: Any) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
