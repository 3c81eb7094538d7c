"""Forms, templates and texts that are bombs: S27 to S30."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from serving_faults.house import ROOT, House
from serving_faults.stage import TEMPLATES, Stage, hostile, together
from serving_faults.suite import Seen, case, must
from serving_faults.wire import Answer, error_of

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "tea"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "tea", "max_tokens": 2, "temperature": 0}
FORM_S = 1.0
"""As ``--http.form-s`` has it."""
TEMPLATE_S = 2.0


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


LEVELS = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(24)} | {"a24": {}}
BOMBS: dict[str, dict[str, Any]] = {
    "(a{1000}){1000}": {"regex": "(a{1000}){1000}"},
    "((a{1,100}){1,100}){1,100}": {"regex": "((a{1,100}){1,100}){1,100}"},
    "(a?){5000}a{5000}": {"regex": "(a?){5000}a{5000}"},
    "(x+x+)+y": {"regex": "(x+x+)+y"},
    "(.*a){40}": {"regex": "(.*a){40}"},
    "[^a]{0,100000}": {"regex": "[^a]{0,100000}"},
    "two counters": {"regex": "(.{0,3000}x){0,3000}"},
    "unicode classes": {"regex": r"(\w{1,500}|\d{1,500}|\s{1,500}){1,500}"},
    "nested groups": {"regex": "(" * 50_000 + "a" + ")" * 50_000},
    "long regex": {"regex": "a" * 250_000},
    "alternatives": {"regex": "|".join(f"x{i}" for i in range(20_000))},
    "lookahead": {"regex": "(?=a)b"},
    "back reference": {"regex": r"(a*)\1"},
    "multipleOf": {"json": {"type": "integer", "multipleOf": 999_983}},
    "multipleOf twice": {"json": {"allOf": [{"type": "integer", "multipleOf": n} for n in (999, 998, 997)]}},
    "5,000 properties": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}},
    "50,000 values": {"json": json.dumps({"enum": list(range(50_000))}).replace(" ", "")},
    "15,000 texts": {"json": json.dumps({"enum": [f"x{i}" for i in range(15_000)]})},
    "deep schema": {"json": _nested(50)},
    "deeper schema": {"json": '{"items":' * 20_000 + "{}" + "}" * 20_000},
    "recursion": {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 9}}, "$ref": "#/$defs/a"}},
    "doubling": {"json": {"$defs": LEVELS, "$ref": "#/$defs/a0"}},
    "all of any": {"json": {"allOf": [{"anyOf": [{"minLength": 10 * i + j} for j in range(8)]} for i in range(8)]}},
    "long texts": {"json": {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9}},
    "many items": {"json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 10**6, "uniqueItems": True}},
    "pattern in a schema": {"json": {"type": "string", "pattern": "^((a{100}){100}){100}$"}},
    "bounds": {"json": {"type": "number", "minimum": 1e-300, "maximum": 1e300, "multipleOf": 1e-9}},
    "26 at once": {"grammar": "start: X\nX: " + " & ".join(f"/.*{chr(97 + i)}.*/" for i in range(26))},
    "nested rules": {"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000},
    "ambiguous": {"grammar": 'start: a\na: a a a | a a | "x" | ""'},
    "left recursion": {"grammar": 'start: a\na: a "x" | b\nb: a'},
    "doubling rules": {
        "grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "a"'
    },
    "20,000 rules": {"grammar": "start: r0\n" + "\n".join(f'r{i}: "{i}" | r{i + 1}' for i in range(15_000))},
    "4,096 choices": {"choice": [f"{i:x}" * 12 for i in range(4096)]},
    "choices": {"choice": ["a" * n for n in range(1, 600)]},
}


@case("S27 regular expressions, grammars and schemas that are bombs", secure=True)
def bombs(stage: Stage, seen: Seen) -> None:
    house, worst, refused = stage.plain(), 0.0, 0
    names = list(BOMBS)[:: 4 if stage.short else 1]
    if not stage.short:
        for outputs in [*BOMBS.values()] * 2:  # what an engine keeps of forms has its bound, which S28 is about
            house.ask("POST", "/v1/completions", {**TEXT, "structured_outputs": outputs})
    with stage.watched(house, seen):
        for name in names:
            outputs = BOMBS[name]
            asked: list[tuple[str, dict[str, Any]]] = [("/v1/completions", {**TEXT, "structured_outputs": outputs})]
            if isinstance(outputs.get("json"), dict) and not stage.short:
                form = {"type": "json_schema", "json_schema": {"name": "a", "schema": outputs["json"]}}
                asked.append(("/v1/chat/completions", {**CHAT, "response_format": form}))
            for path, body in asked:
                answer = house.ask("POST", path, body)
                must(answer.status in (200, 400), f"{name}: {answer.status} {answer.body[:200]!r}")
                if answer.status == 400:
                    error_of(answer, 400)
                    refused += 1
                must(answer.terminals() == 1, f"{name}: ended {answer.terminals()} times")
                must(answer.seconds < FORM_S + 1.0, f"{name}: {answer.status} after {answer.seconds:.2f} s")
                worst = max(worst, answer.seconds)
                seen.inputs += 1
        body = {**TEXT, "structured_outputs": BOMBS[names[-1]]}
        many = together([lambda: house.ask("POST", "/v1/completions", body)] * 3)
        must(all(isinstance(one, Answer) and one.status in (200, 400) for one in many), f"three at a time: {many}")
        must(house.helper("compile.py") is not None or refused, "forms are tried nowhere")
    seen.note(f"{len(names)} bombs: {refused} refused, the others kept, within {worst:.2f} s each")


_LIGHT = """
import sys, types
sys.modules["infer"] = types.ModuleType("infer")
sys.modules["infer"].__path__ = ["infer"]
"""
"""Spares a program the whole of the package."""
UNIQUE = """
import asyncio, json, os, sys, time
from infer.constrain.checker import Checker
from infer.server.forms import StructuredOutputs
from tokenizers import Tokenizer

def size(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096

async def main(folder, count):
    checker = Checker(Tokenizer.from_file(folder + "/tokenizer.json"), 320, seconds=5.0)
    sizes, most = [], 0
    for place in range(count):
        schema = {"type": "object", "properties": {f"field{place}": {"const": place}}, "required": [f"field{place}"]}
        outputs = StructuredOutputs.model_validate({"json": schema})
        problem = await checker.problem(outputs.constraint())
        assert not problem, problem
        most = max(most, checker.kept)
        if place in (count // 5, count - 1):
            sizes.append((size(os.getpid()), size(checker.pid)))
    print(json.dumps({"kept": most, "limit": checker.kept_bytes, "sizes": sizes, "starts": checker.starts}))

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@case("S28 unique schemas, tens of thousands of them", secure=True)
def unique(stage: Stage, seen: Seen) -> None:
    house, count = stage.plain(), 40 if stage.short else 3000
    if not stage.short:
        _schemas(house, 800, "a")
    with stage.watched(house, seen):
        _schemas(house, count, "b")
    seen.inputs += count
    place, count = stage.place(), 2000 if stage.short else 50_000
    program = [sys.executable, "-c", _LIGHT + UNIQUE, str(stage.model), str(count)]
    environ = {**house.environ, "TMPDIR": str(place), "PYTHONOPTIMIZE": "", "SERVE_FAULTS": ""}
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environ, cwd=ROOT)
    must(done.returncode == 0, done.stderr[-1000:])
    told = json.loads(done.stdout)
    must(told["kept"] <= told["limit"] and told["starts"] == 1, f"{told}")
    (ours, theirs), (ours_now, theirs_now) = told["sizes"]
    must(max(ours_now - ours, theirs_now - theirs) < 12 << 20, f"memory grows with the number of schemas: {told}")
    must(not list(place.iterdir()), f"files are left: {list(place.iterdir())[:3]}")
    seen.inputs += count
    seen.note(f"{count} more in one checker: {told['kept'] >> 10} KiB kept, memory +{(ours_now - ours) >> 10} KiB")


def _schemas(house: House, count: int, name: str) -> None:
    with house.client() as client:
        for place in range(count):
            schema = {
                "type": "object",
                "properties": {f"{name}{place}": {"type": "null"}},
                "required": [f"{name}{place}"],
            }
            body = {**TEXT, "max_tokens": 1, "structured_outputs": {"json": schema}}
            answer = client.ask("POST", "/v1/completions", body)
            must(answer.status == 200, f"schema {place}: {answer.status} {answer.body[:200]!r}")


@case("S29 templates from a request; endless and exploding ones of a model", secure=True)
def templates(stage: Stage, seen: Seen) -> None:
    for name in ("chat_template", "template", "jinja_template"):
        for path, body in (("/v1/chat/completions", CHAT), ("/tokenize", {"messages": CHAT["messages"]})):
            error_of(stage.plain().ask("POST", path, {**body, name: "{{ 7 }}"}), 400)
            seen.inputs += 1
    for more in ({"chat_template": "{{ 7 }}"}, {"messages": []}, {"bos_token": "x"}, {"a.b": 1}, {"a": {"b": 1}}):
        error_of(stage.plain().ask("POST", "/v1/chat/completions", {**CHAT, "chat_template_kwargs": more}), 400)
        seen.inputs += 1
    house = stage.keyed()
    with stage.watched(house, seen):
        names = [*list(TEMPLATES)[:: 3 if stage.short else 1]]
        for name in names:
            answer = _talked(house, name)
            error_of(answer, 400)
            must(answer.seconds < TEMPLATE_S + 1.0, f"{name}: ended after {answer.seconds:.2f} s")
            again = _talked(house, "tea")
            must(again.status == 200 and again.seconds < 1.0, f"after {name}: {again.status}, {again.seconds:.2f} s")
            seen.inputs += 1
        told = ("loop", "tea", "double") if stage.short else ("loop", "lipsum", "tea", "double", "tea", "slice")
        crowd = together([lambda name=name: _talked(house, name) for name in told])
        must({one.status for one in crowd} <= {200, 400, 503}, f"{[one.status for one in crowd]}")
        late = max(one.seconds for one in crowd)
        must(late < 10.0 + TEMPLATE_S, f"one of {len(told)} at a time ended after {late:.1f} s")
    must(not (ROOT / "unrendered").exists(), "a template ran a command")
    waits = sorted(_talked(house, "tea").seconds for _ in range(20))
    folded = stage.place() / "tiny"  # what is constant must not be computed where the server reads the template
    shutil.copytree(stage.model, folded)
    if not stage.short:
        source = "".join(TEMPLATES[name] for name in ("center", "percent", "format", "indent", "loop"))
        (folded / "chat_template.jinja").write_text(source)
        with stage.own(model=folded) as house:
            error_of(_talked(house, "tea"), 400)
            must(house.complete().status == 200 and house.rss() < 2 << 30, "constants are computed by the server")
    seen.note(f"{len(names)} bombs, each an error in time; a chat takes {1e3 * waits[10]:.1f} ms after them")


def _talked(house: House, content: str) -> Answer:
    return house.ask("POST", "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": content}]})


PARSED = """
import gc, json, sys, time
from infer.server.calls.formats import FORMATS

SEEDS = [
    "<tool_call>", '<tool_call>{"a":', '<tool_call>{"name":"f","arguments":{"a":"', "<tool_call", "<", "[TOOL_CALLS]",
    "[TOOL_CALLS]f", "{", "[", "[f(a='", "[f(", chr(92), " ", '{"name":"f","parameters":{"a":[', "<|python_tag|>",
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "[f(a=1), ", '[TOOL_CALLS]f[ARGS]{"a": 1}', "f(", "((",
    '[{"name": "f", "arguments": {}}, ', '"', "'", "#", chr(10), "[f(a=[", "-", "1e", "<think>", "</think>",
]
CODE = [
    "[f(a=__import__('os').system('touch {0}'))]", "[f(a=open('{0}', 'w'))]", "[f(a=(lambda: 1)())]",
    "[f(a=[x for x in ().__class__.__bases__[0].__subclasses__()])]", "[exec('import os')]", "[f(a=9**9**9)]",
    '<tool_call>{{"name": "f", "arguments": __import__("os").system("touch {0}")}}</tool_call>',
    '[TOOL_CALLS][{{"name": "f", "arguments": {{"a": !!python/object/apply:os.system ["touch {0}"]}}}}]',
]

def parsed(form, text, step):
    parser = form.parser(("f",), eager=False)
    pieces = [piece for at in range(0, len(text), step) for piece in parser.push(text[at : at + step])]
    return pieces + list(parser.flush())

gc.freeze()
worst, count = (0.0, ""), 0
for name in FORMATS:
    for seed in SEEDS:
        took = []
        for length in (int(sys.argv[2]), 4 * int(sys.argv[2])):
            times = []
            for _ in range(3):
                began = time.process_time()
                parsed(FORMATS[name], seed * (length // len(seed)), 7)
                times.append(time.process_time() - began)
            took.append(min(times))
            count += 1
        worst = max(worst, (took[1] / max(4 * took[0], 0.02), f"{name} {seed!r} {took}"))
    for code in CODE:
        for piece in parsed(FORMATS[name], code.format(sys.argv[1]), 1):
            if piece.kind == "call" and "__import__" in code:
                raise SystemExit(f"{name} takes {code} for a call")
        count += 1
print(json.dumps({"ratio": worst[0], "which": worst[1], "count": count}))
"""


@case("S30 what a model may write: calls that are none, without end, or code", secure=True)
def outputs(stage: Stage, seen: Seen) -> None:
    place, length = stage.place(), 3000 if stage.short else 30_000
    program = [sys.executable, "-c", _LIGHT + PARSED, str(place / "canary"), str(length)]
    environ = {**stage.plain().environ, "SERVE_FAULTS": ""}
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environ, cwd=ROOT)
    must(done.returncode == 0, done.stderr[-1000:])
    told = json.loads(done.stdout)
    must(told["ratio"] < 2.5, f"four times the text takes {4 * told['ratio']:.1f} times as long: {told['which']}")
    must(not (place / "canary").exists(), "what a model wrote was executed")
    seen.inputs += told["count"]
    seen.note(f"{told['count']} texts: at most {told['ratio']:.1f} times linear")
    with stage.watched(stage.keyed(), seen, quiet=True):
        _spoken(stage.keyed(), seen, place / "canary")
    for parser in () if stage.short else ("hermes", "llama", "mistral"):
        with (
            stage.own("--http.tool-parser", parser, model=hostile(stage.place(), stage.model)) as house,
            stage.watched(house, seen, quiet=True),
        ):
            _spoken(house, seen, place / "canary")


def _spoken(house: House, seen: Seen, canary: Path) -> None:
    """The same through the server: an engine whose tokens are such texts."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    body = {**CHAT, "max_tokens": 60, "tools": [{"type": "function", "function": function}], "ignore_eos": True}
    says = ["<tool_call>" * 200, '{"name":"f","arguments":{"a":"' * 100, "[f(a='" * 400, "[" * 2000, "\\" * 2000]
    says += [f"[f(a=__import__('os').system('touch {canary}'))]", "\x00\ud7ff" * 500]
    try:
        for text in says:
            house.write("says", text)
            for stream in (False, True):
                answer = house.ask("POST", "/v1/chat/completions", {**body, "stream": stream})
                must(
                    answer.status == 200 and answer.terminals() == 1, f"{text[:30]!r}: {answer.status} {answer.body!r}"
                )
                must(answer.seconds < 10.0, f"{text[:30]!r}: {answer.seconds:.1f} s")
                seen.inputs += 1
    finally:
        (house.place / "says").unlink(missing_ok=True)
    must(not canary.exists(), "what a model wrote was executed")
