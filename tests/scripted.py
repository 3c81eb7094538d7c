"""A server whose engine says what it is told to, cut as it is told to; for tests of what is read off a text."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from served import wait_for
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from infer.chat import ChatTemplate
from infer.completion import Choice, Completion, Event
from infer.params import SamplingParams
from infer.request import RequestError
from infer.server.app import create_app
from infer.server.codec import Codec
from infer.server.config import ServerConfig
from infer.server.edge import EdgeConfig, edge
from infer.server.engine import AtOnce, ModelInfo
from infer.text import Detokenizer

HERMES = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}Use <tool_call>.{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endif %}\n{% endfor %}"
)
THINK = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
SPECIAL = ("<s>", "</s>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def tokenizer() -> Tokenizer:
    """Bytes, special tokens, and marks that are tokens but not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({name: place for place, name in enumerate(alphabet)}, []))
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    made.add_tokens([AddedToken(name, special=False) for name in PLAIN])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


class Script:
    """An engine that says ``texts[choice]``, so many tokens an event; it ends with ``end``.

    Attributes:
        asked: prompts and parameters of what was asked for.
        gate: cleared: nothing follows the first event.
        refuses: why a prompt is refused.
    """

    def __init__(self, made: Tokenizer) -> None:
        self.tokenizer, self.texts, self.step, self.end = made, [""], 1, "stop"
        self.asked: list[tuple[str, SamplingParams]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.refuses: list[str] = []
        self.running = 0

    async def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        at_once: AtOnce | None = None,
    ) -> AsyncIterator[Event]:
        self.asked.append((self.tokenizer.decode(list(prompt), skip_special_tokens=False), params))
        if self.refuses:
            raise RequestError(self.refuses)
        self.running += 1
        try:
            choices = []
            for place in range(params.n):
                tokens = self.tokenizer.encode(self.texts[place % len(self.texts)], add_special_tokens=False).ids
                stream = Detokenizer(self.tokenizer).stream(skip_special_tokens=params.skip_special_tokens)
                told = []
                for at in range(0, len(tokens), self.step):
                    part = tokens[at : at + self.step]
                    told.append("".join(map(stream.push, part)))
                    event = Event(1, place, told[-1], tuple(part))
                    if at_once is None or (place, at) == (0, 0) or not at_once(event):
                        yield event
                    while not self.gate.is_set():
                        await asyncio.sleep(0.005)
                told.append(stream.flush())
                choices.append(Choice(place, tuple(tokens), "".join(told), self.end))  # type: ignore[arg-type]
                whole = Completion(tuple(prompt), tuple(choices)) if place == params.n - 1 else None
                yield Event(1, place, told[-1], (), (), self.end, whole)  # type: ignore[arg-type]
        finally:
            self.running -= 1

    async def ping(self, timeout_s: float) -> bool:
        return True

    def stats(self) -> None:
        return None


class Played:
    """A server with such an engine, in a thread."""

    def __init__(self, folder: Path, template: str, config: ServerConfig | None = None, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        made = tokenizer()
        self.engine = Script(made)
        info = ModelInfo(names=("tiny",), context=1 << 16, vocabulary=300, created=7, version="1")
        self.app = create_app(self.engine, info, Codec(made, ChatTemplate(folder)), config or ServerConfig())
        self.errors: list[BaseException] = []
        self.app.state.server.failed = self.errors.append
        settings: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "log_level": "error", "lifespan": "off"}
        settings |= {"http": edge(EdgeConfig()), **options}
        self._server = uvicorn.Server(uvicorn.Config(self.app, **settings))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        def unseen(_loop: Any, context: dict[str, Any]) -> None:
            self.errors.append(context.get("exception") or RuntimeError(context["message"]))

        asyncio.get_running_loop().set_exception_handler(unseen)
        await self._server.serve()
        gc.collect()
        await asyncio.sleep(0)

    def __enter__(self) -> Played:
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.gate.set()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive() and not self.errors
        assert not self.engine.running and not self.app.state.server._flights

    def says(self, *texts: str, step: int = 1, end: str = "stop") -> Script:
        """What the engine says from now on."""
        self.engine.texts, self.engine.step, self.engine.end = list(texts), step, end
        self.engine.asked.clear()
        return self.engine
