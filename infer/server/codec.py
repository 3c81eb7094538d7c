"""From texts and conversations to tokens and back, off the event loop where it takes long."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer, decoders

from infer.chat import ChatTemplate
from infer.server.errors import invalid
from infer.server.rendering import Renderer
from infer.text import Detokenizer

__all__ = ["Codec", "Reader", "ReadsDocuments"]

T = TypeVar("T")
SHORT = 2000
"""Characters that are encoded at once, without asking a thread."""
LONG = 100_000
"""Characters of texts that are encoded one request at a time: they take a core for up to seconds."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ReadsDocuments(Protocol):
    """Texts to the tokens of which vectors are made, as :class:`~infer.documents.Documents`."""

    def __call__(
        self, texts: Sequence[str], *, prompt: str | None = None, truncate: bool = False
    ) -> Sequence[Sequence[int]]:
        """Token ids of each; ``prompt`` is the name of what is put before them, ``truncate`` cuts them."""
        ...


class Reader:
    """Where the tokens of a text begin in it."""

    def __init__(self, detokenizer: Detokenizer, context: Sequence[int], skip: bool) -> None:
        self._stream, self.length = detokenizer.stream(skip_special_tokens=skip, context=context), 0

    def place(self, token: int) -> int:
        """Of the first character of the token that follows."""
        before = self.length
        self.length += len(self._stream.push(token))
        return before


class Codec:
    """A model's tokenizer and chat template.

    Args:
        tokenizer: None: prompts are token ids, and there is no text.
        template: None: there are no conversations.
        documents: texts to the tokens of which vectors are made; None: as prompts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None = None,
        *,
        documents: ReadsDocuments | None = None,
    ) -> None:
        self.tokenizer, self.template, self._documents = tokenizer, template, documents
        self._renderer = None if template is None else Renderer(template)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._bytes: dict[int, bytes] = {}
        self._long = ThreadPoolExecutor(1, "long-texts")

    async def encode(self, texts: Sequence[str], *, special: bool = True, param: str = "prompt") -> list[list[int]]:
        """Token ids of texts.

        Args:
            texts: any.
            special: with the special tokens that the tokenizer adds.
            param: the field they come from.

        Raises:
            ApiError: there is no tokenizer.
        """
        tokenizer = self._needed(param)

        def work() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens=special).ids for text in texts]

        return await self._done(work, sum(map(len, texts)))

    async def documents(
        self, texts: Sequence[str], param: str, *, prompt: str | None = None, truncate: bool = False
    ) -> list[list[int]]:
        """Token ids of texts of which vectors are made.

        Args:
            texts: any.
            param: the field they come from.
            prompt: name of what the model's folder puts before a text; None: its default.
            truncate: cut texts at the context.

        Raises:
            ApiError: there is no tokenizer, or nothing that knows of prompts.
            RequestError: there is no such prompt.
        """
        self._needed(param)
        read = self._documents
        if read is None:
            for name, asked in (("prompt_name", prompt is not None), ("truncate", truncate)):
                if asked:
                    raise invalid(f"{name}: this server reads texts as they are", name)
            return await self.encode(texts, param=param)

        def work() -> list[list[int]]:
            return [list(ids) for ids in read(texts, prompt=prompt, truncate=truncate)]

        return await self._done(work, sum(map(len, texts)))

    async def conversation(
        self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation; see :meth:`converse`."""
        return (await self.converse(messages, answer=answer, variables=variables))[0]

    async def converse(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        answer: bool = True,
        variables: Mapping[str, Any] | None = None,
        param: str = "messages",
    ) -> tuple[list[int], str]:
        """Token ids of a conversation, and how its text ends, but for white space.

        Raises:
            ApiError: the model has no chat template or no tokenizer.
            RequestError: the template refuses it.
        """
        renderer = self._renderer
        if renderer is None:
            raise invalid(f"{param}: the model has no chat template; ask for completions", param)
        self._needed(param)
        text = await renderer.render(messages, tools=tools, answer=answer, **(variables or {}))
        return (await self.encode([text], special=False, param=param))[0], text[-100:].rstrip()

    def token(self, text: str) -> int | None:
        """The token that is this mark; None: it is spelled by several."""
        return None if self.tokenizer is None else self.tokenizer.token_to_id(text)

    def special(self, text: str) -> bool:
        """Whether this mark is a special token, which texts are without."""
        return self._detokenizer is not None and self.token(text) in self._detokenizer.special

    async def decode(self, tokens: Sequence[int], *, skip: bool = False) -> str:
        """The text of tokens, with special tokens unless ``skip``; nothing if there is no tokenizer."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return ""

        def work() -> str:
            return tokenizer.decode(list(tokens), skip_special_tokens=skip)

        return work() if len(tokens) <= SHORT else await asyncio.to_thread(work)

    def reader(self, context: Sequence[int], *, skip: bool) -> Reader | None:
        """Of a text that follows ``context``; None if there is no text."""
        return None if self._detokenizer is None else Reader(self._detokenizer, context, skip)

    def spell(self, token: int) -> tuple[str, bytes]:
        """A token in the middle of a text: how it reads, and its bytes; what is not whole characters is spelled."""
        data = self.bytes_of(token)
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._look(token)
        return found

    def _look(self, token: int) -> bytes:
        detokenizer = self._detokenizer
        if detokenizer is None or self.tokenizer is None:
            return f"token_id:{token}".encode()
        name = self.tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in detokenizer.special:
            return name.encode()
        if isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            return detokenizer.bytes_of(token)
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        once = self.tokenizer.decode([token], skip_special_tokens=False)
        return self.tokenizer.decode([token, token], skip_special_tokens=False)[len(once) :].encode()

    async def _done(self, work: Callable[[], T], characters: int) -> T:
        """Off the event loop where it takes long; one at a time where it takes very long."""
        if characters <= SHORT:
            return work()
        if characters <= LONG:
            return await asyncio.to_thread(work)
        return await asyncio.get_running_loop().run_in_executor(self._long, work)

    def _needed(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise invalid(f"{param}: the model has no tokenizer; give token ids", param)
        return self.tokenizer
