"""llama.cpp's ``llama-server`` as a contender: the same weights as a GGUF file, and a client that is cheap."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel.errors import ConfigError
from parallel.models.config import DecoderConfig

__all__ = ["find", "serving", "write_gguf"]

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def find() -> str | None:
    """Where ``llama-server`` is, if it is on the PATH."""
    return shutil.which("llama-server")


def write_gguf(folder: Path, config: DecoderConfig, path: Path, *, half: bool) -> None:
    """A Llama folder as a GGUF file, with a vocabulary of made-up words.

    Args:
        folder: of one safetensors file.
        config: of the model.
        path: of the file.
        half: matrices in float16 (llama.cpp's own choice on CPUs), else in float32.

    Raises:
        ConfigError: the ``gguf`` package is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise ConfigError("llama-server is on the PATH, but its files need: pip install gguf") from None
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocabulary)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    words += [f"w{n}" for n in range(len(words), config.vocabulary)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (len(words) - len(kinds))])
    for name, value in load_file(folder / "model.safetensors").items():
        own = _interleaved(value, config) if ".q_proj" in name or ".k_proj" in name else value
        own = own.half() if half and own.ndim > 1 else own.float()
        writer.add_tensor(_renamed(name), own.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_INNER[inner]}.weight"


def _interleaved(weight_OI: Tensor, config: DecoderConfig) -> Tensor:
    """llama.cpp rotates neighbours, Hugging Face the halves of a head."""
    half = (config.head_size or config.hidden // config.heads) // 2
    return weight_OI.view(-1, 2, half, weight_OI.shape[1]).transpose(1, 2).reshape(weight_OI.shape)


@contextmanager
def serving(
    path: Path, slots: int, context: int, threads: int = 0
) -> Iterator[Callable[[list[list[int]], list[int]], list[list[int]]]]:
    """A running server; gives a function of prompts and lengths that returns the tokens of each.

    Raises:
        RuntimeError: it does not start.
    """
    threads = threads or torch.get_num_threads()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = ["-np", str(slots), "-c", str(slots * context), "-b", "2048", "-ub", "512"]
    command = [find() or "llama-server", "-m", str(path), "--host", "127.0.0.1", "--port", str(port), *sizes]
    command += ["-t", str(threads), "-tb", str(threads), "--no-ui", "--cache-ram", "0", "-fa", "on", "--offline"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(process, port)
            yield lambda prompts, lengths: _all(port, prompts, lengths)
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {process.returncode}")
        try:
            if _ask(port, "GET", "/health", None)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError("llama-server is not ready after 30 s")


def _ask(port: int, method: str, path: str, body: object) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _all(port: int, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    def one(prompt: list[int], length: int) -> list[int]:
        body = {"prompt": prompt, "n_predict": length, "temperature": 0, "ignore_eos": True}
        status, text = _ask(port, "POST", "/completion", {**body, "cache_prompt": False, "return_tokens": True})
        if status != 200:
            raise RuntimeError(f"llama-server answered {status}: {text[:200]!r}")
        return json.loads(text)["tokens"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts, lengths))
