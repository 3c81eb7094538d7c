"""Strangers on the channel, hostile model folders, and what must not be told to anybody: S33, S34, S36, S37, S39."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from serving_faults.house import LONG, ROOT, House, wait_for
from serving_faults.stage import KEY, OTHER, Stage
from serving_faults.suite import Seen, case, must
from serving_faults.wire import TOLD

PROMPT = "canary-prompt-of-a-client"
_INNER = re.compile(
    r"Traceback|File \"|\bline \d+, in |0x[0-9a-f]{6,}|(?<![\w/.])/(?:home|root|tmp|usr|work|var|etc|opt|proc|dev)/"
    r"|\w\.py\b"
    r"|site-packages|canary of the inside|<[\w.]+ object|127\.0\.0\.1:\d|/a/secret"
)


class Canary:
    """Makes a file if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def _sockets(house: House) -> list[Path]:
    return [path for path in house.temporary.rglob("*") if path.is_socket()]


def _sent(path: Path, data: bytes) -> bytes:
    """What comes back from the channel until it is closed."""
    got = b""
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(12)
        one.connect(str(path))
        with contextlib.suppress(OSError):
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            while part := one.recv(4096):
                got += part
    return got


@case("S33 strangers on the channel of the engine", secure=True)
def channel(stage: Stage, seen: Seen) -> None:
    house, magic = stage.plain(), b"lockstep serve 3"
    with stage.watched(house, seen):
        found = _sockets(house)
        must(found, "there is no socket")
        canary = stage.root / "unpickled"
        attacks = {
            "random bytes": secrets.token_bytes(4096),
            "a pickle": pickle.dumps(Canary(canary)) * 30,
            "a pickle after the greeting": magic + os.urandom(32) + pickle.dumps(Canary(canary)) * 30,
            "a giant frame": magic + os.urandom(32) + struct.pack("<I16s", 2**32 - 1, b"m" * 16) + b"x" * 100_000,
            "a wrong key": magic + os.urandom(32) + struct.pack("<I16s", 0, os.urandom(16)),
            "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
        }
        for path in found:
            must(
                path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0,
                f"{path}: others may connect",
            )
            for name, data in attacks.items():
                got = _sent(path, data)
                must(got.startswith(magic) or not got, f"{name} was answered {got[:60]!r}")
                must(len(got) <= 16 + 32 + 20, f"{name} was told more than a greeting: {len(got)} bytes")
                _sent(path, got)  # what it said, said to it again
                seen.inputs += 2
        must(not canary.exists(), "a pickle was executed")
        must("was refused" in house.lines, "strangers are not told of")
        key = [path for path in house.temporary.rglob("*") if path.is_file()]
        must(all(path.stat().st_mode & 0o077 == 0 for path in key), "others may read the key")
        listening = _listening([house.process.pid, *house.engines()])
        must(all(address.startswith(("0100007F", "0" * 24 + "01000000")) for address in listening), f"{listening}")
        seen.note(f"{seen.inputs} dropped; {len(listening)} TCP sockets, on loopback only")


def _listening(pids: list[int]) -> list[str]:
    """The local addresses on which these processes listen, as the kernel writes them."""
    inodes = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(file))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                found.append(words[1].partition(":")[0])
    return found


@case("S34 a key and a prompt through all faults, with all that can be logged", short=False, secure=True)
def canaries(stage: Stage, seen: Seen) -> None:
    place = stage.place()
    (place / "keys").write_text(f"{KEY}\n{OTHER}\n")
    loud = {
        "PYTHONASYNCIODEBUG": "1",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        "TORCH_CPP_LOG_LEVEL": "INFO",
        "PYTHONDEVMODE": "1",
    }
    with stage.own("--keys-file", str(place / "keys"), environ=loud) as house:
        house.key = KEY
        bodies = [{**LONG, "prompt": PROMPT}, {"model": PROMPT, "prompt": PROMPT}, {PROMPT: PROMPT, **LONG}]
        bodies += [
            {**LONG, "prompt": PROMPT, "max_tokens": 10**9},
            {**LONG, "prompt": PROMPT, "logit_bias": {PROMPT: 1}},
        ]
        for body in bodies:
            house.ask("POST", "/v1/completions", body)
            house.ask("POST", f"/{PROMPT}", body)
            house.ask("POST", "/v1/completions", body, {"Authorization": f"Bearer {KEY}x"})
        with house.client() as client:
            client.send(f"GET /{PROMPT} HTTP/1.1\nHost: {PROMPT}\nAuthorization: Bearer {KEY}\n\n".encode())
            client.answer()
        house.write("poison", "300")
        house.ask("POST", "/v1/completions", {**LONG, "prompt": PROMPT, "allowed_tokens": [300]})
        (house.place / "poison").unlink()
        pages = [house.ask("GET", "/metrics").body.decode()]
        for strike in (lambda: house.fault("raise@0,2,forward"), lambda: os.kill(house.engines()[-1], signal.SIGKILL)):
            with house.slowly(0.02), house.client() as client:
                client.post("/v1/completions", {**LONG, "prompt": PROMPT}, {"Authorization": f"Bearer {KEY}"})
                time.sleep(0.3)
                strike()
                client.answer()
            time.sleep(0.5)
            wait_for(lambda: house.ready() == 200, 60, "the engine is back")
        pages.append(house.ask("GET", "/metrics").body.decode())
        for pid in (house.process.pid, *house.engines()):
            for name in ("cmdline", "environ"):
                pages.append(Path(f"/proc/{pid}/{name}").read_bytes().decode("latin-1"))
        dumps = [path for path in house.place.rglob("*") if path.is_file() and path.name not in ("keys", "log")]
        pages += [path.read_bytes().decode("latin-1") for path in dumps if path.stat().st_size < 1 << 20]
    pages += stage.logs()
    hits = [page[max(0, at - 80) : at + 80] for page in pages for at in [_at(page)] if at >= 0]
    must(not hits, f"found in {len(hits)} places: {hits[:2]}")
    seen.note(f"{len(pages)} logs, command lines, environments, metrics and files: 0 hits")


def _at(page: str) -> int:
    return next((page.index(word) for word in (KEY, OTHER, KEY[3:-3], PROMPT) if word in page), -1)


@case("S36 nothing of the inside in any error", secure=True)
def inside(stage: Stage, seen: Seen) -> None:
    hits = [body for body in TOLD if _INNER.search(body.replace(PROMPT, ""))]  # names of fields are told
    must(not hits, f"{len(hits)} of {len(TOLD)}: {hits[:3]}")
    long = [body for body in TOLD if len(body) > 4096]
    must(not long, f"{len(long)} errors are longer than anybody reads: {long[:1]}")
    seen.note(f"{len(TOLD)} different errors of this run looked through")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(folder.parent / "unpickled")))


def _auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text(f"open({str(folder.parent / 'unpickled')!r}, 'w')")


def _index(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))

    return change


def _link(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


def _header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def _grown(data: bytes) -> bytes:
    """A header whose first tensor is said to be larger than it is."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [2**40, 2**20]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _template(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (_pickle, "pickle"),
    "auto_map": (_auto_map, "auto_map"),
    "../ in weight_map": (_index("../outside.safetensors"), "../outside.safetensors"),
    "an absolute path in weight_map": (_index("/etc/passwd.safetensors"), "/etc/passwd"),
    "a link out of the folder": (_link, "outside the folder"),
    "a header of 2^60 bytes": (_header(lambda data: struct.pack("<Q", 2**60) + data[8:]), "safetensors"),
    "a header that is cut": (_header(lambda data: data[:50]), "safetensors"),
    "a header that lies about a shape": (_header(_grown), "safetensors"),
    "a header that is no JSON": (_header(lambda data: data[:8] + b"x" * (len(data) - 8)), "safetensors"),
    "a template that cannot be": (_template, "config.json"),
}


@case("S37 hostile model folders", short=False, secure=True)
def folders(stage: Stage, seen: Seen) -> None:
    for number, (name, (change, reason)) in enumerate(FOLDERS.items()):
        place = stage.place()
        folder = place / f"model{number}"
        shutil.copytree(stage.model, folder)
        change(folder)
        command = [sys.executable, "-m", "launch", "serve", str(folder), "--port", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        must(done.returncode == 2, f"{name}: exit code {done.returncode}: {done.stderr[-300:]}")
        must(reason in done.stderr and "Traceback" not in done.stderr, f"{name}: {done.stderr[-300:]}")
        must(not (place / "unpickled").exists(), f"{name}: its code was run")
        seen.inputs += 1
    seen.note(f"{seen.inputs} refused, the reason named")


@case("S39 the cases about security under python -O", short=False)
def optimized(stage: Stage, seen: Seen) -> None:
    if sys.flags.optimize:
        seen.note("this is it")
        return
    command = [sys.executable, "-O", str(Path(__file__).parent.parent / "serve_faults.py"), "--secure", "--short-work"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    must(done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:])
    seen.note(done.stdout.splitlines()[-1])
