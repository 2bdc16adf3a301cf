"""A language model on 127.0.0.1 that does what a test says: enough of Anthropic's Messages API.

`claude` with ANTHROPIC_BASE_URL set to `LlmServer.url` needs no account and no network. The server
keeps no state about conversations: which step is due follows from the number of tool results in the
request, so that retries, side requests and several agents at once cannot disturb each other.
"""

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """An answer instead of the model's."""

    status: int
    kind: str = "api_error"
    message: str = "scripted"
    headers: Mapping[str, str] = {}


class Call(NamedTuple):
    """The model runs a command with claude's tool Bash."""

    command: str


class Say(NamedTuple):
    """The model ends its turn with words."""

    words: str


Answer = Refusal | Call | Say
Script = Callable[[str, int], Answer]  # (what the user said, steps done so far) → what comes next
TOKENS = {"input_tokens": 1000, "output_tokens": 200}


def block_events(answer: Answer, number: int, model: str) -> Iterator[dict[str, Any]]:
    """The stream of one message with one block."""
    delta: dict[str, Any]
    if isinstance(answer, Call):
        block = {"type": "tool_use", "id": f"toolu_{number}", "name": "Bash", "input": {}}
        arguments = {"command": answer.command, "description": "Work"}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
    else:
        block = {"type": "text", "text": ""}
        delta = {"type": "text_delta", "text": answer.words if isinstance(answer, Say) else ""}
    stop = "tool_use" if isinstance(answer, Call) else "end_turn"
    message = {
        "id": f"msg_{number}", "type": "message", "role": "assistant", "model": model, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": {**TOKENS, "output_tokens": 1},
    }  # fmt: skip
    yield {"type": "message_start", "message": message}
    yield {"type": "content_block_start", "index": 0, "content_block": block}
    yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}, "usage": TOKENS}
    yield {"type": "message_stop"}


def words_of(messages: Sequence[dict[str, Any]]) -> tuple[str, int]:
    """All that the user wrote, and how many tool results there are."""
    texts, results = [], 0
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            results += part["type"] == "tool_result"
            if message["role"] == "user" and part["type"] == "text":
                texts.append(part["text"])
    return "\n".join(texts), results


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "LlmServer"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is for the tests."""

    def do_HEAD(self) -> None:
        self.reply(200, "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.path.partition("?")[0].endswith("/v1/messages"):
            return self.reply(200, "application/json", '{"input_tokens": 10}')  # count_tokens
        text, done = words_of(body["messages"])
        offered = {tool.get("name") for tool in body.get("tools", ())}
        answer = self.server.answer(text, done) if "Bash" in offered else Say("A title")
        if isinstance(answer, Refusal):
            error = {"type": "error", "error": {"type": answer.kind, "message": answer.message}}
            return self.reply(answer.status, "application/json", json.dumps(error), answer.headers)
        events = block_events(answer, self.server.next_number(), body["model"])
        rows = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]
        return self.reply(200, "text/event-stream", "".join(rows))

    def reply(self, status: int, kind: str, text: str = "", headers: Mapping[str, str] | None = None) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class LlmServer(ThreadingHTTPServer):
    """Serves until `close`; `script` decides about every request that offers tools."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Script = lambda text, done: Say("Nothing to do.")
        self.asked: list[tuple[str, int]] = []  # text and step of every request with tools
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, text: str, done: int) -> Answer:
        with self._lock:
            self.asked.append((text, done))
            return self.script(text, done)

    def next_number(self) -> int:
        return next(self._numbers)  # one step of the interpreter

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed in the middle of an answer is part of the tests."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
