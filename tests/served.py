"""A tiny model behind a server, for the tests of the server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from infer import LLM, EngineConfig, SamplingParams
from infer.aio import AsyncEngine
from infer.cache import CacheConfig
from infer.chat import ChatTemplate
from infer.completion import Event
from infer.policy import SchedulerConfig
from infer.scheduler import Stats
from infer.server.app import create_app
from infer.server.codec import Codec
from infer.server.config import ServerConfig
from infer.server.engine import AtOnce, ModelInfo
from parallel.hf import save_model
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig, RopeConfig
from parallel.models.decoder import build_model

CONTEXT, VOCABULARY, END = 256, 320, 2
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
LLAMA = DecoderConfig(
    vocabulary=VOCABULARY,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    feed_forward=48,
    max_positions=CONTEXT,
    std=0.3,
    rope=RopeConfig(),
)


def write_model(folder: Path) -> Path:
    """A model whose tokens are bytes, pairs of letters and two special ones, so that characters span tokens."""
    save_model(build_model(LLAMA, Build(mesh=Mesh.single()), seed=7), Mesh.single(), folder, eos=END)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinsr"
    pairs = [a + b for a in letters for b in letters][: VOCABULARY - 3 - len(alphabet)]
    names = ["<s>", "<pad>", "</s>", *alphabet, *pairs]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [(pair[0], pair[1]) for pair in pairs]))
    made.add_special_tokens(["<s>", "<pad>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    return folder


def load(folder: Path, **options: Any) -> LLM:
    """The model with an engine; options of its scheduler."""
    options = {"prefix_cache": False, **options}
    return LLM(folder, config=EngineConfig(cache=CacheConfig(memory_gib=0.02), scheduler=SchedulerConfig(**options)))


class Local:
    """An engine in this process, with the face that the server wants; ``delay_s`` slows each of its steps."""

    def __init__(self, llm: LLM, delay_s: float = 0.0) -> None:
        self.llm, self.delay_s, self.alive, self.salts = llm, delay_s, True, list[bytes]()
        step = llm.engine.step

        def slow() -> list[Event]:
            while not self.alive:
                time.sleep(0.01)
            time.sleep(self.delay_s)
            return step()

        llm.engine.step = slow
        self.aio = AsyncEngine(llm.engine)

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        at_once: AtOnce | None = None,
    ) -> AsyncIterator[Event]:
        self.salts.append(salt)
        return self.aio.stream(prompt, params, priority=priority, salt=salt)

    async def ping(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return bool(await self.aio.generate([5], SamplingParams(max_tokens=1)))
        return False

    def stats(self) -> Stats | None:
        return self.llm.engine.stats

    async def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.llm.embed(prompts, normalize=True).tolist()


class Served:
    """A server on a port of this machine, in a thread; everything of the engine happens in its event loop."""

    def __init__(self, llm: LLM, config: ServerConfig | None = None, delay_s: float = 0.0, **model: Any) -> None:
        self.llm, self.engine = llm, Local(llm, delay_s)
        info = {"names": ("tiny", "also"), "context": CONTEXT, "vocabulary": VOCABULARY, "created": 7, "version": "1"}
        codec = Codec(llm.tokenizer, ChatTemplate(llm.folder))
        self.config = ServerConfig() if config is None else config
        self.app: Starlette = create_app(self.engine, ModelInfo(**{**info, **model}), codec, self.config)
        self.errors: list[BaseException] = []
        self.app.state.server.failed = self.errors.append
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        )
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        async with self.engine.aio:
            await self._server.serve()

    def __enter__(self) -> Served:
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.alive = True
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.check_empty()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def check_empty(self) -> None:
        """Nothing is left of any request."""
        wait_for(lambda: not self.llm.engine.busy)
        self.llm.engine.scheduler.check()
        assert self.llm.engine.stats.used == (0,)
        admission = self.app.state.server.admission
        assert (admission.requests, admission.tokens) == (0, 0)
        assert not self.app.state.server._flights


def wait_for(condition: Any, seconds: float = 5.0) -> float:
    """Until it is true; how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - began


def texts(count: int, seed: int = 3) -> Iterator[str]:
    """Prompts."""
    draw = random.Random(seed)
    for index in range(count):
        yield f"{index}: " + "".join(draw.choice("etaoin srhé€😀") for _ in range(draw.randint(1, 30)))


def leftovers(work: Callable[[], None], *modules: str) -> set[str]:
    """Types of these modules of which the work leaves objects that only the garbage collector finds."""
    gc.collect()
    gc.disable()
    try:
        work()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return {type(one).__name__ for one in gc.garbage if type(one).__module__.startswith(modules)}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
