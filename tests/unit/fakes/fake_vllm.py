"""A server of a few lines that speaks vLLM's API; how it misbehaves is set by the test, what was asked is kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

MODEL = "nvidia/Llama-3.1-8B-Instruct-FP8"
ANSWER = "The capital of France is Paris."


class Vllm(ThreadingHTTPServer):
    """`faults` names what goes wrong: see `Handler`; the rest is as vLLM has it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: set[str] = set()
        self.answer = ANSWER
        self.completion = " Paris."
        self.served = [MODEL]
        self.counters = {"generation_tokens": 100.0, "prompt_tokens": 200.0, "request_success": 3.0}
        self.names = "vllm:{}_total"
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.lock = threading.Lock()
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for seen, body, _ in self.seen if seen == path]

    def count(self, prompt: int, generated: int) -> None:
        if "counters-still" not in self.faults:
            with self.lock:
                self.counters["prompt_tokens"] += prompt
                self.counters["generation_tokens"] += generated
                self.counters["request_success"] += 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Vllm

    def log_message(self, *args: Any) -> None:
        pass

    def send(self, status: int, value: Any, kind: str = "application/json") -> None:
        raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        faults = self.server.faults
        self.server.seen.append((self.path, {}, dict(self.headers)))
        if self.path == "/health":
            self.send(503 if "sick" in faults else 200, "", "text/plain")
        elif self.path == "/v1/models":
            self.send(200, {"object": "list", "data": [{"id": name} for name in self.server.served]})
        elif self.path == "/openapi.json":
            paths = ["/health", "/v1/models", "/v1/chat/completions"]
            paths += [] if "no-completions" in faults else ["/v1/completions"]
            self.send(200, {"paths": {path: {} for path in paths}})
        elif self.path == "/metrics" and "no-metrics" not in faults:
            self.send(200, self.metrics(), "text/plain; version=1.0.0")
        else:
            self.send(404, {"detail": "Not Found"})

    def metrics(self) -> str:
        lines = ["# TYPE vllm:generation_tokens counter", 'vllm:generation_tokens_created{engine="0"} 1.7e+09']
        for name, value in self.server.counters.items():
            shown = self.server.names.format(name)
            # Two label sets: only their sum moves as it should.
            lines.append(f'{shown}{{engine="0",finished_reason="stop",model_name="{MODEL}"}} {value}')
            lines.append(f'{shown}{{engine="0",finished_reason="length",model_name="{MODEL}"}} 5.0')
        return "\n".join(lines) + "\n"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, dict(self.headers)))
        faults = self.server.faults
        if "hang" in faults:
            self.server.release.wait(20)
            return
        if "500" in faults:
            self.send(500, {"error": {"message": "EngineCore encountered an issue.", "type": "Internal", "code": 500}})
        elif "template" in faults and "chat_template_kwargs" in body:
            self.send(400, {"error": {"message": "chat_template is not supported for Mistral tokenizers."}})
        elif body["model"] not in self.server.served:
            self.send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        elif self.path == "/v1/embeddings":
            vector = {"index": 0, "embedding": [0.6, 0.8]}
            self.send(200, {"object": "list", "data": [vector], "usage": {"prompt_tokens": len(body["input"])}})
        elif body.get("stream"):
            self.stream()
        else:
            chat = self.path == "/v1/chat/completions"
            text = self.server.answer if chat else self.server.completion
            used = {"prompt_tokens": 40, "completion_tokens": max(len(text.split()), 1)}
            choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            self.server.count(40, used["completion_tokens"])
            self.send(200, {"id": "cmpl-1", "choices": [{**choice, "finish_reason": "stop"}], "usage": used})

    def stream(self) -> None:
        faults = self.server.faults
        self.send_response(200)
        kind = "application/json" if "content-type" in faults else "text/event-stream; charset=utf-8"
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in self.events():
                raw = event.encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
            if "cut" in faults:
                self.close_connection = True
                return
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # the other side has seen enough

    def events(self) -> Iterator[str]:
        faults = self.server.faults
        words = [f" {word}" for word in self.server.answer.split(" ")]
        words[0] = words[0].lstrip()

        def chunk(delta: dict[str, Any], finish: str | None = None, id: str = "chatcmpl-1") -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return f"data: {json.dumps({'id': id, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

        if "no-role" not in faults:
            yield chunk({"role": "assistant", "content": ""})
        for number, word in enumerate(words):
            if number == 3 and "malformed" in faults:
                yield 'data: {"id": "chatcmpl-1", "obj\n\n'
            if number == 3 and "not-an-event" in faults:
                yield "Internal Server Error\n\n"
            if number == 3 and "error-event" in faults:
                yield 'data: {"error": {"message": "EngineDeadError"}}\n\n'
            if number == 3 and "stalls" in faults:
                self.server.release.wait(20)
            if number == 3 and "cut" in faults:
                return
            time.sleep(0.005)
            yield chunk({"content": word}, id="other" if number == 3 and "other-id" in faults else "chatcmpl-1")
        if "no-finish" not in faults:
            yield chunk({}, "stop")
        self.server.count(40, len(words))
        used = {"prompt_tokens": 40, "completion_tokens": len(words)}
        end = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": used}
        yield f"data: {json.dumps(end)}\n\n"
        if "no-done" not in faults:
            yield "data: [DONE]\n\n"
        if "after-done" in faults:
            yield chunk({"content": "more"})


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    with Vllm() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()
