"""Servers for the cases, and what must be true behind every one: "nothing lost"."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from serving_faults.house import GREEDY, House, Repeating, wait_for
from serving_faults.suite import Failed, Lost, Seen, must
from serving_faults.wire import Answer

__all__ = ["KEY", "OTHER", "TEMPLATES", "Stage", "hostile", "tally", "together"]

HELPED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "tea"}], "max_tokens": 2}),
    ("/v1/completions", {**GREEDY, "max_tokens": 2, "structured_outputs": {"choice": ["tea", "noon"]}}),
]
"""Have a process started that renders templates, and one that tries forms."""
KEY, OTHER = "sk-canary-key-first-0123456789", "sk-canary-key-other-0123456789"
STALL_S, PING_MS = 0.1, 1000.0
"""An event loop may compute for so long in one go; a ping may take so long on a machine with other things to do."""
POOL = 3 + min(32, (os.cpu_count() or 1) + 4)
"""Threads that a process may have: its own, and those of a pool, which are started one by one."""
RSS_SHARE, RSS_BYTES = 0.02, 12 << 20
"""A process may grow by so much; the absolute figure is for what allocators keep."""


TEMPLATES = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "center": "{{ 'a' | center(10000000000) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "double": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "slice": "{{ [1] | slice(100000000) | list }}",
    "indent": "{{ 'a\\n' | indent(10000000000) }}",
    "long": "{% for a in range(99999) %}{{ 'a' | center(100) }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "inside": "{{ cycler.__init__.__globals__.os.system('touch unrendered') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{% import '/etc/passwd' as p %}{{ p }}",
}
"""What a chat template may do, by what it is told to."""


def hostile(place: Path, model: Path) -> Path:
    """A model folder whose template does what the first message names."""
    folder = place / "tiny"
    shutil.copytree(model, folder)
    ways = "".join(f"{{% elif m == '{name}' %}}{source}" for name, source in TEMPLATES.items())
    source = "{% set m = messages[0].content %}{% if m == 'tea' %}[user] tea" + ways + "{% endif %}"
    source += "{% if tools %}{{ tools | tojson }}{% endif %}"
    (folder / "chat_template.jinja").write_text(source)
    return folder


def together(works: Iterable[Callable[[], Any]]) -> list[Any]:
    """Do all of these at a time, each in a thread; their results, or what they raised."""
    works = list(works)
    results: list[Any] = [None] * len(works)

    def run(place: int) -> None:
        try:
            results[place] = works[place]()
        except Exception as error:  # noqa: BLE001 - handed on
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def tally(answers: Iterable[Any]) -> dict[Any, int]:
    """How often each status came; every answer must have ended exactly once."""
    counts: dict[Any, int] = {}
    for answer in answers:
        if isinstance(answer, Answer):
            must(answer.terminals() == 1, f"ended {answer.terminals()} times: {answer.body[-200:]!r}")
        key = answer.status if isinstance(answer, Answer) else type(answer).__name__
        counts[key] = counts.get(key, 0) + 1
    return counts


class Stage:
    """What cases are given.

    Args:
        root: a folder for everything.
        model: a folder with a model.
        short: do less of everything.
    """

    def __init__(self, root: Path, model: Path, *, short: bool) -> None:
        self.root, self.model, self.short = root, model, short
        self._houses: dict[str, House] = {}
        self._count = 0
        self.old_logs: list[str] = []
        self.crashes = 0

    def place(self) -> Path:
        """An empty folder."""
        self._count += 1
        path = self.root / f"{self._count:03d}"
        path.mkdir()
        return path

    def plain(self) -> House:
        """A server that is shared by cases, without keys."""
        return self._shared("plain")

    def keyed(self) -> House:
        """One with two keys, calls of functions as in Python, and a chat template that does what it is told to."""
        return self._shared("keyed")

    def begin(self) -> None:
        """Have both started, as somebody will want them."""
        for name in ("plain", "keyed"):
            self._houses[name] = self._started(name)

    def retired(self) -> House:
        """The one without keys, which is shared no more."""
        house = self._shared("plain")
        del self._houses["plain"]
        return house

    def _shared(self, name: str) -> House:
        house = self._houses.get(name)
        if house is not None and house.process.poll() is not None:
            self.crashes += 1
            self.old_logs.append(house.lines)
            house = None
        self._houses[name] = house = house or self._started(name)
        if not house.port:
            house.await_ready()
        return house

    def _started(self, name: str) -> House:
        place = self.place()
        if name == "plain":
            return House(place, self.model, environ={"PYTHONASYNCIODEBUG": ""}, wait=False)
        (place / "keys").write_text(f"{KEY}\n{OTHER}\n")
        options = ("--keys-file", str(place / "keys"), "--http.tool-parser", "pythonic")
        house = House(place, hostile(place, self.model), *options, environ={"PYTHONASYNCIODEBUG": ""}, wait=False)
        house.key = KEY
        return house

    @contextlib.contextmanager
    def own(self, *options: str, model: Path | None = None, **more: Any) -> Iterator[House]:
        """A server for one case alone; it is ended with it, and must leave nothing."""
        with self.ending(House(self.place(), model or self.model, *options, **more)) as house:
            yield house

    @contextlib.contextmanager
    def ending(self, house: House) -> Iterator[House]:
        """A server that is ended with this, and must leave nothing."""
        try:
            yield house
            if house.process.poll() is None:
                code = house.stop()
                must(code == 0, f"exit code {code}: {house.lines[-1500:]}")
            left = list(house.temporary.rglob("*"))
            must(not left, f"files are left: {left}")
        finally:
            self.crashes += house.process.poll() not in (None, 0)
            house.end()
            self.old_logs.append(house.lines)
            shutil.rmtree(house.temporary, ignore_errors=True)

    def close(self) -> list[str]:
        """End the shared servers; what was wrong with that."""
        wrong = []
        for name, house in self._houses.items():
            if house.process.poll() is None:
                try:
                    code = house.stop()
                    must(code == 0, f"exit code {code}: {house.lines[-1500:]}")
                except Exception as error:  # noqa: BLE001 - all of them are to be ended
                    self.crashes += house.process.poll() not in (None, 0)
                    wrong.append(f"{name}: {error}")
            house.end()
            self.old_logs.append(house.lines)
        self._houses.clear()
        return wrong

    def logs(self) -> list[str]:
        """Everything that servers have said."""
        return [*self.old_logs, *(house.lines for house in self._houses.values())]

    @contextlib.contextmanager
    def watched(self, house: House, seen: Seen, *, disturbed: bool = False, quiet: bool = False) -> Iterator[None]:
        """Bystanders before, during and after a fault, and nothing lost in the end.

        Args:
            house: the server.
            seen: is told.
            disturbed: the fault reaches everybody: bystanders may be refused or cut off, and processes end.
            quiet: no bystander meanwhile.
        """
        settle(house)
        want = house.tokens()
        if house.bystander is None:
            for _ in range(8):  # allocators, threads and caches take what they want
                must(house.tokens() == want, "greedy tokens differ from one run to the next")
            together([lambda: house.complete(prompt=["a"] * 8) for _ in range(8)])
            together([lambda: house.complete(prompt=[7] * 700_000) for _ in range(2)])  # as large as a body may be
            for path, more in HELPED:
                must(house.ask("POST", path, more).status == 200, f"{path} {more}")
            house.bystander = want
            settle(house)
        must(want == house.bystander, "greedy tokens are not those of the beginning")
        before, mark = census(house), house.stalls_so_far()
        answers: list[Answer] = []
        watcher = None if quiet else Repeating(lambda: answers.append(house.complete()), 0.05)
        ping = [sys.executable, "-S", "-E", str(Path(__file__).with_name("ping.py")), str(house.port)]
        pinger = subprocess.Popen(ping, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            yield
        finally:
            if watcher is not None:
                watcher.stop()
            told = pinger.communicate()[0].split()
        if house.process.poll() is not None:
            return
        try:
            settle(house)
            _bystanders(answers, [] if watcher is None else watcher.errors, want, seen, disturbed=disturbed)
            must(house.tokens() == want, "greedy tokens differ after the fault")
            settle(house)
            if not disturbed:
                _same(before, lambda: census(house), seen)
            _stalls(house, mark, [float(word) for word in told], seen)
        except Failed as error:
            raise Lost(*error.args).with_traceback(error.__traceback__) from None


def settle(house: House, seconds: float = 15.0) -> None:
    """Nothing is under way any more; every page is free or only remembered."""
    last: dict[str, float] = {}

    def idle() -> bool:
        nonlocal last
        last = house.metrics()
        names = ("requests_in_flight", "prompts_waiting", "prompt_tokens_waiting", "engine_running", "engine_waiting")
        return all(last.get(name, 1.0) == 0 for name in names) and last.get(_USED, 1.0) == 0

    try:
        wait_for(idle, seconds, "the server is not idle")
    except Failed:
        shown = {name: value for name, value in last.items() if value and "bucket" not in name and "total" not in name}
        must(False, f"something is left: {shown}")


_USED = 'kv_pages_device{group="0",state="used"}'


def census(house: House) -> Any:
    """What it holds once idle connections are closed."""
    return house.census()


def _same(before: Any, now: Callable[[], Any], seen: Seen) -> None:
    problems: list[str] = []

    def same() -> bool:
        after = now()
        problems.clear()
        if len(after.files) > len(before.files):
            problems.append(f"processes {sorted(before.files)} -> {sorted(after.files)}")
        for pid in set(after.files) & set(before.files):
            if after.files[pid] > before.files[pid] + 1:
                problems.append(f"files of {pid}: {before.files[pid]} -> {after.files[pid]}")
            if after.threads[pid] > max(before.threads[pid], POOL):
                problems.append(f"threads of {pid}: {before.threads[pid]} -> {after.threads[pid]}")
            if after.rss[pid] > before.rss[pid] + max(RSS_SHARE * before.rss[pid], RSS_BYTES):
                problems.append(f"memory of {pid}: {before.rss[pid] >> 20} -> {after.rss[pid] >> 20} MiB")
        if more := after.temporary - before.temporary:
            problems.append(f"temporary files: {sorted(more)[:5]}")
        if more := {name for name in after.shared - before.shared if name.startswith("lockstep")}:
            problems.append(f"shared memory: {sorted(more)[:5]}")
        return not problems

    end = time.monotonic() + 14.0
    while not same():
        must(time.monotonic() < end, "; ".join(problems))
        time.sleep(0.2)


def _bystanders(answers: list[Answer], errors: list[Any], want: list[Any], seen: Seen, *, disturbed: bool) -> None:
    served = 0
    for answer in answers:
        if answer.status == 200 and answer.whole:
            choice = answer.json()["choices"][0]
            got = [choice["logprobs"]["tokens"], choice["text"], choice["finish_reason"]]
            must(got == want, f"a bystander got other tokens: {got} instead of {want}")
            served += 1
        else:
            must(disturbed, f"a bystander was answered {answer.status}: {answer.body[:200]!r}")
    must(disturbed or not errors, f"a bystander was not answered: {errors[:2]!r}")
    seen.note(f"{served} bystanders")


def _stalls(house: House, mark: int, told: list[float], seen: Seen) -> None:
    longest, computing = house.stalls(mark)
    ping, p99, _count, lost, own = told
    seen.note(
        f"ping max {ping:.0f} p99 {p99:.0f} ms (its own lateness {own:.0f}), loop computed <= {1000 * computing:.0f} ms"
    )
    del longest
    must(computing < STALL_S, f"the event loop computed for {1000 * computing:.0f} ms in one go")
    must(ping - own < PING_MS and lost < 5, f"a ping took {ping:.0f} ms, {lost:.0f} were lost")


def greedy(**more: Any) -> dict[str, Any]:
    """A request as bystanders make it, with changes."""
    return {**GREEDY, **more}
