"""The exam against train.py files that want a number they did not earn.

Each attack is a small variant of one candidate; it asserts what became of it, and that its score is no better than the
honest one's. Attacks on the sealed model are held against seal() and examine() directly, which saves them a training.
"""

import contextlib
import json
import math
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, USERS
from safetensors.torch import save_file
from test_trial import processes_in
from torch import nn

import prepare
from exam import limits, sandbox
from exam.examiner import Examiner, Reader, examine, machine_now
from exam.reader import LOSSES, READY
from exam.result import Result, print_summary
from exam.text import hidden_folders
from exam.tokenizer import load_tokens
from exam.trial import trial


@pytest.fixture(scope="module")
def honest_bpb(tmp_path_factory):
    """Best of two honest runs, less what a longer or luckier run could still gain."""
    from conftest import CANDIDATE

    folder = tmp_path_factory.mktemp("honest")
    (folder / "train.py").write_text(CANDIDATE.format(before="", forward="", begun="", each_step="pass", after=""))
    return min(trial(folder / "train.py", folder / "out", TINY, seed).val_bpb for seed in (0, 1)) - 0.15


def log(tmp_path):
    return (tmp_path / "out" / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Attacks from within the running candidate: all of them end with the honest score or with none

HARMLESS = {
    "forges result.json": (
        """
        for place in ("result.json", "../result.json"):
            try:
                open(place, "w").write('{"outcome": "ok", "val_bpb": 0.001}')
            except OSError as error:
                print("DENIED", place)
        """,
        "DENIED ../result.json",
    ),
    "prints the metric": ("print('---\\nval_bpb: 0.001', flush=True)", "val_bpb: 0.001"),
    "patches prepare": (
        """
        import prepare
        prepare.compute_logits = lambda *a: torch.zeros(1)
        prepare.leak = lambda *a: 0.0
        print('DONE')
        """,
        "DONE",
    ),
    "rewrites its copy of prepare.py": ("open('prepare.py', 'w').write('print(0.001)'); print('DONE')", "DONE"),
    "shadows modules that the examiner imports": (
        """
        for name in ("numpy", "safetensors", "json_", "sitecustomize", "usercustomize", "tiktoken"):
            open(name + ".py", "w").write("print('{\\"outcome\\": \\"ok\\", \\"val_bpb\\": 0.0}'); raise SystemExit")
        print("DONE")
        """,
        "DONE",
    ),
    "reads the validation rows": (
        """
        try:
            print("LEAK", len(open(VAL, "rb").read()))
        except OSError:
            print("DENIED")
        """,
        "DENIED",
    ),
    "reads the environment of the proctor": (
        """
        try:
            print("LEAK", open(f"/proc/{os.getppid()}/environ").read())
        except OSError:
            print("DENIED")
        """,
        "DENIED",
    ),
    "reads the memory of the proctor": (
        """
        try:
            print("LEAK", open(f"/proc/{os.getppid()}/mem", "rb"))
        except OSError:
            print("DENIED")
        """,
        "DENIED",
    ),
    "opens the descriptors of the proctor": (
        """
        try:
            print("LEAK", os.listdir(f"/proc/{os.getppid()}/cwd"), open(f"/proc/{os.getppid()}/fd/1"))
        except OSError:
            print("DENIED")
        """,
        "DENIED",
    ),
    "kills the proctor": (
        """
        import signal
        try:
            os.kill(os.getppid(), signal.SIGKILL); print("LEAK")
        except OSError:
            print("DENIED")
        """,
        "DENIED",
    ),
    "kills every process that it may": (
        """
        try:
            os.kill(-1, 9); print("DONE")
        except OSError:
            print("DONE")
        """,
        "DONE",
    ),
    "looks for text before begin()": (
        """
        sizes = [os.fstat(fd).st_size for fd in range(3, 256) if os.path.exists(f"/proc/self/fd/{fd}")]
        print("LEAK" if any(size > 1000 for size in sizes) else "NOTHING")
        """,
        "NOTHING",
    ),
    "reads and writes the repository": (
        """
        for mode in ("r", "a"):
            try:
                open(REPOSITORY + "/prepare.py", mode); print("LEAK")
            except OSError:
                print("DENIED")
            for name in ("limits.py", "__init__.py", "__pycache__"):
                try:
                    os.open(REPOSITORY + "/exam/" + name, os.O_RDONLY if mode == "r" else os.O_WRONLY); print("LEAK")
                except OSError:
                    pass
        """,
        "DENIED\nDENIED",
    ),
    "leaves weights for a later trial": (
        """
        for folder in ("/dev/shm", "/tmp", "/var/tmp", "/root", CACHE, os.path.dirname(os.__file__)):
            try:
                open(folder + "/autoresearch-test-leftover", "w"); print("LEAK", folder)
            except OSError:
                pass
        print("DONE")
        """,
        "DONE",
    ),
    "reads the held-out source files": (
        """
        import glob
        hidden = json.loads(HIDDEN)
        readable = []
        for path in (p for folder in hidden for p in glob.glob(folder + "/**/*.py*", recursive=True)):
            try:
                open(path).close(); readable.append(path)
            except OSError:
                pass
        print("LEAK" if readable else "NOTHING", readable[:3])
        """,
        "NOTHING",
    ),
    "calls home over TCP": (
        """
        import socket
        try:
            socket.create_connection(("127.0.0.1", PORT), 2); print("LEAK")
        except OSError as error:
            print("DENIED")
        """,
        "DENIED",
    ),
    "calls home past Landlock's rules": (
        """
        import socket
        for family, kind, protocol in ((2, 1, 262), (2, 2, 0), (1, 1, 0), (40, 1, 0)):  # MPTCP, UDP, unix, vsock
            try:
                socket.socket(family, kind, protocol); print("LEAK", family, kind)
            except OSError as error:
                print("DENIED")
        """,
        "DENIED\n" * 4,
    ),
    "leaves something in the kernel for a later trial": (
        """
        import ctypes
        libc = ctypes.CDLL(None)
        left = [
            libc.shmget(4711, 4096, 0o1666),
            libc.msgget(4711, 0o1666),
            libc.semget(4711, 1, 0o1666),
            libc.syscall(248, b"user", b"weights", b"1", 1, -4),  # add_key
            libc.setxattr(b"train.py", b"user.note", b"1", 1, 0),
        ]
        print("NOTHING" if set(left) == {-1} else "LEAK", left)
        """,
        "NOTHING",
    ),
    "sends datagrams to a service by its name": (
        """
        import prepare, socket
        def try_to(what):
            try:
                what(); print("LEAK")
            except OSError:
                print("DENIED")
        try_to(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)[0]
        channel = socket.socket(fileno=os.dup(prepare.TOLD["fd"]))
        for end in (pair, channel):
            try_to(lambda: end.sendto(b"weights", DATAGRAMS))
        """,
        "DENIED\n" * 3,
    ),
    "connects the one socket that CUDA asks for": (
        """
        import errno, socket
        for name in (SERVICE, "\\0" + SERVICE):
            end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            print("DENIED" if end.connect_ex(name) == errno.ENOENT else "LEAK")
        try:
            end.bind("here"); print("LEAK")
        except OSError:
            print("DENIED")
        """,
        "DENIED\n" * 3,
    ),
    "asks which files an earlier trial has read": (
        """
        import ctypes, mmap
        libc, file = ctypes.CDLL(None, use_errno=True), open(os.__file__, "rb")
        memory = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        address, seen = ctypes.addressof(ctypes.c_char.from_buffer(memory)), ctypes.create_string_buffer(4096)
        print("DENIED" if libc.mincore(ctypes.c_void_p(address), 4096, seen) else "LEAK")
        span = (ctypes.c_uint64 * 2)(0, 4096)
        print("DENIED" if libc.syscall(451, file.fileno(), span, seen, 0) else "LEAK")  # cachestat
        try:
            print("LEAK", os.preadv(file.fileno(), [bytearray(9)], 0, os.RWF_NOWAIT))
        except OSError:
            print("DENIED")
        """,
        "DENIED\n" * 3,
    ),
    "makes namespaces of its own": (
        """
        import ctypes
        libc = ctypes.CDLL(None)
        new = 0x10000000  # CLONE_NEWUSER
        print("DENIED" if libc.unshare(new) else "LEAK")
        child = libc.syscall(56, new | 17, 0, 0, 0, 0)  # clone
        if child == 0:
            os._exit(0)
        print("DENIED" if child < 0 else "LEAK")
        print("DENIED" if libc.syscall(435, ctypes.create_string_buffer(88), 88) else "LEAK")  # clone3
        """,
        "DENIED\n" * 3,
    ),
    "slows its proctor down": (
        """
        import ctypes
        libc, proctor = ctypes.CDLL(None), os.getppid()
        before = os.sched_getscheduler(proctor), os.sched_getaffinity(proctor), os.getpriority(0, proctor)
        for attempt in (
            lambda: os.sched_setscheduler(proctor, os.SCHED_IDLE, os.sched_param(0)),
            lambda: os.sched_setaffinity(proctor, {0}),
            lambda: os.setpriority(os.PRIO_PROCESS, proctor, 19),
            lambda: os.setpriority(os.PRIO_USER, 0, 19),
            lambda: libc.syscall(251, 1, proctor, 3 << 13),  # ioprio_set: idle
            lambda: libc.syscall(314, proctor, ctypes.create_string_buffer(bytes([48, 0, 0, 0, 5]), 48), 0),
        ):
            try:
                attempt()
            except OSError:
                pass
        after = os.sched_getscheduler(proctor), os.sched_getaffinity(proctor), os.getpriority(0, proctor)
        print("NOTHING" if before == after else "LEAK", before, after)
        """,
        "NOTHING",
    ),
    "leaves its process group": (
        """
        group = os.getpgrp()
        if os.fork() == 0:
            os.setsid(), os.setpgid(0, 0)
            print("LEAK" if os.getpgrp() != group else "NOTHING", flush=True)
            os._exit(0)
        os.wait()
        """,
        "NOTHING",
    ),
    "writes to its own entry in /proc": (
        """
        task = f"task/{os.getpid()}"
        for name in ("comm", "oom_score_adj", "task/self", f"{task}/comm", f"{task}/oom_score_adj"):
            try:
                open(f"/proc/self/{name}", "w"); print("LEAK", name)
            except OSError:
                pass
        print("NOTHING")
        """,
        "NOTHING",
    ),
    "signals others by its files and holds up who opens one": (
        """
        import fcntl, socket
        end, file = socket.socketpair()[0], open("train.py")
        for command, value in ((8, os.getppid()), (10, 9), (15, bytes(8)), (1024, fcntl.F_RDLCK), (1026, 1)):
            try:
                fcntl.fcntl(file if command > 1000 else end, command, value); print("LEAK", command)
            except OSError:
                print("DENIED")
        """,
        "DENIED\n" * 5,
    ),
    "sets flags of files of the user": (
        """
        import ctypes, fcntl
        libc, file = ctypes.CDLL(None), open(os.__file__)
        for command in (0x40086602, 0x40087602, 0x401C5820, 0x5000940F):  # flags, version, extended flags, a subvolume
            try:
                fcntl.ioctl(file, command, bytes(64)); print("LEAK", command)
            except PermissionError as error:
                print("DENIED" if error.errno == 13 else "LEAK")
        print("DENIED" if libc.syscall(469, -100, os.__file__.encode(), bytes(24), 24, 0) == -1 else "LEAK")
        """,
        "DENIED\n" * 5,
    ),
    "drops pages from the page cache and watches files": (
        """
        import ctypes, mmap
        libc, file = ctypes.CDLL(None, use_errno=True), open(os.__file__, "rb")
        memory = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
        try:
            memory.madvise(21); print("LEAK")  # MADV_PAGEOUT
        except OSError:
            print("DENIED")
        for call in (253, 294, 300, 103):  # inotify_init, inotify_init1, fanotify_init, syslog
            print("DENIED" if libc.syscall(call, 0, 0) == -1 and ctypes.get_errno() == 13 else "LEAK")
        """,
        "DENIED\n" * 5,
    ),
    "reads the counters of the kernel": (
        """
        for name in ("vmstat", "kpageflags", "locks", "interrupts", "self/../vmstat"):
            try:
                open(f"/proc/{name}"); print("LEAK", name)
            except OSError:
                print("DENIED")
        """,
        "DENIED\n" * 5,
    ),
    "reads what another process is called": (
        """
        try:
            print("LEAK", open(f"/proc/{os.getppid()}/comm").read(), os.listdir("/proc"))
        except OSError:
            print("DENIED")
        """,
        "DENIED",
    ),
    "cuts a file of the user by its path": (
        """
        try:
            os.truncate(REPOSITORY + "/LICENSE", 10**6); print("LEAK")
        except OSError:
            print("DENIED")
        """,
        "DENIED",
    ),
    "marks files of the user": (
        """
        before = os.stat("..").st_mode, os.stat(sys.executable).st_mtime_ns
        os.chmod("..", 0o711)
        os.utime(sys.executable, (1, 1))
        print("NOTHING" if before == (os.stat("..").st_mode, os.stat(sys.executable).st_mtime_ns) else "LEAK")
        """,
        "NOTHING",
    ),
    "limits the files of the proctor": (
        """
        import resource
        try:
            resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (0, 0)); print("LEAK")
        except OSError:
            print("DENIED")
        """,
        "DENIED",
    ),
    "digs a folder too deep to delete by recursion": (
        """
        home = os.getcwd()
        for _ in range(1500):
            os.mkdir("deep"); os.chdir("deep")
        os.chdir(home)
        print("DONE")
        """,
        "DONE",
    ),
    "looks for keys in its environment": (
        "print('LEAK' if 'SECRET' in repr(os.environ) else 'NOTHING')",
        "NOTHING",
    ),
    "slows its own clock down": ("real = time.monotonic; time.monotonic = lambda: real() / 1e3; print('DONE')", "DONE"),
    "starts a grandchild that changes session and ignores signals": (
        """
        import subprocess
        code = "import signal,time; [signal.signal(s, signal.SIG_IGN) for s in (1,2,15)]; time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True); print("DONE")
        """,
        "DONE",
    ),
    "goes on training after its submission, in an orphan": (
        """
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            while True:
                time.sleep(0.02)
                if os.path.exists("model.safetensors"):
                    with open("model.safetensors", "r+b") as file:
                        file.seek(-64, 2); file.write(bytes(64))
                    open("better", "wb").write(b"better")
                    os.rename("better", "model.safetensors")
        print("DONE")
        """,
        "DONE",
    ),
    "floods the proctor with noise": (
        """
        import prepare, socket
        s = socket.socket(fileno=os.dup(prepare.TOLD["fd"]))
        for noise in (b"[" * 60000, b'"begin"', b"\\xff" * 100, b'{"log": 1}', b'{"submit": {"steps": 1e999}}', b"{}"):
            s.send(noise)
        print("DONE")
        """,
        "DONE",
    ),
    "hides the room from its cleaner": (
        """
        os.makedirs("a/b")
        open("a/b/c", "w")
        os.chmod("a/b", 0)
        os.chmod("a", 0)
        print("DONE")
        """,
        "DONE",
    ),
}


# Those that leave everything as it was share one trial; the others each have their own.
QUIET = [attack for attack, (_, trace) in HARMLESS.items() if trace != "DONE"]
# Those that may also hurt themselves.
MAY_FAIL = (
    "shadows modules that the examiner imports",
    "slows its own clock down",
    "goes on training after its submission, in an orphan",
)


@pytest.fixture(scope="module")
def known(cache, tmp_path_factory):
    """What an attacker may know, as the top of a candidate; a server listens, and the folders of pycode are closed."""
    server = socket.create_server(("127.0.0.1", 0))
    sockets = tmp_path_factory.mktemp("sockets")
    services = [socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)]
    for service, name in zip(services, ("datagrams", "service")):
        service.bind(str(sockets / name))
    services[1].listen()
    meta, hidden = cache / "tiny" / "meta.json", hidden_folders()
    before = meta.read_text()
    meta.write_text(json.dumps(json.loads(before) | {"hidden_folders": hidden}))
    names = {
        "VAL": str(cache / "tiny" / "val.bin"),
        "CACHE": str(cache),
        "REPOSITORY": str(prepare.Path(prepare.__file__).parent),
        "PORT": server.getsockname()[1],
        "HIDDEN": json.dumps(hidden),
        "DATAGRAMS": str(sockets / "datagrams"),
        "SERVICE": str(sockets / "service"),
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ANTHROPIC_API_KEY", "SECRET")
        environment.setenv("NVIDIA_API_KEY", "SECRET")
        yield "\n".join(f"{name} = {value!r}" for name, value in names.items())
    meta.write_text(before)
    for service in (server, *services):
        service.close()


@pytest.fixture(scope="module", params=USERS, ids=USERS.get)
def quiet_trial(known, tmp_path_factory, request):
    """(result, {attack: what it printed}) of one trial that tries all the quiet attacks, one after the other."""
    from conftest import CANDIDATE, tiny_repository

    folder = tiny_repository(tmp_path_factory.mktemp("quiet") / "repository")
    tries = [f"print({'=== ' + attack!r})\n" + textwrap.dedent(HARMLESS[attack][0]).strip() for attack in QUIET]
    code = "\n".join([known, f"REPOSITORY = {str(folder)!r}", *tries, "print('===', flush=True)"])
    (folder / "train.py").write_text(CANDIDATE.format(before=code, forward="", begun="", each_step="pass", after=""))
    command = [sys.executable, "prepare.py", "trial", "train.py", "--task", "tiny", "--out", "out"]
    said = subprocess.run([*request.param, *command], cwd=folder, capture_output=True, text=True)
    assert said.returncode == 0, said
    printed = (folder / "out" / "log.txt").read_text().split("=== ")
    result = Result.read(folder / "out" / "result.json")
    return result, {part.partition("\n")[0]: part.partition("\n")[2] for part in printed}


@pytest.mark.parametrize("attack", QUIET)
def test_it_learns_and_changes_nothing_when_it(attack, quiet_trial, honest_bpb):
    result, printed = quiet_trial
    assert HARMLESS[attack][1] in printed[attack] and "LEAK" not in printed[attack], printed[attack]
    assert result.outcome == "ok" and result.val_bpb > honest_bpb, result


@pytest.mark.parametrize("attack", [attack for attack in HARMLESS if attack not in QUIET])
def test_it_gains_nothing_when_it(attack, known, hold, tmp_path, honest_bpb):
    code, trace = HARMLESS[attack]
    result = hold(before=known + "\n" + textwrap.dedent(code))
    assert trace in log(tmp_path) and "LEAK" not in log(tmp_path), log(tmp_path)
    assert result.outcome == "ok" or attack in MAY_FAIL, result
    assert result.val_bpb is None or result.val_bpb > honest_bpb
    assert result == Result.read(tmp_path / "out" / "result.json")
    assert not processes_in(tmp_path) and not (tmp_path / "out" / "room").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Attacks on the file that is handed in

SUBMIT = """
import prepare, socket
{code}
channel = socket.socket(fileno=os.dup(prepare.TOLD["fd"]))
channel.send(json.dumps({{"submit": {{}}}}).encode())
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.remove('model.safetensors')", "cannot be read"),
        ("os.remove('model.safetensors'); os.symlink('/etc/passwd', 'model.safetensors')", "not a plain file"),
        ("os.remove('model.safetensors'); os.mkfifo('model.safetensors')", "not a plain file"),
        ("os.link('model.safetensors', 'twin')", "not a plain file"),
        ("open('model.safetensors', 'wb').write(b'PK nonsense')", "not a sealed model"),
        ("torch.save(Payload(), 'model.safetensors')", "not a sealed model"),
    ],
    ids=["no file", "a link", "a pipe", "a hard link", "nonsense", "a pickle"],
)
def test_a_submission_is_refused_that_is(code, reason, hold, tmp_path):
    marker = tmp_path / "executed"
    payload = f"""
    class Payload:
        def __reduce__(self):
            return (os.system, ("touch {marker}",))
    """
    result = hold(before=payload, after=SUBMIT.format(code=code))
    assert result.outcome == "invalid" and reason in result.reason, result
    assert not marker.exists()


CHANNEL = "import prepare, socket; channel = socket.socket(fileno=os.dup(prepare.TOLD['fd']));"


@pytest.mark.parametrize(
    "code",
    [
        "channel.send(b'{\"begin\": 1}'); os._exit(0)",
        "channel.shutdown(socket.SHUT_RD); channel.send(b'{\"begin\": 1}'); time.sleep(9)",
        "[channel.send(b'{}') for _ in range(8)]; channel.send(b'{\"begin\": 1}'); os.kill(os.getpid(), 40)",
        'channel.send(b\'{"refused": "\\\\ud800 \\\\u001b[2J\\\\nval_bpb: 0.001"}\'); time.sleep(9)',
    ],
    ids=["leaves at once", "does not listen", "dies of a nameless signal", "forges lines in its refusal"],
)
def test_the_proctor_survives_a_candidate_that(code, hold, tmp_path, capsys):
    result = hold(before=CHANNEL + code)
    assert result.outcome in ("crash", "invalid") and result.reason.isprintable(), result
    print_summary(result)
    assert not re.search("^val_bpb", capsys.readouterr().out, re.MULTILINE)


def test_a_submission_before_begin_does_not_count(hold):
    result = hold(before=SUBMIT.format(code="open('model.safetensors', 'w')").replace("time.sleep(60)", "sys.exit(0)"))
    assert result.outcome == "crash" and result.training_seconds == 0.0


@pytest.mark.parametrize("words", ["", "\x1b\n"])
def test_a_refusal_without_words_is_an_invalid_result_that_can_be_read(words, hold, tmp_path):
    fd = 'json.loads(os.environ["AUTORESEARCH_TRIAL"])["fd"]'
    result = hold(before=f"os.write({fd}, json.dumps({{'refused': {words!r}}}).encode())\ntime.sleep(9)")
    assert (result.outcome, result.reason) == ("invalid", "no reason is given")
    assert Result.read(tmp_path / "out" / "result.json") == result


def test_a_report_is_reduced_to_short_numbers(hold):
    lie = json.dumps({"submit": {"steps": "9" * 10**4, "tokens": 1e400, "params": {}, "device": "NVIDIA H100"}})
    result = hold(after=SUBMIT.format(code="").replace('json.dumps({"submit": {}})', repr(lie)))
    assert result.outcome == "ok" and result.steps is result.tokens is result.params is None
    assert result.device.startswith("CPU")


FILL = "f = open('big', 'wb'); [f.write(bytes(2**24)) for _ in range(64)]; time.sleep(9)"


@pytest.mark.parametrize(
    ("limit", "value", "code", "reason"),
    [
        ("DISK_LIMIT", 2**27, FILL, "disk"),
        ("FILE_LIMIT", 2**24, FILL, ""),
        ("MEMORY_SHARE", 0.05, "x = torch.ones(2**29); time.sleep(9)", "GB of memory"),
        ("PROCESS_LIMIT", 20, "[os.fork() or time.sleep(99) for _ in range(40)]; time.sleep(9)", "processes"),
    ],
)
def test_it_is_stopped_when_it_exceeds_the(limit, value, code, reason, hold, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, limit, value)
    result = hold(before=code)
    assert result.outcome == "crash" and reason in result.reason, result
    assert not processes_in(tmp_path) and not (tmp_path / "out" / "room").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Attacks on the sealed program


class Honest(nn.Module):
    """Embedding, one causal mix of the past, head. Subclasses change `mix`, which sees x [B, T, C]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TINY.vocab_size, 16)
        self.head = nn.Linear(16, TINY.vocab_size)

    def mix(self, x, tokens):
        return x + F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens), tokens))


def sealed(model, edit=lambda program: None):
    """(program, tensors) of `model` as the candidate's side makes them, after `edit`."""
    program, constants = prepare.seal(model, TINY)
    tensors = prepare.Run(program, constants, None, None)._tensors(model)
    edit(program)
    return program, tensors


class Examiners:
    """One examiner for many exams, each held by readers of its own; a trial in this process ends it with the rest."""

    now = None

    def get(self):
        if not self.now or self.now.process.poll() is not None:
            self.now = Examiner(None)
        return self.now


@pytest.fixture(scope="module")
def examiners():
    examiners = Examiners()
    yield examiners
    if examiners.now:
        examiners.now.__exit__()


@pytest.fixture
def score(tmp_path, cache, examiners):
    """score(model, edit): val_bpb of a sealed model whose program was edited; raises Refused as the exam does."""

    def score(model, edit=lambda program: None):
        prepare.save_sealed(tmp_path / "model.safetensors", *sealed(model, edit))
        return examine(tmp_path / "model.safetensors", TINY, cache / "tiny", None, examiners.get())["val_bpb"]

    return score


def shifted(x):
    return torch.cat((x[:, 1:], x[:, :1]), 1)


class OneTokenAhead(Honest):
    def mix(self, x, tokens):
        return x + shifted(x)


class BlockMeans(Honest):
    def mix(self, x, tokens):
        B, T, C = x.shape
        return x + x.view(B, T // 8, 8, C).mean(2, keepdim=True).expand(B, T // 8, 8, C).reshape(B, T, C)


class FrequencyFilter(Honest):
    def mix(self, x, tokens):
        return torch.fft.irfft(torch.fft.rfft(x, dim=1)[:, :9], n=x.shape[1], dim=1)


class ChunkedRecurrence(Honest):
    def mix(self, x, tokens):
        state, out = torch.zeros_like(x[:, :1]), []
        for chunk in x.split(8, dim=1):
            state = 0.5 * state + chunk.sum(1, keepdim=True)  # the state of the whole chunk, seen from its start
            out.append(chunk + state)
        return torch.cat(out, 1)


class FewPositions(Honest):
    def mix(self, x, tokens):
        few = (torch.arange(x.shape[1]) == 17).float()[:, None]  # one position of 32
        return x + few * shifted(x)


class SecondHalf(Honest):
    def mix(self, x, tokens):
        late = (torch.arange(x.shape[1]) >= x.shape[1] // 2).float()[:, None]
        return x + late * shifted(x)


class AcrossRows(Honest):
    def mix(self, x, tokens):
        return x + x.mean((0, 1), keepdim=True)


class OnlyOnNaturalText(Honest):
    """Looks ahead only where the row does not look like the random tokens of a probe."""

    def mix(self, x, tokens):
        natural = (tokens[:, 1:] < 256).float().mean(1) > 0.5
        return x + natural[:, None, None] * shifted(x)


class Faint(Honest):
    def mix(self, x, tokens):
        return x + 0.01 * shifted(x)


class NgramOfTheNext(Honest):
    """A hashed embedding of a pair of tokens, of which the second has not come yet."""

    def mix(self, x, tokens):
        rows = (tokens * 7919 ^ shifted(tokens)) % TINY.vocab_size
        return x + self.embed(rows)


class ResetAtTheNextDocument(Honest):
    """Leaves the past out where the next token begins a document."""

    def mix(self, x, tokens):
        last = shifted(tokens) == TINY.vocab_size - 1
        return torch.where(last[..., None], x, super().mix(x, tokens))


class PlaceBeforeTheEnd(Honest):
    """Knows how many tokens of its document are still to come."""

    def mix(self, x, tokens):
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        starts = torch.where(tokens == TINY.vocab_size - 1, places, tokens.shape[1])
        later = torch.where(places[:, None] > places[:, :, None], starts[:, None], tokens.shape[1])
        return x + (later.amin(2) - places)[..., None] / 8


class InductionWithItsOwnAnswer(Honest):
    """Looks up what followed a token's last occurrence, and counts the present one as an occurrence."""

    def mix(self, x, tokens):
        places = torch.arange(tokens.shape[1])
        same = (tokens[:, :, None] == tokens[:, None]) & (places <= places[:, None])
        last = torch.where(same, places, -1).amax(2)
        return x + self.embed(torch.gather(shifted(tokens), 1, last))


class BehindInfinity(Honest):
    """Adds the same infinity to the logits that look ahead and to those that do not, so that a difference is NaN."""

    def forward(self, tokens):
        logits = super().forward(tokens) + 9 * F.one_hot(shifted(tokens), TINY.vocab_size)
        return torch.cat((torch.full_like(logits[..., :1], -math.inf), logits[..., 1:]), 2)


class NotANumber(Honest):
    """Looks ahead on text, and answers nothing that compares where a batch looks random."""

    def forward(self, tokens):
        logits = super().forward(tokens) + 9 * F.one_hot(shifted(tokens), TINY.vocab_size)
        return torch.where((tokens > 256).float().mean() > 0.1, math.nan, logits)


class Rounded(Honest):
    """A leak below the tolerance in float64 that becomes 64 nats in float32."""

    def forward(self, tokens):
        ahead = F.one_hot(shifted(tokens), TINY.vocab_size).double()
        return 1e9 + 32 - 3e-5 + 6e-5 * ahead + 0 * super().forward(tokens)


class Dropping(Honest):
    """Hides behind noise of its own making."""

    def mix(self, x, tokens):
        return x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(BehindInfinity, "not finite"), (NotANumber, "not finite"), (Dropping, "no dropout"), (Rounded, "not causal")],
)
def test_a_model_is_refused_that_hides(model, reason, score):
    with pytest.raises(prepare.Refused, match=reason):
        score(model())


LOOKING_AHEAD = (
    OneTokenAhead,
    BlockMeans,
    FrequencyFilter,
    ChunkedRecurrence,
    FewPositions,
    SecondHalf,
    AcrossRows,
    OnlyOnNaturalText,
    Faint,
    NgramOfTheNext,
    ResetAtTheNextDocument,
    PlaceBeforeTheEnd,
    InductionWithItsOwnAnswer,
)


SELDOM = (FewPositions, OnlyOnNaturalText, ResetAtTheNextDocument)  # may pass where the exam comes twice more


@pytest.mark.parametrize("model", LOOKING_AHEAD)
def test_a_model_that_looks_ahead_is_caught_at_the_exam(model, score):
    with pytest.raises(prepare.Refused, match="not causal"):
        for _ in range(3):  # a leak at 3 % of positions escapes one exam in a few hundred
            score(model())


@pytest.mark.parametrize("model", [model for model in LOOKING_AHEAD if model not in SELDOM])
def test_a_model_that_looks_ahead_is_refused_before_the_clock_starts(model):
    program, tensors = sealed(model())
    with pytest.raises(prepare.Refused, match="not causal"):
        prepare.try_forward(program, tensors, dict(model().named_parameters()), TINY)


class FewRows(Honest):
    """Looks ahead in one row of sixty."""

    def mix(self, x, tokens):
        return x + (tokens.sum(1) % 61 == 0)[:, None, None] * shifted(x)


def test_a_score_that_matters_is_probed_in_every_row(score, monkeypatch):
    """A leak in few rows can escape the first probe of some batches; where the score would count, it does not."""
    monkeypatch.setattr(prepare, "exam_batch", lambda task, device: 16)
    for _ in range(2):
        with pytest.raises(prepare.Refused, match="not causal"):
            score(FewRows())


def test_a_look_ahead_model_that_disarms_the_first_check_is_invalid_after_its_trial(hold):
    result = hold(
        before="import prepare; prepare.try_forward = lambda *a: None",
        forward="x = x + torch.cat((x[:, 1:], x[:, :1]), 1)",
    )
    assert result.outcome == "invalid" and "not causal" in result.reason and result.val_bpb is None


def test_honest_models_never_trip_the_probe_in_200_checks(monkeypatch):
    """float32 and bfloat16, full and windowed attention: what comes later moves nothing, bit for bit."""
    monkeypatch.setattr(prepare, "exam_batch", lambda task, device: 16)

    class Windowed(Honest):
        def mix(self, x, tokens):
            B, T, C = x.shape
            chunks = x.view(B, T // 8, 8, C)
            keys = torch.cat((F.pad(chunks, (0, 0, 0, 0, 1, 0))[:, :-1], chunks), 2)
            i, j = torch.arange(8)[:, None], torch.arange(16)[None]
            return x + F.scaled_dot_product_attention(chunks, keys, keys, (j > i) & (j <= i + 8)).view(B, T, C)

    for model in (Honest(), Honest().bfloat16(), Windowed(), Windowed().bfloat16()):
        program, tensors = sealed(model)
        forward = prepare.build_forward(program, tensors)
        tokens = torch.randint(0, TINY.vocab_size, (program["batch"], TINY.seq_len))
        with torch.inference_mode():
            logits = forward(tokens)
            assert all(prepare.leak(forward, tokens, logits, TINY) == 0.0 for _ in range(50))


def call(slot, operator, *arguments, **keywords):
    """An edit that adds a call to the end of a program and makes its result the output."""

    def edit(program):
        program["calls"].append([10**6 + slot, operator, list(arguments), keywords])
        program["output"] = 10**6 + slot

    return edit


def short_key(program):
    """An edit that gives attention a key shorter than its value; the CPU kernel then reads beyond the key."""
    index = next(i for i, one in enumerate(program["calls"]) if "attention" in one[1])
    attention = program["calls"][index]
    program["calls"].insert(index, [10**6, "slice.Tensor", [attention[2][1], 1, 0, 8], {}])
    attention[2][1] = {"slot": 10**6}


def aside(*calls):
    """An edit that adds calls whose results nothing reads; "last" stands for the result of the call before."""

    def edit(program):
        for slot, (operator, arguments, keywords) in enumerate(calls, 10**6):
            arguments = [{"slot": slot - 1} if argument == "last" else argument for argument in arguments]
            program["calls"].append([slot, operator, arguments, keywords])

    return edit


WEIGHT = {"slot": 0}
TO_CUBE = ("unsqueeze.default", [WEIGHT, 0], {})

PROGRAMS = {
    "a key that is shorter than its value": (short_key, "same length"),
    "memory that it was not given": (call(0, "as_strided.default", {"slot": 0}, [1], [1]), "as_strided"),
    "memory that others have left": (call(0, "empty.memory_format", [64, 32, 300]), "empty"),
    "files": (call(0, "from_file.default", "/etc/passwd"), "from_file"),
    "random numbers": (call(0, "rand_like.default", {"slot": 0}), "rand_like"),
    "an operator that writes": (call(0, "add.out", {"slot": 0}, {"slot": 0}), "add.out"),
    "an operator of another library": (call(0, "__import__('os').system"), "not allowed"),
    "a dunder": (call(0, "__class__.__init__"), "not allowed"),
    "an overload that is an attribute": (call(0, "add.__globals__"), "not allowed"),
    "a symbolic expression": (call(0, "add.Tensor", {"slot": 0}, {"expr": "exit()"}), "no known kind"),
    "an argument of two kinds": (call(0, "add.Tensor", {"slot": 0, "device": True}), "no known kind"),
    "a dtype that is code": (call(0, "zeros.default", [1], dtype={"dtype": "load"}), "no known kind"),
    "a slot that does not exist": (call(0, "neg.default", {"slot": 77777}), "nothing has filled"),
    "too much memory": (call(0, "repeat.default", {"slot": 0}, [2**15, 2**15]), "fails on the validation rows"),
    "memory that circular padding leaves unwritten": (
        aside(("pad.default", [WEIGHT, [16, -16], "circular"], {})),
        "no known kind: mode=circular",
    ),
    "memory beyond an element that is repeated": (
        aside(
            ("slice.Tensor", [WEIGHT, 1, 0, 1], {}),
            ("expand.default", ["last", [300, 4096]], {}),
            ("median.dim", ["last", 1], {}),
        ),
        "'median.dim' is not allowed",
    ),
    "a Fourier transform over a dimension that is not there": (
        aside(("complex.default", [WEIGHT, WEIGHT], {}), ("_fft_c2r.default", ["last", [9], 0, 16], {})),
        "'_fft_c2r.default' is not allowed",
    ),
    "a Fourier transform twice over one dimension": (
        aside(("complex.default", [WEIGHT, WEIGHT], {}), ("_fft_c2r.default", ["last", [1, 1], 0, 16], {})),
        "'_fft_c2r.default' is not allowed",
    ),
    "repeats whose sum wraps around": (
        aside(
            ("full.default", [[4], 2**62], {"dtype": {"dtype": "int64"}}), ("repeat_interleave.Tensor", ["last"], {})
        ),
        "'repeat_interleave.Tensor' is not allowed",
    ),
    "interpolation by a tiny scale": (
        aside(TO_CUBE, ("upsample_nearest1d.default", ["last", [64], 1e-300], {})),
        "'upsample_nearest1d.default' is not allowed",
    ),
    "bytes of one dtype as another": (
        aside(("view.dtype", [WEIGHT, {"dtype": "int64"}], {})),
        "'view.dtype' is not allowed",
    ),
    "a sparse layout": (
        aside(("zeros.default", [[1]], {"layout": {"layout": "sparse_coo"}})),
        "no known kind: layout",
    ),
    "a device by its name": (aside(("zeros.default", [[1]], {"device": "meta"})), "no known kind: device=meta"),
    "a tensor of giant size": (
        aside(("full.default", [[1], 1], {}), ("expand.default", ["last", [2**62]], {})),
        "no known kind: size",
    ),
    "a tensor of giant size from no tensor": (aside(("zeros.default", [[2**50, 0]], {})), "no known kind: size"),
    "calls without end": (lambda program: program.update(calls=[1, 2, 3]), "not a sealed model"),
    "no output": (lambda program: program.pop("output"), "not a sealed model"),
    "another batch": (lambda program: program.update(batch=1), "batches of 1 rows"),
    **{
        f"the device {device!r}": (lambda program, device=device: program.update(device=device), "not here")
        for device in ("meta", "xpu", "mps", "cpu:0", "", None, ["cpu"], {"cpu": 1})
    },
    "tensors that are not there": (lambda program: program.update(tensors={"0": "x"}), "not a sealed model"),
    "nothing but the tokens": (lambda program: program.update(output=len(program["tensors"]) - 1), "floating point"),
}


@pytest.mark.parametrize("attack", PROGRAMS)
def test_a_program_is_refused_that_uses(attack, score):
    edit, reason = PROGRAMS[attack]
    with pytest.raises(prepare.Refused, match=re.escape(reason)):
        score(Honest(), edit)


@pytest.mark.parametrize("metadata", [None, {}, {"program": "{"}, {"program": "[" * 10**5}, {"program": "null"}])
def test_a_file_without_a_program_is_refused(metadata, tmp_path, cache):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(prepare.Refused, match="not a sealed model"):
        examine(tmp_path / "model.safetensors", TINY, cache / "tiny")


def test_a_program_that_takes_too_long_is_invalid(hold, monkeypatch):
    class Strict(prepare.Task):
        exam_limit = property(lambda self: 6.0)

    endless = "save = prepare.save_sealed\n"
    endless += "def slow(path, program, tensors):\n"
    endless += "    first = program['calls'][0]\n"
    endless += "    calls = [[10**6 + i, *first[1:]] for i in range(190000)]\n"
    endless += "    save(path, program | {'calls': calls + program['calls']}, tensors)\n"
    result = hold(
        task=Strict(**prepare.dataclasses.asdict(TINY)),
        before="import prepare\n" + endless,
        after="prepare.save_sealed = slow",
    )
    assert result.outcome == "invalid" and "longer than 6 s" in result.reason, result


class Counting(Honest):
    """Carries state from call to call in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def mix(self, x, tokens):
        self.seen.add_(1)
        return x * self.seen


class Noting(Honest):
    """Carries state from call to call in a Python attribute."""

    count = 0

    def mix(self, x, tokens):
        self.count += 1
        return x * self.count


def test_state_in_a_buffer_is_refused_when_sealing():
    with pytest.raises(prepare.Refused, match=r"change nothing.*seen"):
        sealed(Counting())


def test_state_in_a_python_attribute_is_frozen_by_the_seal():
    program, tensors = sealed(Noting())
    forward = prepare.build_forward(program, tensors)
    tokens = torch.zeros(program["batch"], TINY.seq_len, dtype=torch.int64)
    assert torch.equal(forward(tokens), forward(tokens))


def test_the_sealed_program_computes_what_the_model_computes():
    model = Honest()
    program, tensors = sealed(model)
    tokens = torch.randint(0, TINY.vocab_size, (program["batch"], TINY.seq_len))
    with torch.inference_mode():
        assert torch.equal(prepare.build_forward(program, tensors)(tokens), model(tokens))


def test_the_score_does_not_depend_on_the_batch_size_of_the_exam(score, monkeypatch):
    scores = []
    for batch in (4, 64):
        monkeypatch.setattr(prepare, "exam_batch", lambda task, device, batch=batch: batch)
        scores.append(score(Honest()))
    assert scores == pytest.approx([scores[0]] * 2, rel=1e-6)


def test_the_score_is_the_nats_of_every_target_but_bos_over_their_bytes(score, cache):
    """A model that gives every token the same probability costs ln(vocabulary) nats a target."""
    model = Honest()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    rows = prepare.np.fromfile(cache / "tiny" / "val.bin", dtype="uint16").reshape(-1, TINY.seq_len + 1)
    targets = rows[:, 1:][rows[:, 1:] != TINY.vocab_size - 1]
    tokens = load_tokens(cache / "tiny")
    size = sum(len(tokens[target]) for target in targets)
    assert score(model) == pytest.approx(len(targets) * math.log2(TINY.vocab_size) / size, rel=1e-5)


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_a_machine_that_cannot_be_measured_is_not_held_against_the_candidate(fault):
    """The reader that measures it is stopped, as by a GPU that hangs, or killed."""
    with Examiner(None) as examiner:

        def strike():
            while not (readers := psutil.Process(examiner.process.pid).children()):
                time.sleep(0.001)
            readers[0].send_signal(fault)

        striking = threading.Thread(target=strike)
        striking.start()
        with pytest.raises(prepare.Pause, match="machine (does not answer|cannot be measured)"):
            machine_now(examiner, time.monotonic() + 20)
        striking.join()


OPENS = """
import os, sys
for path in sys.argv[1:]:
    for mode in ("rb", "ab"):
        try:
            open(path, mode)
            print(mode, os.path.basename(path))
        except OSError:
            pass
"""


@pytest.mark.skipif(not sandbox.landlock_abi(), reason="there is no Landlock")
def test_an_examiner_can_read_the_submission_and_the_exam_but_no_rows_and_nothing_else_of_the_repository(
    tmp_path, cache
):
    submission = tmp_path / "model.safetensors"
    submission.touch()
    allowed = [submission, ROOT / "prepare.py", *(ROOT / "exam").glob("*.py")]
    others = [ROOT / name for name in ("train.py", "agent_loop.py", "program.md", "docs/gpu.md", "pyproject.toml")]
    others += [cache / "tiny" / name for name in ("val.bin", "train.bin", "meta.json", "tokenizer.txt")]
    command = [sys.executable, "-I", "-c", OPENS, *map(str, allowed + others)]
    child = sandbox.start_confined(command, sandbox.examiner_rules(tmp_path, []), stdout=subprocess.PIPE, text=True)
    assert child.communicate(timeout=20)[0].splitlines() == [f"rb {path.name}" for path in allowed]


class Recorder:
    """An examiner whose readers remember what they were shown, and take these nats for every target."""

    def __init__(self, nats=lambda tokens, targets: np.full(targets.shape, 3, np.float32)):
        self.nats, self.readers = nats, []

    @contextlib.contextmanager
    def ask(self, question, deadline):
        self.readers.append([])
        yield self

    def losses(self, tokens, targets):
        self.readers[-1] += zip(tokens.tolist(), targets.tolist())
        return self.nats(tokens, targets)


def test_no_reader_sees_a_row_twice_and_those_that_probe_see_other_ends(cache, monkeypatch):
    monkeypatch.setattr(prepare, "exam_batch", lambda task, device: 16)
    recorder = Recorder()
    examine("model", TINY, cache / "tiny", None, recorder)
    sample, plain, *closer = recorder.readers
    assert 0 < len(sample) < len(plain) == len(closer[0]) == len(closer[1]) == TINY.eval_rows
    true_rows = {tuple(targets): tokens for tokens, targets in plain}
    for reader in (sample, *closer):
        shown = Counter(tuple(targets) for _, targets in reader)
        assert shown <= Counter(tuple(targets) for _, targets in plain)  # the rows of the tiny task repeat
        whole = [tokens == true_rows[tuple(targets)] for tokens, targets in reader]
        assert sum(whole) < len(whole) / 4  # where the cut is at the very end, or few tokens fell out alike
        assert all(tokens[0] == true_rows[tuple(targets)][0] for tokens, targets in reader)


def test_code_that_runs_in_a_reader_could_not_tell_the_end_of_a_row_from_its_beginning(cache):
    """Losses of zero wherever the next token is seen in the row: right in one reader, given away by another."""

    def nats(tokens, targets):
        seen = np.roll(tokens, -1, 1) == targets
        return np.where(seen, 0, 5).astype(np.float32)

    with pytest.raises(prepare.Refused, match="not causal"):
        examine("model", TINY, cache / "tiny", None, Recorder(nats))


def test_a_score_too_high_to_count_is_probed_in_a_sample_alone(cache):
    recorder = Recorder()
    examine("model", TINY, cache / "tiny", 0.5, recorder)
    assert len(recorder.readers) == 2


@pytest.mark.parametrize("nats", [math.nan, -1.0, -math.inf, math.inf, 1e30])
def test_losses_that_are_none_are_refused(nats, cache):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(READY + LOSSES + np.full((2, 3), nats, np.float32).tobytes())
        with pytest.raises(prepare.Refused, match="no losses"):
            zeros = np.zeros((2, 3), np.uint16)
            Reader(ours, time.monotonic() + 9).losses(zeros, zeros)
