"""What the owner sees: the live view, the news, the report, all through the command line."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, tiny_repository
from fake_anthropic import FakeAnthropic, edit
from test_loop import HEADER, refused

from lab.news import News

COMMAND = [sys.executable, "agent_loop.py"]
QUICK = ["--task", "tiny", "--tag", "t", "--greedy", "--max-experiments", "2"]


class Mailbox(ThreadingHTTPServer):
    """A webhook that keeps what is posted to it; while `hangs` is set, it lets everybody wait."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Letter)
        self.letters, self.hangs, self.url = [], threading.Event(), f"http://127.0.0.1:{self.server_port}/topic-4711"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Letter(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        self.server.letters.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if self.server.hangs.is_set():
            threading.Event().wait(60)
        self.send_response(200)
        self.end_headers()


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A short night on a terminal: the repository, what the terminal got, the news, and a report from its middle."""
    repository, mailbox = tiny_repository(tmp_path_factory.mktemp("night") / "repository"), Mailbox()
    train_py = repository / "train.py"
    train_py.write_text(train_py.read_text().replace("LR = 0.001", "LR = 0.00001"))  # too low on any machine
    subprocess.run(["git", "commit", "-qam", "start lower"], cwd=repository, check=True)
    model = FakeAnthropic(
        [edit("LR = 0.00001", "LR = 0.05", "raise the [LR] at last"), edit("CRASH = 0", "CRASH = 1", "break it")]
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = os.environ | model.environment() | {"TERM": "xterm-256color"}
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [*COMMAND, *QUICK, "--hours", "1", "--max-cost", "5", "--notify-url", mailbox.url]
    loop = subprocess.Popen(command, cwd=repository, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen, middle = b"", None
    try:
        while data := os.read(ours, 2**16):
            screen += data
            if not middle and (repository / "results.tsv").exists():
                middle = report(repository, "--json")
    except OSError:  # how a terminal says that nobody is left at the other end
        pass
    model.close()
    mailbox.shutdown()
    assert loop.wait() == 0, screen.decode()
    return repository, screen.decode(), mailbox, middle


def report(repository, *arguments):
    """The finished report command, 80 columns wide."""
    command, environment = [*COMMAND, "report", *arguments], os.environ | {"COLUMNS": "80"}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=60)


def test_a_terminal_shows_the_running_experiment_and_keeps_the_lines(night):
    _, screen, _, _ = night
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen)
    assert re.search(r"now   \w{7} baseline", plain) and re.search(r"run 1: loss \d\.\d+", plain) and "━" in plain
    assert re.search(r"next  (being drafted|ready: raise the \[LR\] at last)", plain)
    assert re.search(r"best  \d\.\d{6} \w{7}, the baseline", plain) and "0.00%" not in plain
    assert re.search(r"best  \d\.\d{6} \w{7}, \+\d+\.\d\d% better than the baseline", plain)
    assert re.search(r"of \$5.00 spent, ends about \w+ \d\d:\d\d", plain)
    assert re.search(r"\d\d:\d\d:\d\d \w{7} 0?\d\.\d+ .*keep", plain)
    assert "\x1b[?25l" in screen and screen.rstrip().rfind("\x1b[?25h") > screen.rfind(
        "\x1b[?25l"
    )  # the cursor is back
    drawn = [line for line in plain.replace("\r", "\n").split("\n") if line.startswith(("now", "next", "best", "pace"))]
    assert drawn and max(map(len, drawn)) <= 80


def test_a_log_has_timestamped_lines_and_no_escape_codes(night):
    repository, _, _, _ = night
    again = [*COMMAND, *QUICK, "--researcher", "search", "--notify-url", "http://127.0.0.1:9/hook"]
    ended = subprocess.run(again, cwd=repository, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "\x1b" not in ended.stdout + ended.stderr
    assert re.search(r"^\d\d:\d\d:\d\d the end: tag t holds its 2 experiments$", ended.stdout, re.MULTILINE)
    assert ended.stdout.count("--notify-url does not work") == 1
    assert (
        re.search(r"^\d\d:\d\d:\d\d speed: slow today; wait$", ended.stdout, re.MULTILINE)
        and "disk" not in ended.stdout
    )


def test_the_news_are_a_new_best_and_the_end_without_paths_or_keys(night):
    repository, _, mailbox, _ = night
    best, end = mailbox.letters
    assert best["text"].startswith("new best: val_bpb ") and "raise the [LR] at last" in best["text"]
    assert end["text"].startswith("the end: ") and "holds its 2 experiments" in end["text"]
    assert str(repository) not in str(mailbox.letters) and "fake" not in str(mailbox.letters)


def test_news_do_not_wait_for_a_server_that_hangs_and_tell_no_secrets():
    mailbox, said = Mailbox(), []
    mailbox.hangs.set()
    news = News(mailbox.url, lambda text, style: said.append(text))
    news.SECONDS = 0.3
    news.send(
        "stopped", "/home/me/runs/t was scored by (/etc/x); the key sk-ant-api03-abcdefghijklmnop is bad, 1/8 too"
    )
    news.send("stopped", "again")
    news.close()
    for thread in news.threads:
        thread.join()
    assert len(said) == 1 and "does not work" in said[0] and "4711" not in said[0]
    assert {letter["text"] for letter in mailbox.letters} == {
        "stopped: ... was scored by (...); the key ... is bad, 1/8 too",
        "stopped: again",
    }
    mailbox.shutdown()


def test_trouble_is_news_too_and_a_wrong_url_is_refused(repository, run):
    mailbox = Mailbox()
    with open(repository / "train.py", "a") as file:
        file.write("# mine\n")
    search = [*COMMAND, *QUICK, "--researcher", "search", "--notify-url"]
    refused(run(*search, mailbox.url, cwd=repository), "not committed")
    (letter,) = mailbox.letters
    assert "needs you" in letter["text"] and "not committed" in letter["text"]
    refused(run(*search, "file:///etc/passwd", cwd=repository), "--notify-url should look like")
    mailbox.shutdown()


def test_a_machine_without_the_packages_is_told_how_to_get_them(run):
    refused(run(sys.executable, "-S", ROOT / "agent_loop.py"), "is not installed; run: pip install -e .")


def test_the_report_tells_the_story_in_one_screen(night):
    repository, _, _, _ = night
    told = report(repository)
    assert told.returncode == 0 and told.stderr == ""
    for part in ("2 experiments: 1 kept, 0 discarded, 1 crashed", "raise the [LR] at last"):
        assert part in told.stdout
    assert re.search(r"baseline \d\.\d{6} -> best \d\.\d{6}, \d\.\d{6} \(\d+\.\d\d%\) lower", told.stdout)
    assert "crashing as asked" in told.stdout and "training" in told.stdout and "between trials" in told.stdout
    assert len(told.stdout.splitlines()) <= 40 and "researcher: 3 requests, $0.0" in told.stdout
    picture = (repository / "progress.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and width > 1000 and height > 800  # with the loss curves


def test_the_report_as_json_is_one_object_and_works_in_the_middle_of_a_night_and_from_any_branch(night):
    repository, _, _, middle = night
    assert middle.returncode == 0 and json.loads(middle.stdout)["baseline"]["description"] == "baseline"
    subprocess.run(["git", "checkout", "-q", "main"], cwd=repository, check=True)
    told = json.loads(report(repository, "--json").stdout)
    subprocess.run(["git", "checkout", "-q", "autoresearch/t"], cwd=repository, check=True)
    assert (told["tag"], told["task"], told["budget"]) == ("t", "tiny", 0.8)
    assert (told["experiments"], told["keep"], told["discard"], told["crash"]) == (2, 1, 0, 1)
    assert told["gain"] == pytest.approx(told["baseline"]["val_bpb"] - told["best"]["val_bpb"])
    assert [row["status"] for row in told["rows"]] == ["keep", "keep", "crash"]
    assert told["failures"][0]["reason"].endswith("RuntimeError: crashing as asked")
    assert told["seconds"]["training"] > 1.5 and told["cost"]["requests"] == 3


def test_the_report_as_a_diff_is_the_change_of_train_py_that_git_can_apply(night, run):
    repository, _, _, _ = night
    told = report(repository, "--diff")
    assert "-LR = 0.00001" in told.stdout and "+LR = 0.05" in told.stdout and "\x1b" not in told.stdout
    (repository / "change").write_text(told.stdout)
    assert run("git", "apply", "--check", "--reverse", "change", cwd=repository).returncode == 0


UPSTREAM = f"""{HEADER}
baseline\t0.997900\t44.0\tKEEP\tbaseline
bea057b\t0.986041\t43.9\tkeep \thalve batch 524K to 262K $\\frac{{$ [red]
187e419\t0.982603\t60.2\tdiscard\tadd 5% warmup
d70987b\t3.215849\t60.2\tdiscard\tadd 2% warmup (any warmup hurts) \x1b[2J
e05a87d\t0.000000\t0.0\tcrash\tbatch 131K ({"a long story " * 20})
"""


@pytest.mark.parametrize(
    ("book", "parts"),
    [
        (None, ["has no results yet"]),
        (HEADER + "\n", ["has no results yet"]),
        (f"{HEADER}\ne05a87d\t0.000000\t0.0\tcrash\tbaseline\n", ["nothing was kept"]),
        (
            UPSTREAM,
            ["baseline 0.997900 -> best 0.986041", "$\\frac{$ [red]", "miss", "+0.003438  add 5% warmup"],
        ),
    ],
)
def test_books_that_no_tag_owns_are_told_too(book, parts, repository):
    if book is not None:
        (repository / "results.tsv").write_text(book)
    told, data = report(repository), report(repository, "--json")
    assert told.returncode == 0 and not told.stderr, told.stderr
    assert all(part in told.stdout for part in parts) and "\x1b" not in told.stdout
    assert all(len(line) <= 80 for line in told.stdout.splitlines() if "..." in line)
    assert (repository / "progress.png").exists() == (book == UPSTREAM)
    assert len(json.loads(data.stdout)["rows"]) == max(0, (book or "").count("\n") - 1)
    refused(report(repository, "--diff"), "no commit of this repository" if book == UPSTREAM else "no results yet")


# ---------------------------------------------------------------------------------------------------------------------
# As a page

HOSTILE = '<img src=x onerror=alert(1)> & "quotes" </pre><script>alert(2)</script>'


class Seen(HTMLParser):
    """The tags of a page in order, and its text; fails where one is closed that was not open."""

    VOID = {"meta", "input", "circle", "polyline", "th", "td", "tr", "img", "p"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_tells_the_night_with_every_word_escaped_and_follows_it_from_then_on(stage):
    train_py = stage / "train.py"
    apart = train_py.read_text().replace("LR = 0.001  # far", "LR = 0.001\n\n# far")
    train_py.write_text(apart)
    subprocess.run(["git", "commit", "-qam", "apart"], cwd=stage, check=True)
    answers = [
        edit("LR = 0.001", "LR = 0.01  # </pre><b>", HOSTILE, HOSTILE),
        edit("CRASH = 0", f"CRASH = 1  # {HOSTILE}", "break it"),
        edit("WIDTH = 32", "WIDTH = 64", "widen"),
    ]
    model = FakeAnthropic(answers)
    night = [*COMMAND, *QUICK[:-2], "--budget", "0.01", "--max-experiments"]
    options = {"cwd": stage, "env": os.environ | model.environment(), "capture_output": True, "text": True}
    assert subprocess.run([*night, "2"], **options).returncode == 0 and not (stage / "report.html").exists()
    told = report(stage, "--html")
    assert told.returncode == 0 and told.stdout == "page: report.html\n"
    page = (stage / "report.html").read_text()
    seen = Seen(page)
    assert (
        [tag for tag, _ in seen.tags].count("script") == 1 and "img" not in dict(seen.tags) and "b" in dict(seen.tags)
    )
    assert not [value for _, names in seen.tags for name, value in names.items() if name in ("src", "href", "onerror")]
    assert HOSTILE in seen.text and "+LR = 0.01  # </pre><b>" in seen.text and "crashing as asked" in seen.text
    assert "://" not in page and len([tag for tag, names in seen.tags if tag == "circle"]) == 3
    assert subprocess.run([*night, "3"], **options).returncode == 0
    model.close()
    assert "widen" in (stage / "report.html").read_text()
    with open(stage / "results.tsv", "a") as file:
        file.write("fffffff\t9.000000\t0.1\tdiscard\tgit does not know it\n")
    assert report(stage, "--html").returncode == 0 and "git does not know it" in (stage / "report.html").read_text()
    assert subprocess.run(["git", "status", "--porcelain", "report.html"], **options).stdout == ""


def test_slots_that_end_at_the_same_moment_leave_one_whole_page(stage):
    (stage / "report.html").touch()
    slots = ["--launch", "env {}", "--parallel", "3", "--researcher", "search", "--max-experiments", "9"]
    ended = subprocess.run(
        [*COMMAND, *QUICK[:-2], "--budget", "0.01", *slots], cwd=stage, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    seen = Seen((stage / "report.html").read_text())
    assert len([tag for tag, _ in seen.tags if tag == "circle"]) == 10 and not list(stage.glob("*.tmp"))
