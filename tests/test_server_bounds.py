"""What a body may be made of, and what a chat template may do, before anybody else has to wait for it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infer.chat import ChatTemplate
from infer.request import RequestError
from infer.server import codec, exchange
from infer.server.errors import ApiError
from infer.server.rendering import Renderer

WILD = ['"', "\\", '\\"', ",", "[", "{", ":", " ", "é", "\n", "a", "\\\\"]


def drawn(draw: random.Random, depth: int = 0) -> Any:
    pick = draw.random()
    if pick < 0.35 or depth > 4:
        return "".join(draw.choice(WILD) for _ in range(draw.randint(0, 12)))
    if pick < 0.5:
        return draw.choice([None, True, 7, -1.5])
    if pick < 0.75:
        return [drawn(draw, depth + 1) for _ in range(draw.randint(0, 5))]
    return {f"{draw.choice(WILD)}{place}": drawn(draw, depth + 1) for place in range(draw.randint(0, 5))}


def counted(value: Any) -> tuple[int, int, int]:
    """Lists and objects, texts and names, commas between values."""
    if isinstance(value, str):
        return 0, 1, 0
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inner = [counted(own) for own in (value.values() if isinstance(value, dict) else value)]
    parts, texts, commas = (sum(own[place] for own in inner) for place in range(3))
    return parts + 1, texts + len(value) * isinstance(value, dict), commas + max(len(value) - 1, 0)


@pytest.mark.parametrize("spaced", [False, True])
def test_signs_are_counted_as_a_reader_of_json_would(monkeypatch: pytest.MonkeyPatch, spaced: bool) -> None:
    draw, separators = random.Random(5), (" , ", "\t:\n") if spaced else (",", ":")
    names = ("MOST_PARTS", "MOST_TEXTS", "MOST_VALUES")
    for _ in range(400):
        value = [drawn(draw) for _ in range(draw.randint(1, 6))]
        data = json.dumps(value, ensure_ascii=draw.random() < 0.5, separators=separators).encode()
        for place, count in enumerate(counted(value)):
            for limit in (count - 1, count):
                for other in names:
                    monkeypatch.setattr(exchange, other, 1 << 30)
                monkeypatch.setattr(exchange, names[place], limit)
                if limit < count:
                    with pytest.raises(ApiError, match="has more than"):
                        exchange.check_parts(data, "it")
                else:
                    exchange.check_parts(data, "it")


BOMBS = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "longer than 0.5 s",
    "{{ [1] | slice(100000000) | list }}": "longer than 0.5 s",
    "{{ 'a' | center(10000000000) }}": "too much memory",
    "{{ '%9999999999d' % 1 }}": "too much memory",
    "{{ '{:9999999999}'.format(1) }}": "too much memory",
    "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "too much memory",
    "{% for a in range(99999) %}{{ 'a' | center(100) }}{% endfor %}": "characters",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ raise_exception('no such role') }}": "no such role",
}


def test_a_template_that_is_a_bomb_is_killed_and_the_next_conversation_is_not(tmp_path: Path) -> None:
    ways = "".join(f"{{% elif messages[0].content == '{place}' %}}{own}" for place, own in enumerate(BOMBS))
    source = "{% if messages[0].content == 'é' %}<{{ messages[0].content }} {{ more }}>" + ways + "{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    renderer = Renderer(ChatTemplate(tmp_path, seconds=0.5), memory=128 << 20)  # which computes nothing yet

    async def main(renderer: Renderer) -> None:
        for place, why in enumerate(BOMBS.values()):
            began = time.monotonic()
            with pytest.raises(RequestError, match=why):
                await renderer.render([{"role": "user", "content": str(place)}])
            assert time.monotonic() - began < 3.0
            assert await renderer.render([{"role": "user", "content": "é"}], more=7) == "<é 7>"
        with pytest.raises(RequestError, match="at least one"):
            await renderer.render([])

    asyncio.run(main(renderer))
    assert renderer.starts >= 3
    pid = renderer.pid
    del renderer
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


class Slow:
    """A tokenizer of the kind that takes its time."""

    def __init__(self) -> None:
        self.lengths, self.most = list[int](), 0

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        self.lengths.append(len(text))
        self.most = max(self.most, len(self.lengths))
        time.sleep(0.05 if len(text) > codec.SHORT else 0)
        self.lengths.remove(len(text))
        return SimpleNamespace(ids=[len(text)])


def test_one_very_long_text_is_encoded_at_a_time_and_no_other_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, slow = codec.Codec(None), Slow()
    monkeypatch.setattr(made, "tokenizer", slow)

    async def ask() -> tuple[list[int], int]:
        ended: list[int] = []

        async def one(length: int) -> None:
            assert await made.encode(["a" * length]) == [[length]]
            ended.append(length)

        await asyncio.gather(*(one(codec.LONG + 1) for _ in range(5)))
        most, slow.most = slow.most, 0
        await asyncio.gather(*(one(codec.LONG + 1) for _ in range(5)), one(codec.LONG), one(7))
        assert slow.most == 3, "a very long, a long and a short one"
        return ended[5:], most

    ended, most = asyncio.run(ask())
    assert most == 1
    assert ended.index(7) == 0 and ended.index(codec.LONG) < 3
