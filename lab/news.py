"""The night on a phone: a small JSON to a URL of the owner's (ntfy, or a webhook like Slack's)."""

import json
import re
import threading
import time
import urllib.request

from lab.researcher import Say
from prepare import Trouble, one_line


class News:
    """Posts {"title", "text"}, each from a thread of its own, so that no server can hold up the night."""

    SECONDS = 5.0  # until a server is given up

    def __init__(self, url: str | None, say: Say):
        if url and not re.match(r"https?://[\w.\[\]:-]+(/\S*)?$", url):
            raise Trouble("--notify-url should look like https://ntfy.sh/my-topic")
        self.url, self.say, self.failed, self.threads, self.last = url, say, False, [], None

    def send(self, what: str, text: str):
        """Post, without waiting, unless it is no news. What looks like a path, a URL or a key stays at home."""
        if self.url and text != self.last:
            self.last = text
            text = re.sub(r"(?<!\w)~?/[^\s,;:()'\"]+|[\w-]{24,}", "...", one_line(f"{what}: {text}", 400))
            self.threads.append(threading.Thread(target=self.post, args=(text,), daemon=True))
            self.threads[-1].start()

    def post(self, text: str):
        # The headers tell ntfy, which would show the JSON as it is, what of it to show; others ignore them.
        headers = {"content-type": "application/json", "x-template": "yes"}
        headers |= {"x-title": "{{.title}}", "x-message": "{{.text}}"}
        body = json.dumps({"title": "autoresearch", "text": text}).encode()
        try:
            urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=self.SECONDS).close()
        except Exception as error:  # of whatever kind, it must not cost the night
            if not self.failed:
                self.failed = True
                self.say(f"--notify-url does not work ({one_line(error, 100)}); the loop goes on without", "yellow")

    def close(self):
        """Give the last messages their few seconds."""
        end = time.monotonic() + self.SECONDS
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
