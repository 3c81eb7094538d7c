"""Into every process of a server under test: faults on purpose, and how long its event loop stood still.

Python imports this by itself where its folder is in PYTHONPATH. The folder named by SERVE_FAULTS holds ``fault``
(``kind@rank,step,point``: what happens in the how-manieth step from now on, once) and ``slow`` (seconds that every step
takes longer), ``poison`` (a token that cannot be made text) and ``says`` (the text of each); ``stalls`` is
written.
"""

import os
import sys
from typing import Any

FOLDER = os.environ.get("SERVE_FAULTS", "")


def _fault(place: str) -> None:
    path = os.path.join(FOLDER, "fault")
    try:
        with open(path) as file:
            kind, _, where = file.read().partition("@")
        rank, step, point = where.split(",")
    except (OSError, ValueError):
        return
    if point.strip() != place or rank != os.environ.get("LOCKSTEP_RANK", "0"):
        return
    if int(step) > 0:
        with open(path + "~", "w") as file:
            file.write(f"{kind}@{rank},{int(step) - 1},{point}")
        os.replace(path + "~", path)
        return
    os.unlink(path)
    if kind == "raise":
        raise RuntimeError("canary of the inside /a/secret/path at 0x7fdeadbeef00")
    if kind == "loop":
        while True:
            pass
    os.kill(os.getpid(), {"kill": 9, "stop": 19}[kind])


def _slow() -> None:
    try:
        with open(os.path.join(FOLDER, "slow")) as file:
            seconds = float(file.read() or 0)
    except (OSError, ValueError):
        return
    import time

    time.sleep(seconds)


def _patch_runner(module: Any) -> None:
    real = module.Runner.execute

    def execute(self: Any, prepared: Any) -> Any:
        _slow()
        _fault("forward")
        return real(self, prepared)

    module.Runner.execute = execute


def _patch_text(module: Any) -> None:
    real = module.TextStream.push

    def push(self: Any, tokens: Any) -> str:
        tokens = list(tokens)
        try:
            with open(os.path.join(FOLDER, "poison")) as file:
                poison = int(file.read())
        except (OSError, ValueError):
            poison = -1
        if poison in tokens:
            raise RuntimeError("canary of the inside /a/secret/path at 0x7fdeadbeef00")
        text = real(self, tokens)
        try:
            with open(os.path.join(FOLDER, "says"), encoding="utf-8", newline="") as file:
                return file.read()
        except OSError:
            return text

    module.TextStream.push = push


class _Finder:
    """Patches modules once they are imported."""

    patches = {"infer.runner": _patch_runner, "infer.text": _patch_text}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        patch = self.patches.get(name)
        if patch is None:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


def _watch_loops() -> None:
    import asyncio
    import time

    real = asyncio.run

    async def watch() -> None:
        wall, cpu = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(0.01)
            now, used = time.monotonic(), time.thread_time()
            if now - wall > 0.04:
                with open(os.path.join(FOLDER, "stalls"), "a") as file:
                    file.write(f"{os.getpid()} {now - wall - 0.01:.4f} {used - cpu:.4f}\n")
            wall, cpu = time.monotonic(), time.thread_time()

    def run(main: Any, **options: Any) -> Any:
        async def both() -> Any:
            watching = asyncio.create_task(watch())
            try:
                return await main
            finally:
                watching.cancel()

        return real(both(), **options)

    asyncio.run = run


if FOLDER and "launch" in " ".join(sys.orig_argv):
    sys.meta_path.insert(0, _Finder())  # pyright: ignore[reportArgumentType]
    _watch_loops()
