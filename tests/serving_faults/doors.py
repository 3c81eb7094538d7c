"""Who may ask, for what, and under which name: S24, S25, S35."""

from __future__ import annotations

import contextlib
import socket
import time

from serving_faults.house import House
from serving_faults.stage import KEY, OTHER, Stage
from serving_faults.suite import Seen, case, must
from serving_faults.wire import Client, head

ROUTES = {
    "/": "GET",
    "/v1/models": "GET",
    "/v1/models/tiny": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/v1/responses": "POST",
    "/v1/embeddings": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/health": "GET",
    "/health/ready": "GET",
    "/metrics": "GET",
    "/version": "GET",
    "/openapi.json": "GET",
}
DISGUISES = (
    *(
        "//v1/models",
        "///v1/models",
        "/./v1/models",
        "/v1/../v1/models",
        "/v1//models",
        "/v1%2fmodels",
        "/%76%31/models",
    ),
    *("/V1/MODELS", "/v1/models/", "/v1/models;x=/health/live", "/v1/models?/health/live", "/v1/models#/health/live"),
    *("/health/live/", "//health/live", "/HEALTH/LIVE", "/health%2flive", "/health/live%00", "/health/live%20"),
    *("/health/live/../../v1/models", "/health/live%2f..%2fready", "/health/live;/v1/models", "/health/live/v1/models"),
    *("*", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/../infer/server/auth.py", "/nothing"),
)
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "CONNECT", "BREW")
WRONG = (
    *("", "Bearer", "Bearer ", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer x{KEY}", f"Basic {KEY}"),
    *(
        f"Bearer {KEY},{OTHER}",
        f"Bearer {KEY} {OTHER}",
        f"Bearer {KEY.upper()}",
        "Bearer " + "a" * 5000,
        "Bearer \xff\xfe",
    ),
    *(f"bearer:{KEY}", f"Token {KEY}", "Bearer null", "Bearer undefined", "Bearer 0", "Bearer []", "Bearer *"),
)
ADMIN = (
    *("/sleep", "/wake_up", "/is_sleeping", "/reset_prefix_cache", "/reset_mm_cache", "/flush_cache", "/clear_cache"),
    *("/start_profile", "/stop_profile", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter"),
    *("/unload_lora_adapter", "/update_weights", "/update_weights_from_disk", "/update_weights_from_tensor"),
    *("/update_weights_from_distributed", "/init_weights_update_group", "/get_weights_by_name", "/collective_rpc"),
    *("/release_memory_occupation", "/resume_memory_occupation", "/server_info", "/get_server_info", "/server_args"),
    *(
        "/get_model_info",
        "/get_internal_state",
        "/set_internal_state",
        "/configure_logging",
        "/start_expert_distribution",
    ),
    *("/dump_expert_distribution_record", "/open_session", "/close_session", "/abort_request", "/pause", "/resume"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/freeze_gc", "/slow_down", "/shutdown", "/stop", "/restart"),
    *("/admin", "/debug", "/debug/pprof", "/docs", "/redoc", "/invocations", "/generate", "/load", "/set_trace_level"),
    *("/v1/files", "/v1/fine_tuning/jobs", "/v1/batches", "/hf3fs", "/engine/v1/sleep", "/kv_cache", "/env", "/config"),
)


def _status(house: House, method: str, target: str, *lines: str, host: str | None = "localhost") -> tuple[int, str]:
    """The status and body of a request that is sent as it is."""
    first = [f"{method} {target} HTTP/1.1"] + ([f"Host: {host}"] if host is not None else [])
    with Client(house.port, timeout=10) as client:
        client.send(("\r\n".join([*first, "Connection: close", *lines]) + "\r\n\r\n").encode("latin-1"))
        answer = client.answer(without_body=method == "HEAD")
    return answer.status, answer.body.decode("latin-1")


@case("S24 no key, wrong keys, disguised paths, other methods", secure=True)
def keys(stage: Stage, seen: Seen) -> None:
    house = stage.keyed()
    with stage.watched(house, seen):
        routes = house.ask("GET", "/openapi.json").json()["paths"]
        for path in {*ROUTES, *(path.replace("{name}", "tiny").replace("{model}", "tiny") for path in routes)} - {
            "/health/live"
        }:
            for value in (None, *WRONG):
                lines = () if value is None else (f"Authorization: {value}",)
                status, body = _status(house, ROUTES.get(path, "GET"), path, *lines)
                must(status == 401, f"{path} with {value!r}: {status}")
                must("models" not in body and "tiny" not in body, f"{path}: a 401 says {body!r}")
                seen.inputs += 1
        for target in (*DISGUISES, *(f"http://{host}/v1/models" for host in ("localhost", "evil", "x@localhost"))):
            for method in METHODS:
                status, _ = _status(house, method, target)
                must(status in (400, 401), f"{method} {target}: {status}")
                seen.inputs += 1
        for method in METHODS:
            status, _ = _status(house, method, "/health/live")
            must(status in (200, 400, 405) if method != "GET" else status == 200, f"{method} /health/live: {status}")
        status, _ = _status(house, "GET", "http://localhost/health/live")
        must(status == 401, f"absolute-form /health/live: {status}")
        twice = (f"Authorization: Bearer {KEY}", f"Authorization: Bearer {OTHER}")
        must(_status(house, "GET", "/v1/models", *twice)[0] == 401, "two keys at a time are let in")
        for name in ("X-API-Key", "Api-Key", "X-Forwarded-User", "X-Original-URL", "X-Rewrite-URL", "Cookie"):
            must(_status(house, "GET", "/v1/models", f"{name}: {KEY}")[0] == 401, f"{name} opens")
        must(_status(house, "GET", f"/v1/models?api_key={KEY}")[0] == 401, "a key in the query opens")
        for key in (KEY, OTHER):
            must(
                _status(house, "GET", "/v1/models", f"Authorization: bearer {key}")[0] == 200, "a known key is refused"
            )
            must(_status(house, "GET", "/v1/models", f"Authorization: Bearer {key}", host="any.name")[0] == 200, "Host")
        for target in ("/v1/realtime", "/v1/chat/completions", "/v1/completions", "/ws", "/v1/responses"):
            upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
            status, _ = _status(house, "GET", target, *upgrade, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
            must(status in (400, 401, 403), f"WebSocket {target} without a key: {status}")
            seen.inputs += 1
        seen.note(f"{seen.inputs} ways in tried; " + _timing(house))


def _timing(house: House) -> str:
    """A key that is nearly right takes as long as one that is all wrong; told only, as machines are noisy."""
    times: dict[str, list[float]] = {"near": [], "far": []}
    with house.client() as client:
        for _ in range(150):
            for name, key in (("near", KEY[:-1] + "X"), ("far", "X" + KEY[1:])):
                data = head("GET", "/version", {"Authorization": f"Bearer {key}"})
                began = time.perf_counter()
                client.send(data)
                client.answer()
                times[name].append(time.perf_counter() - began)
    near, far = (sorted(times[name])[75] * 1e6 for name in ("near", "far"))
    return f"nearly right key {near:.0f} us, all wrong {far:.0f} us"


@case("S24b hostile Host without keys (DNS rebinding)", secure=True)
def hosts(stage: Stage, seen: Seen) -> None:
    house = stage.plain()
    with stage.watched(house, seen):
        strangers = ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "evil.example:80", "localhost@evil"]
        strangers += [
            "xn--lcalhost-w4a",
            "locaIhost",
            "127.0.0.1 evil",
            "evil,localhost",
            "[::1",
            "0x7f000001.evil",
            "-",
        ]
        strangers += [
            "localhost:80:evil.example",
            "evil.example#localhost",
            "::1:evil",
            "evil.127.0.0.1",
            "\xe9vil",
            "",
        ]
        for path, method in ROUTES.items():
            for host in strangers if path == "/v1/models" else strangers[:2]:
                status, body = _status(house, method, path, host=host)
                must(status in (400, 403), f"{path} under {host!r}: {status} {body[:100]}")
                seen.inputs += 1
        mine = [
            "localhost",
            "LOCALHOST",
            "localhost:9",
            "127.0.0.1",
            "127.0.0.1:80",
            "[::1]:80",
            "a.localhost",
            "192.0.2.7",
        ]
        for host in mine:
            must(_status(house, "GET", "/v1/models", host=host)[0] == 200, f"{host} is refused")
        must(_status(house, "GET", "/health/live", host="probe.example")[0] == 200, "liveness asks for a name")
        seen.note(f"{seen.inputs} strange names refused, {len(mine)} own ones taken")


@case("S25 no routes to administer, profile, adapt or update", secure=True)
def admin(stage: Stage, seen: Seen) -> None:
    for house, wanted in ((stage.plain(), (404,)), (stage.keyed(), (401,))):
        for path in ADMIN:
            for method in ("GET", "POST"):
                status, _ = _status(house, method, path, "Content-Length: 0")
                must(status in wanted, f"{method} {path}: {status}")
                seen.inputs += 1
    documented = set(stage.plain().ask("GET", "/openapi.json").json()["paths"])
    must(not documented & set(ADMIN), f"documented: {documented & set(ADMIN)}")
    seen.note(f"{len(ADMIN)} names that others have: 404 without keys, 401 with")


def _own_address(stage: Stage) -> None:
    """The port for those who run the server: a key of its own, and nothing of clients in its metrics."""
    key, place = "sk-admin-key-0123456789", stage.place()
    (place / "admin").touch(0o600)
    (place / "admin").write_text(key)
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    with stage.own("--admin-port", str(port), "--admin-key-file", str(place / "admin")) as house:
        must(house.complete(prompt="canary").status == 200, "it does not complete")
        with Client(port) as client:
            must(client.ask("GET", "/metrics").status == 401, "its own address asks for no key")
        with Client(port) as client:
            page = client.ask("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
        must(page.status == 200 and b"lockstep_requests_total" in page.body and b"canary" not in page.body, f"{page}")
        for path in ("/engines", "/drain", "/restart"):
            status, _ = _status(house, "GET", path)
            must(status == 404, f"{path} is on the port of clients: {status}")
        with contextlib.suppress(OSError), Client(port) as client:
            client.send(head("GET", "/metrics", host="evil.example"))
            must(client.answer().status == 401, "a stranger's name")


@case("S35 /metrics: fixed labels, nothing of requests, an address of its own", secure=True)
def metrics(stage: Stage, seen: Seen) -> None:
    house = stage.keyed()
    with stage.watched(house, seen):
        names = set(house.metrics())
        for text in ("canary-prompt-in-metrics", "canary\n} 5"):
            house.complete(prompt=text, logprobs=None)
            house.complete(prompt=text, model=text)
            house.ask("GET", f"/canary/{text.encode().hex()}")
            house.ask("POST", "/v1/completions", {"canary": text}, {"X-Canary": "canary", "User-Agent": "canary"})
        page = house.ask("GET", "/metrics").body.decode()
        must("canary" not in page and KEY not in page and "/" not in page.replace("text/plain", ""), "a name is in it")
        more = set(house.metrics()) - names
        must(not more, f"labels are not fixed: {sorted(more)[:5]}")
        must(_status(house, "GET", "/metrics")[0] == 401, "/metrics is open")
    if not stage.short:
        with stage.own("--http.metrics", "false") as house:
            must(house.ask("GET", "/metrics").status == 404, "--http.metrics false leaves it")
        _own_address(stage)
    seen.note(f"{len(names)} series, the same before and after")
