"""A server on 127.0.0.1 that speaks the Messages API, to be asked through the real SDK; no key, no money.

Its answers are scripted: an iterable of answers, or a function of (request, number of the request) that gives one.

  python tests/fake_anthropic.py      a researcher to play with: it changes constants of the train.py that it is shown
"""

import json
import random
import re
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# Answers: what a script is made of


def message(*content, stop_reason="end_turn", **how):
    """A message with these blocks. `how`: cut=N ends the stream after N events, in good order; drop=N tears it;

    delay=S, or until=EVENT, keeps it back for so long; output=N is the number of tokens it is charged for.
    """
    return {"content": list(content), "stop_reason": stop_reason, **how}


def text(words, **how):
    """An answer in plain words."""
    return message({"type": "text", "text": words}, **how)


def call(tool_input, **how):
    """A call of propose_experiment, with the thinking and the words before it; a string goes out as it is."""
    thinking = {"type": "thinking", "thinking": "Let me see what limits this model.", "signature": "c2lnbmVk"}
    tool = {"type": "tool_use", "id": f"toolu_{random.randrange(16**12):012x}", "name": "propose_experiment"}
    how = {"stop_reason": "tool_use"} | how
    return message(thinking, {"type": "text", "text": "I propose this."}, tool | {"input": tool_input}, **how)


def edit(old, new, description="an edit", hypothesis="It should help.", **how):
    """A call with one edit."""
    edits = [{"old_str": old, "new_str": new}]
    return call({"description": description, "hypothesis": hypothesis, "edits": edits}, **how)


def refusal():
    return message(stop_reason="refusal")


KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


def error(status, retry_after=None, code=None, words="scripted"):
    """An error answer of the API, with an error code and a retry-after header if given."""
    body = {"type": KINDS[status], "message": words} | ({"details": {"error_code": code}} if code else {})
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return {"status": status, "headers": headers, "body": {"type": "error", "error": body}}


def spend_limit():
    return error(
        429, retry_after=86400, code="enforced_spend_limit_reached", words="You have reached your spend limit."
    )


def broken_by(kind="overloaded_error", after=3):
    """A stream that ends with an error event."""
    return edit("a", "b", cut=after, event={"type": "error", "error": {"type": kind, "message": "scripted"}})


def html():
    return {"html": "<html><body>Please log in to this network.</body></html>"}


THE_END = error(400, words="the script has no more answers")

# ---------------------------------------------------------------------------------------------------------------------
# The server


def tokens(value):
    return len(json.dumps(value)) // 4 + 1


def mistake(request):
    """What the API would not take about the turns of a request; None where all is well."""
    for message in request["messages"]:
        for block in message["content"]:
            if block["type"] == "text" and not block["text"].strip():
                return "messages: text content blocks must contain non-whitespace text"
            if block["type"] == "tool_use" and not isinstance(block["input"], dict):
                return "messages: tool_use.input: Input should be a valid dictionary"
    return None


class FakeAnthropic(ThreadingHTTPServer):
    """The server, running from its creation to close(). `requests` and `usage` are what it got and what it charged."""

    daemon_threads = True
    request_queue_size = 64  # of connections made at the same moment

    def __init__(self, script, port=0, delay=0.0):
        super().__init__(("127.0.0.1", port), Handler)
        answers = None if callable(script) else iter(script)
        self.script = script if callable(script) else lambda request, number: next(answers, THE_END)
        self.delay, self.requests, self.usage, self.cached = delay, [], [], set()
        self.greeting = text("ready")  # to a request without tools, which is in no script
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def environment(self):
        """What makes the SDK come here."""
        return {"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": "fake", "NO_PROXY": "127.0.0.1"}

    def charge(self, request, answer):
        """Usage of a request: everything up to the last cache_control is written to the cache once and then read."""
        system = request.get("system", "")
        marks = [i for i, block in enumerate(system) if isinstance(block, dict) and "cache_control" in block]
        prefix = json.dumps([request.get("tools"), system[: marks[-1] + 1]]) if marks else ""
        known, size = (request["model"], prefix) in self.cached, len(prefix) // 4
        if prefix:
            self.cached.add((request["model"], prefix))
        return {
            "input_tokens": tokens(request["messages"]) + (0 if prefix else tokens(system)),
            "cache_creation_input_tokens": 0 if known else size,
            "cache_read_input_tokens": size if known else 0,
            "output_tokens": answer.get("output", tokens(answer["content"])),
        }

    def handle_error(self, *_):
        """A client that has gone away is no event."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        if "tools" not in request:  # the loop asks, before it starts, whether anybody is there
            return self.answer(request, server.greeting)
        with server.lock:
            number = len(server.requests)
            server.requests.append({"path": self.path, "headers": dict(self.headers), **request})
            answer = server.script(request, number)
        self.answer(request, error(400, words=words) if (words := mistake(request)) else answer)

    def answer(self, request, answer):
        server = self.server
        time.sleep(answer.get("delay", server.delay))
        if "until" in answer:
            answer["until"].wait(30)
        if "html" in answer:
            return self.whole(200, answer["html"].encode(), "text/html")
        if "status" in answer:
            return self.whole(answer["status"], json.dumps(answer["body"]).encode(), **answer["headers"])
        with server.lock:
            usage = server.charge(request, answer)
        start = {"id": "msg_fake", "type": "message", "role": "assistant", "model": request["model"], "content": []}
        start |= {"stop_reason": None, "stop_sequence": None, "usage": usage | {"output_tokens": 1}}
        if not request.get("stream"):
            server.usage.append((request["model"], usage))
            whole = start | {"content": answer["content"], "stop_reason": answer["stop_reason"], "usage": usage}
            return self.whole(200, json.dumps(whole).encode())
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        charged = []  # what the events that went out have reported
        try:
            for position, event in enumerate(events(start, answer, usage)):
                if position == answer.get("drop"):
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return
                if position == answer.get("cut"):
                    break
                charged += [{"message_start": start["usage"], "message_delta": usage}.get(event["type"], {})]
                self.event(event)
                time.sleep(answer.get("pause", 0))
            if "event" in answer:
                self.event(answer["event"])
        finally:
            server.usage += [(request["model"], last) for last in [*filter(None, charged)][-1:]]
        self.wfile.write(b"0\r\n\r\n")  # last, so that whoever has the whole answer finds its usage noted

    def event(self, event):
        data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def whole(self, status, body, content_type="application/json", **headers):
        self.send_response(status)
        for name, value in {"content-type": content_type, "content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def events(start, answer, usage):
    """The events of a streamed message; texts and tool inputs arrive in pieces."""
    yield {"type": "message_start", "message": start}
    for index, block in enumerate(answer["content"]):
        kind = block["type"]
        empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}[kind]
        yield {"type": "content_block_start", "index": index, "content_block": block | empty}
        if kind == "tool_use":
            given = block["input"]
            key, whole = "partial_json", given if isinstance(given, str) else json.dumps(given)
        else:
            key, whole = kind, block[kind]
        delta = {"text": "text_delta", "thinking": "thinking_delta", "partial_json": "input_json_delta"}[key]
        for place in range(0, len(whole), 400):
            piece = {"type": delta, key: whole[place : place + 400]}
            yield {"type": "content_block_delta", "index": index, "delta": piece}
        if kind == "thinking":
            signed = {"type": "signature_delta", "signature": block["signature"]}
            yield {"type": "content_block_delta", "index": index, "delta": signed}
        yield {"type": "content_block_stop", "index": index}
    ending = {"stop_reason": answer["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": ending, "usage": {"output_tokens": usage["output_tokens"]}}
    yield {"type": "message_stop"}


# ---------------------------------------------------------------------------------------------------------------------
# By hand: a researcher that turns the constants it finds


def shown_source(request):
    """The train.py that a request shows."""
    system = request["system"]
    whole = system if isinstance(system, str) else "\n\n".join(block["text"] for block in system)
    return re.search(r"# train.py, the best so far\n\n<(data-\w+)>\n(.*)</\1>$", whole, re.DOTALL)[2]


def turn_a_constant(request, number):
    """An answer that changes one upper-case constant of the train.py shown, by a step that search would take."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from lab.researcher import find_constants, set_constants, steps

    source = shown_source(request)
    constants = find_constants(source)
    name = random.choice([name for name, text in constants.items() if steps(text)])
    new = random.choice(steps(constants[name]))
    (old_line,) = (line for line in source.splitlines() if re.match(rf"{name} *=", line))
    new_line = set_constants(old_line, {name: new})
    return edit(old_line, new_line, f"{name} {constants[name]} -> {new}", "A step to learn from.")


if __name__ == "__main__":
    server = FakeAnthropic(turn_a_constant, port=int(sys.argv[1]) if len(sys.argv) > 1 else 0, delay=1.0)
    for name, value in server.environment().items():
        print(f"export {name}={value}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print(f"{len(server.requests)} requests")
