"""One request to a model behind Anthropic's Messages API, and its whole answer: what may fail, and what it costs."""

import contextlib
import itertools
import json
import os
import random
import re
import threading
import time
from pathlib import Path

from lab.researcher import Enough, Say
from prepare import Trouble, one_line

MODEL, FALLBACK = "claude-opus-5-5", "claude-sonnet-5-5"
PRICES = {  # dollars per million tokens: input, output, written to the cache for an hour, read from it
    "claude-opus-5-5": (4.00, 20.00, 8.00, 0.20),
    "claude-sonnet-5-5": (2.00, 10.00, 4.00, 0.10),
    "claude-haiku-5-5": (0.10, 0.50, 0.20, 0.01),
}
TOKENS = {  # what we call them, and what the API does
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_write": "cache_creation_input_tokens",
    "cache_read": "cache_read_input_tokens",
}
LONGEST_REPLY = 2**20  # characters of an answer
LONGEST_WAIT = 300  # seconds between two tries in an outage
LONGEST_RETRY_AFTER = 900  # that we let the API ask for
SILENCE, LONGEST_ANSWER = 600, 1800  # seconds until an answer is given up: without a byte, and in all
FATAL = ("authentication_error", "permission_error", "billing_error", "invalid_request_error", "not_found_error")


class Outage(Exception):
    """The API cannot answer now, and will later."""

    seconds = 0.0  # that it asks us to wait


class Rejected(Trouble):
    """A request that the API does not take as it is."""


class Unusable(Exception):
    """An answer that nothing can be made of; worth asking again in a new conversation."""


class Own(threading.local):
    """What concerns one thread."""

    spent = 0.0  # dollars


class Api:
    """The client of one start of the loop, for any number of threads; counts what they spend, and stops at a limit."""

    name = "llm"  # in the commits of its drafts
    longest_wait = LONGEST_WAIT

    def __init__(self, arguments, costs: Path, say: Say):
        """arguments: those of the command line; costs: a JSON-lines file that each request is written to."""
        first = arguments.model or MODEL
        self.models = first, arguments.fallback_model or (FALLBACK if first.startswith("claude-") else first)
        self.effort, self.max_cost = arguments.effort or "high", arguments.max_cost  # dollars, None for no limit
        if self.max_cost is not None and (unknown := [model for model in self.models if not prices(model)]):
            raise Trouble(f"--max-cost needs a price, and that of {unknown[0]} is not known; leave --max-cost away")
        self.costs, self.say, self.spent = costs, say, 0.0
        self.own, self.voice = Own(), threading.Lock()
        self.money, self.in_flight = threading.Condition(), []  # what each request in flight may cost at most
        url = os.environ.get("ANTHROPIC_BASE_URL", "").strip()
        self.elsewhere = bool(url) and not re.match(r"https://([\w-]+\.)*anthropic\.com(?=[:/]|$)", url)
        if self.elsewhere and not re.match(r"https?://[^/]", url):
            raise Trouble(f"ANTHROPIC_BASE_URL is {url!r}; it should look like http://127.0.0.1:11434, without /v1")
        self.address = one_line(re.sub("//[^/@]*@", "//", url), 80)  # without a password
        known = any(map(os.environ.get, ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")))
        keys = {"api_key": "none"} if self.elsewhere and not known else {}
        try:
            import anthropic  # takes a second
            import httpx2

            self.client = anthropic.Anthropic(max_retries=0, timeout=httpx2.Timeout(SILENCE, connect=20.0), **keys)
        except ImportError as error:
            raise Trouble(f"the llm researcher needs the package anthropic ({error}); run: pip install -e .") from None
        except anthropic.AnthropicError as error:
            raise Trouble(f"the credentials for the API cannot be used: {one_line(error, 200)}") from None
        self.has_key = bool(self.client.api_key or self.client.auth_token or self.client.credentials)

    def check(self):
        """Ask for one word. Raises Trouble where the API refuses, as it would all night."""
        question = [{"role": "user", "content": "Answer with the word ready."}]
        self.say(f"asking {self.models[0]} for one word, to see that it answers")
        try:
            self.send({"model": self.models[0], "max_tokens": 16, "messages": question, "timeout": 30.0})
        except Enough:  # the loop will say so when a draft is due
            pass
        except (Outage, Unusable) as failure:
            self.say(f"{failure}; starting all the same, and asking again when a draft is due", "yellow")

    def is_plain(self, model) -> bool:
        """Whether a model knows neither Claude's thinking nor its cache, and may not even call tools."""
        return self.elsewhere and not model.startswith("claude-")

    def ask(self, request):
        """The answer to a request, however long the API is away. Raises Trouble, Enough or Unusable."""
        started, speaks = time.monotonic(), False  # one of those whom an outage keeps waiting speaks of it
        try:
            for failures in itertools.count():
                try:
                    answer = self.send(request)
                except Outage as outage:
                    seconds = max(waiting_time(failures), min(outage.seconds, LONGEST_RETRY_AFTER))
                    speaks = speaks or self.voice.acquire(blocking=False)
                    if speaks:
                        self.say(f"{outage}; trying again in {seconds:.0f} s", "yellow")
                    time.sleep(seconds)
                    continue
                if speaks and time.monotonic() - started > 60:
                    self.say(f"the API answers again, after {(time.monotonic() - started) / 60:.0f} minutes")
                return answer
        finally:
            if speaks:
                self.voice.release()

    def send(self, request):
        """One request and its whole answer; counts what it cost, even if the answer breaks off.

        Raises Outage, Unusable, Trouble, and Enough instead if the longest possible answer could exceed max_cost.
        """
        import anthropic
        import httpx2

        streams, outcome = [], "broken"
        with self.reserved(request):
            try:
                answer = self.receive(request, streams)
                outcome = answer.stop_reason
                return answer
            except anthropic.APIStatusError as error:
                raise judged(error) from None
            except (anthropic.APIConnectionError, httpx2.HTTPError, OSError) as error:
                where = f"ANTHROPIC_BASE_URL, {self.address}," if self.elsewhere else "the API"
                raise Outage(f"no connection to {where} ({one_line(error.__cause__ or error, 120)})") from None
            except anthropic.APIError as error:
                raise Outage(f"the API's answer is none ({one_line(error, 120)})") from None
            except anthropic.AnthropicError as error:
                raise Trouble(f"the credentials for the API cannot be used: {one_line(error, 200)}") from None
            except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                # What the SDK makes of bytes that are not what the Messages API says.
                if any(map(snapshot, streams)):
                    raise Unusable(f"the answer is garbled ({one_line(error, 120)})") from None
                raise Outage("what answers is not the Messages API; is there a proxy, or a wrong URL?") from None
            finally:
                for message in filter(None, map(snapshot, streams)):
                    self.count(request["model"], message.usage, outcome)

    @contextlib.contextmanager
    def reserved(self, request):
        """Set the cost of the longest possible answer, with nothing cached, aside while the request is in flight.

        Where max_cost has no room for it beside the other requests in flight, it waits for what they leave. Raises
        Enough where there is no room without them either.
        """
        if self.max_cost is None:
            yield
            return
        paid = prices(request["model"])
        most = (len(json.dumps(request)) / 3 * max(paid[0], paid[2]) + request["max_tokens"] * paid[1]) / 1e6
        with self.money:
            while self.spent + most <= self.max_cost < self.spent + sum(self.in_flight) + most:
                self.money.wait()
            if self.spent + most > self.max_cost:
                spent = f"${self.spent:.2f} of --max-cost {self.max_cost:g} are spent"
                raise Enough(f"{spent}, and one more request may cost ${most:.2f}")
            self.in_flight.append(most)
        try:
            yield
        finally:
            with self.money:
                self.in_flight.remove(most)
                self.money.notify_all()

    def receive(self, request, streams):
        """Read the answer to a request to its end; the stream is put into `streams` as soon as it is there."""
        size, deadline = 0, time.monotonic() + LONGEST_ANSWER
        with self.client.messages.stream(**request) as stream:
            streams.append(stream)
            for event in stream:
                pieces = (getattr(event, name, None) for name in ("text", "partial_json", "thinking"))
                size += sum(len(piece) for piece in pieces if isinstance(piece, str))
                if size > LONGEST_REPLY:
                    raise Unusable("the answer does not end")
                if time.monotonic() > deadline:
                    raise TimeoutError("the answer takes too long")
            answer = stream.get_final_message()
        if answer.stop_reason is None:  # the connection was closed in good order, in the middle
            raise Outage("the answer broke off")
        return answer

    def count(self, model, usage, outcome):
        """Add one request to what this start has spent and to the file of costs."""
        told = {name: getattr(usage, field, None) for name, field in TOKENS.items()}
        tokens = {name: min(max(0, n), 10**9) if isinstance(n, int) else 0 for name, n in told.items()}
        usd = sum(tokens[name] * price for name, price in zip(TOKENS, prices(model) or (0,) * 4)) / 1e6
        line = {"time": int(time.time()), "model": model, "outcome": outcome, **tokens, "usd": round(usd, 8)}
        self.costs.parent.mkdir(parents=True, exist_ok=True)
        self.own.spent += usd
        with self.money:
            self.spent += usd
            with open(self.costs, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def sent_back(content):
    """The blocks of an answer as the next request repeats them. Raises Unusable where the API could not take them."""
    kinds = {"text": {"text": str}, "thinking": {"thinking": str}, "tool_use": {"id": str, "input": dict}}
    try:
        for block in content:
            for name, kind in kinds.get(block.type, {}).items():
                if not isinstance(getattr(block, name), kind):
                    raise TypeError(f"{block.type} with a strange {name}")
        blocks = [block.to_dict() for block in content]
        size = len(json.dumps(blocks, ensure_ascii=False, allow_nan=False).encode())
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise Unusable(f"the answer cannot be repeated ({one_line(error, 120)})") from None
    if size > LONGEST_REPLY:
        raise Unusable(f"the answer has {size:,} bytes")
    blocks = [block for block in blocks if block["type"] != "text" or block["text"].strip()]  # the API wants it so
    return blocks or [{"type": "text", "text": "-"}]


def prices(model):
    """The row of PRICES for a model's name, dated or not; None for a model whose price is not known."""
    return next((row for name, row in PRICES.items() if model.startswith(name)), None)


def waiting_time(failures, longest=LONGEST_WAIT):
    """Seconds to wait after so many failures in a row: doubled each time, up to a limit, and never the same twice."""
    return min(longest, 2.0 ** min(failures, 30)) * random.uniform(0.5, 1)


def snapshot(stream):
    """The message as far as a stream has brought it, or None."""
    with contextlib.suppress(AssertionError):
        return stream.current_message_snapshot


def judged(error):
    """What an error that the API reports means for the night: Trouble, which ends it, or an Outage."""
    code, kind, said = error.status_code, str(error.type or ""), one_line(error.api_message or error.message, 200)
    spent = "spend_limit" in str(error.error_code or "") or "spend limit" in said.lower()
    if spent or kind in FATAL or (400 <= code < 500 and code not in (408, 409, 425, 429, 499)):
        way = Rejected if code in (400, 413, 422) else Trouble
        return way(f"the API refuses to go on ({code} {kind}): {said}; mend that, and the same command carries on")
    outage = Outage(f"the API cannot answer ({code} {kind}): {said}")
    with contextlib.suppress(ValueError):
        outage.seconds = float(error.response.headers.get("retry-after", 0))
    return outage
