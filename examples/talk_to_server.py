"""Start a server, talk to it with the ``openai`` client, and stop it.

    python examples/talk_to_server.py MODEL_DIR ["a prompt"] [--layout.tp 2 ...]

What follows the prompt is passed on to ``lockstep serve``.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence

import openai


def started(folder: str, options: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its address, once it is ready."""
    command = [sys.executable, "-m", "launch", "serve", folder, "--port", "0", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.match(r"(http://\S+) is ready", line):
            return server, found[1]
    sys.exit(server.wait() or 1)


def main(folder: str, prompt: str, options: Sequence[str]) -> int:
    """Returns 0 if the server ended as it was told to."""
    server, address = started(folder, options)
    try:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        name = next(iter(client.models.list())).id
        print(prompt, end="", flush=True)
        stream = client.completions.create(model=name, prompt=prompt, max_tokens=96, temperature=0, stream=True)
        for piece in stream:
            print(piece.choices[0].text, end="", flush=True)
        print()
    finally:
        server.send_signal(signal.SIGTERM)
    return server.wait(30)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    given = sys.argv[2:]
    text = given.pop(0) if given and not given[0].startswith("--") else "def read_"
    sys.exit(main(sys.argv[1], text, given))
