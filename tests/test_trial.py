"""The trial: every way a candidate can end, as the proctor reports it, and nothing of it left behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, USERS

import prepare
from exam import limits, load, sandbox, watch
from exam.fingerprints import FROZEN
from exam.processes import kill_group
from exam.result import Result
from exam.sandbox import sandbox_rules, start_confined
from exam.trial import trial
from exam.watch import Watch, last_words


def processes_in(folder):
    """Processes whose working directory is below `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(folder)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


class Impatient(prepare.Task):
    startup_limit = property(lambda self: 5.0)
    grace = property(lambda self: 1.0)


def test_an_honest_candidate_is_scored_and_its_evidence_written(hold, tmp_path):
    result = hold()
    assert result.outcome == "ok", result
    assert 0 < result.val_bpb < 8
    assert 0.3 * TINY.time_budget < result.training_seconds <= TINY.time_budget + TINY.grace
    assert result.steps > 0 and result.tokens % TINY.seq_len == 0
    assert result == Result.read(tmp_path / "out" / "result.json")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert set(os.listdir(tmp_path / "out")) == {"result.json", "log.txt", "metrics.jsonl", "model.safetensors"}
    assert set(result.sha256) == {"train.py", "tokenizer", "val", *FROZEN}


def test_what_others_have_of_the_cpu_during_the_training_stands_in_the_record(repository, run):
    burn = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(burn) for _ in os.sched_getaffinity(0)][:4]
    try:
        command = [sys.executable, "prepare.py", "trial", "train.py", "--task", "tiny", "--out", "out"]
        assert run(*command, cwd=repository).returncode == 0
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert 0.05 < Result.read(repository / "out" / "result.json").others <= 1


def test_the_speed_of_a_cpu_that_a_trial_has_to_itself_stands_in_the_record(repository, run):
    command = [sys.executable, "prepare.py", "trial", "train.py", "--task", "tiny", "--out"]
    assert run(*command, "alone", cwd=repository).returncode == 0
    assert Result.read(repository / "alone" / "result.json").cpu_rate > 1e8
    if os.cpu_count() > 1:  # where trials divide the cores they would measure each other
        assert run(*command, "divided", "--cpus", "0", cwd=repository).returncode == 0
        assert Result.read(repository / "divided" / "result.json").cpu_rate is None


@pytest.mark.skipif(not load.kernel_threads(), reason="the kernel's own threads are not to be seen here")
def test_the_threads_of_the_kernel_are_none_of_the_others():
    """A candidate that writes files makes them work, and would seem disturbed."""
    pids = {pid for pid, _ in load.used_elsewhere()}
    assert not pids & {process.pid for process in psutil.Process(2).children()} and 1 in pids


@pytest.mark.parametrize(
    "spent, used, all_cores, others",
    [
        (1.0, {(1, 0.0): 9.0, (2, 5.0): 1.0}, 2, 0.25),  # 3 of 8 s were busy, and the candidate had 1 of them
        (3.0, {(1, 0.0): 9.0}, 2, 0.0),
        (0.0, {(1, 0.0): 5.4}, 2, 0.1),  # its children are not in its account, but nobody else has used that much
        (0.0, {(1, 0.0): 9.0}, 8, 0.05),  # nobody knows on which cores that was, so what was stolen counts alone
    ],
)
def test_what_the_candidate_has_used_itself_is_not_others(spent, used, all_cores, others, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: all_cores)
    cores = [{0: (5.0, 0.0), 3: (7.0, 1.0)}, {0: (7.0, 0.0), 3: (8.0, 1.4)}]
    processes = [{(1, 0.0): 5.0}, used]
    monkeypatch.setattr(load, "busy_seconds", lambda: cores.pop(0))
    monkeypatch.setattr(load, "used_elsewhere", lambda: processes.pop(0))
    measured = load.Load()
    measured.began -= 4.0  # of two cores
    assert measured.others(spent) == pytest.approx(others, abs=0.02)


def test_the_candidate_is_given_the_seed_of_the_trial(hold, tmp_path):
    hold(seed=7, before="print('seed', SEED)")
    assert "seed 7" in (tmp_path / "out" / "log.txt").read_text()


def test_a_crash_is_reported_with_the_last_line_of_its_traceback(hold, tmp_path):
    result = hold(each_step="raise ValueError('no such luck')")
    assert result.outcome == "crash" and "ValueError: no such luck" in result.reason
    assert not processes_in(tmp_path)


def test_a_segmentation_fault_is_a_crash_that_names_the_signal(hold):
    result = hold(each_step="os.kill(os.getpid(), 11)")
    assert result.outcome == "crash" and "Segmentation fault" in result.reason


def test_an_exit_without_submission_is_a_crash(hold):
    result = hold(after="sys.exit(0)")
    assert result.outcome == "crash" and "without submit()" in result.reason


def test_a_candidate_that_hangs_before_begin_is_stopped_at_the_startup_limit(hold, tmp_path):
    result = hold(task=Impatient(**dataclasses.asdict(TINY)), before="time.sleep(1000)")
    assert result.outcome == "timeout" and "before begin()" in result.reason
    assert result.training_seconds == 0.0
    assert not processes_in(tmp_path)


def test_a_candidate_that_trains_past_its_budget_and_ignores_signals_is_stopped(hold, tmp_path):
    result = hold(
        before="import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]",
        after="while True: time.sleep(0.01)",
    )
    assert result.outcome == "timeout" and "between begin() and submit()" in result.reason
    assert result.training_seconds < TINY.time_budget + TINY.grace + 1
    assert not processes_in(tmp_path)


def test_weights_that_are_not_finite_are_invalid(hold):
    result = hold(after="model.head.weight.data.fill_(float('nan'))")
    assert result.outcome == "invalid" and "not finite" in result.reason


def test_logits_of_the_wrong_shape_are_refused_before_the_clock_starts(hold):
    result = hold(forward="return self.head(x)[:, :-1]")
    assert result.outcome == "invalid" and "not floating point" in result.reason
    assert result.training_seconds == 0.0


def test_a_forward_that_depends_on_its_data_is_refused_in_words(hold):
    result = hold(forward="if tokens.sum() > 0: x = x + 1")
    assert result.outcome == "invalid" and "torch.export cannot capture" in result.reason


def test_a_forward_with_dropout_is_sealed_without_it_and_in_place_arithmetic_is_fine(hold):
    result = hold(forward="x = F.dropout(x, 0.1, self.training)\nx += 1\nx.mul_(0.5)")
    assert result.outcome == "ok", result


def test_the_log_keeps_the_head_and_the_tail_of_a_talkative_candidate(hold, tmp_path):
    hold(before="print('first'); [print('x' * 1000) for _ in range(5000)]", after="print('last')")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert len(log) < 1.1 * limits.LOG_LIMIT and log.startswith("first") and log.rstrip().endswith("last")
    assert "bytes left out" in log


def test_the_same_seed_gives_the_same_score_by_hand_and_in_a_trial(repository, run):
    """With the number of steps fixed, nothing is left that could differ."""
    train_py = repository / "train.py"
    train_py.write_text(train_py.read_text().replace("if run.progress >= 1:", "if step == 20:"))
    setting = {"AUTORESEARCH_TASK": "tiny", "AUTORESEARCH_BUDGET": "30", "AUTORESEARCH_SEED": "3"}
    by_hand = run(sys.executable, "train.py", cwd=repository, env=os.environ | setting)
    command = [sys.executable, "prepare.py", "trial", "train.py", "--task", "tiny", "--out", "out"]
    proctored = run(*command, "--budget", "30", "--seed", "3", cwd=repository)
    scores = [line for said in (by_hand, proctored) for line in said.stdout.splitlines() if line.startswith("val_bpb:")]
    assert len(scores) == 2 and scores[0] == scores[1], (by_hand, proctored)


def test_interrupting_a_trial_ends_all_its_processes_and_leaves_no_result(tmp_path, repository, candidate):
    command = [sys.executable, str(repository / "prepare.py"), "trial", str(candidate()), "--task", "tiny"]
    command += ["--out", str(tmp_path / "out")]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        trial = subprocess.Popen([*command, "--budget", "60"], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        metrics = tmp_path / "out" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        trial.send_signal(number)
        assert trial.wait(20) == code
        assert b"Traceback" not in trial.stderr.read()
        assert not processes_in(tmp_path) and not (tmp_path / "out" / "result.json").exists()
        metrics.unlink()
        Result("ok", val_bpb=1.0).write(tmp_path / "out" / "result.json")  # of an earlier trial


def test_a_second_trial_in_the_same_folder_waits_for_the_first(tmp_path, repository, candidate):
    command = [sys.executable, str(repository / "prepare.py"), "trial", str(candidate()), "--task", "tiny"]
    trials = [subprocess.Popen([*command, "--out", str(tmp_path / "out")]) for _ in range(2)]
    assert [trial.wait(60) for trial in trials] == [0, 0]


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = Result("ok", val_bpb=1.25, steps=9, peak_rss_mb=512.0, sha256={"train.py": "ab"})
    result.write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json") == result and result.counted and result.memory_gb == 0.5
    assert "peak_vram_mb" not in (tmp_path / "result.json").read_text()


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[1]",
        "[" * 10**5,
        b"\xff",
        '{"val_bpb": 1.0}',
        '{"outcome": "ok"}',
        '{"outcome": "ok", "val_bpb": NaN}',
        '{"outcome": "ok", "val_bpb": "1.0"}',
        '{"outcome": "ok", "val_bpb": 1.0, "sha256": []}',
        '{"outcome": "ok", "val_bpb": 1.0, "total_seconds": null}',
        '{"outcome": "won", "val_bpb": 1.0}',
        '{"outcome": "ok", "val_bpb": -1.0}',
        '{"outcome": "ok", "val_bpb": true}',
        f'{{"outcome": "ok", "val_bpb": {"9" * 400}}}',
        f'{{"outcome": "ok", "val_bpb": 1.0, "peak_rss_mb": {"9" * 400}}}',
        '{"outcome": "ok", "val_bpb": 1.0, "eval_seconds": Infinity}',
        '{"outcome": "ok", "val_bpb": 1.0, "seed": true}',
        '{"outcome": "ok", "val_bpb": 1.0, "sha256": {"train.py": 1}}',
        '{"outcome": "crash"}',
    ],
)
def test_a_result_that_is_missing_or_damaged_is_none(content, tmp_path):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert Result.read(path) is None


def test_entries_of_a_result_that_nobody_knows_are_left_out(tmp_path):
    (tmp_path / "result.json").write_text('{"outcome": "crash", "reason": "x", "colour": "red"}')
    assert Result.read(tmp_path / "result.json") == Result("crash", "x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "train.bin", 1000), "train.bin is truncated"),
        (lambda folder: (folder / "tokenizer.txt").write_text("YQ==\n"), "tokenizer.txt has changed"),
        (
            lambda folder: (folder / "val.bin").write_bytes(bytes((folder / "val.bin").stat().st_size)),
            "val.bin has changed",
        ),
        (lambda folder: (folder / "val.bin").unlink(), "val.bin'); delete"),
        (lambda folder: (folder / "meta.json").unlink(), "run: python prepare.py"),
        (lambda folder: (folder / "meta.json").write_text("{"), "cannot be read"),
    ],
)
def test_damaged_data_is_named_in_one_sentence_and_nothing_is_started(
    damage, message, tmp_path, cache, repository, run
):
    copy = tmp_path / "cache"
    subprocess.run(["cp", "-r", str(cache), str(copy)], check=True)
    damage(copy / "tiny")
    command = [sys.executable, "prepare.py", "trial", "train.py", "--task", "tiny", "--out", tmp_path / "out"]
    said = run(*command, cwd=repository, env=os.environ | {"AUTORESEARCH_CACHE": str(copy)})
    assert said.returncode == 2 and message in said.stderr and said.stderr.count("\n") == 1, said.stderr
    assert os.listdir(tmp_path / "out") == ["result.json"]
    result = Result.read(tmp_path / "out" / "result.json")
    assert result.outcome == "fault" and not result.counted and said.stderr == f"prepare.py: {result.reason}\n"


def test_an_exam_that_changes_in_mid_trial_is_a_fault_and_gives_no_score(repository, candidate, tmp_path):
    out, script = tmp_path / "out", candidate(begun="time.sleep(3)")
    command = [sys.executable, repository / "prepare.py", "trial", script, "--task", "tiny", "--out", out]
    trial = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "room").exists():
        time.sleep(0.05)
    with open(repository / "exam/examiner.py", "a") as file:
        file.write("# stricter\n")
    assert trial.wait(60) == 2 and "have changed during the trial" in trial.stderr.read()
    assert Result.read(out / "result.json").outcome == "fault"


def test_a_file_of_the_owners_that_is_named_like_a_module_changes_no_exam(repository, candidate, run, tmp_path):
    (repository / "calendar.py").write_text("raise SystemExit('the wrong calendar')\n")
    command = [sys.executable, "prepare.py", "trial", candidate(), "--task", "tiny", "--out", tmp_path / "out"]
    assert run(*command, cwd=repository).returncode == 0


def test_a_typing_mistake_leaves_an_earlier_result_as_it_is(repository, run, tmp_path):
    Result("ok", val_bpb=1.25).write(tmp_path / "result.json")
    command = [sys.executable, "prepare.py", "trial", "nothing.py", "--task", "tiny", "--out", tmp_path]
    assert run(*command, cwd=repository).returncode == 2 and Result.read(tmp_path / "result.json").val_bpb == 1.25


def test_bad_arguments_get_one_sentence_and_exit_code_2(tmp_path, repository, candidate, run):
    command = [sys.executable, repository / "prepare.py", "--task", "tiny"]
    for arguments, message in (
        (["--task", "chess"], "there is no task 'chess'"),
        (["trial", tmp_path / "nothing.py", "--out", tmp_path / "out"], "No such file"),
        (["trial", candidate(), "--out", "/proc/nowhere"], "/proc/nowhere: No such file"),
        (["trial", candidate(), "--out", tmp_path / "out", "--budget", "-3"], "makes no sense"),
    ):
        said = run(*command, *arguments)
        assert said.returncode == 2 and message in said.stderr and "Traceback" not in said.stderr, said.stderr
    said = run(*command, env=os.environ | {"AUTORESEARCH_TASK": "chess"})
    assert said.returncode == 2 and "there is no task" in said.stderr
    said = run(*command, env=os.environ | {"AUTORESEARCH_CACHE": "/proc/nowhere"})
    assert said.returncode == 2 and "AUTORESEARCH_CACHE chooses another folder" in said.stderr


def test_the_docs_tell_how_to_sample_from_the_best_model(repository, run):
    recipe = (ROOT / "docs" / "results.md").read_text().partition("import prepare, torch\n")[2].partition("```")[0]
    for shown, here in (("runs/nov23/1a2b3c4/0/", "out/"), ('"pycode"', '"tiny"'), ("range(200)", "range(3)")):
        assert recipe.count(shown) == 1
        recipe = recipe.replace(shown, here)
    command = [sys.executable, "prepare.py", "trial", "train.py", "--task", "tiny", "--out", "out"]
    assert run(*command, cwd=repository).returncode == 0
    said = run(sys.executable, "-c", "import prepare, torch\n" + recipe, cwd=repository)
    assert said.returncode == 0 and said.stdout.startswith("def main("), said.stderr


EARLY = """
compiled = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
print("found", sorted(path.name for path in compiled.glob("*")))
compiled.mkdir(exist_ok=True)
(compiled / "code").write_text("early")
"""
LATE = "(compiled / 'code').write_text('late'); (compiled / 'weights').write_text('late')"


def test_what_is_compiled_before_begin_serves_the_next_trial_and_nothing_that_is_written_later(tmp_path, candidate):
    path = candidate(before=f"from pathlib import Path\n{EARLY}", begun=LATE)
    first, second = tmp_path / "first", tmp_path / "second"
    assert trial(path, first, TINY, 0).outcome == "ok"
    assert [file.read_text() for file in (first / "compiled").iterdir()] == ["early"]
    assert trial(path, second, TINY, 0, warm=first).outcome == "ok"
    assert "found ['code']" in (second / "log.txt").read_text()
    assert [file.read_text() for file in (first / "compiled").iterdir()] == ["early"]


def test_what_takes_the_place_of_compiled_code_leads_nowhere(tmp_path, candidate, cache):
    """Links to the validation rows, as a file, as a folder or as the compile cache itself; and a pipe nobody reads."""
    rows = cache / "tiny"
    for links in (
        "os.mkdir(c); os.symlink(rows, c + '/a'); os.symlink(rows + '/val.bin', c + '/b')",
        "os.symlink(rows, c)",
    ):
        path = candidate(before=f"c, rows = os.environ['TORCHINDUCTOR_CACHE_DIR'], {str(rows)!r}; {links}")
        assert trial(path, tmp_path / "out", TINY, 0).outcome == "ok"
        for file in (tmp_path / "out").rglob("*"):
            assert file.is_symlink() or file.is_dir() or file.read_bytes() != (rows / "val.bin").read_bytes()
    path = candidate(before="c = os.environ['TORCHINDUCTOR_CACHE_DIR']; os.mkdir(c); os.mkfifo(c + '/pipe')")
    assert trial(path, tmp_path / "out", TINY, 0).outcome == "ok"


STORM = """
import os, sys, time
end = time.monotonic() + 20
for _ in range(24):
    if os.fork() == 0:
        os.setsid()
        while time.monotonic() < end:
            if os.fork():
                os._exit(0)
            open("alive", "a").write(".")
            time.sleep(0.002)
        os._exit(0)
time.sleep(1)
"""


@pytest.mark.parametrize("user", USERS, ids=USERS.get)
def test_processes_that_fork_faster_than_they_are_killed_end_with_their_candidate(user, repository, run):
    (repository / "train.py").write_text(STORM)
    said = run(
        *user, sys.executable, "prepare.py", "trial", "train.py", "--task", "tiny", "--out", "out", cwd=repository
    )
    assert said.returncode == 1 and "outcome:          crash" in said.stdout, said
    assert not processes_in(repository)


def test_processes_that_have_ended_do_not_count(hold, monkeypatch):
    """Those of a short-lived parent become children of the proctor, which must bury them while the trial runs."""
    monkeypatch.setattr(limits, "PROCESS_LIMIT", 20)
    orphans = "for _ in range(40):\n    os.fork() or (os.fork(), os._exit(0))\n    os.wait()"
    result = hold(before=orphans, begun="time.sleep(2)")
    assert result.outcome == "ok", result


def test_one_kill_ends_all_of_them(tmp_path):
    """Each lives too briefly to be found by looking for it; what they write tells that they live."""
    rules = sandbox_rules([], [tmp_path], [])
    child = start_confined([sys.executable, "-c", STORM], rules, cwd=tmp_path)
    time.sleep(0.8)
    kill_group(child)
    child.wait()
    sizes = []
    for _ in range(2):
        time.sleep(0.5)
        sizes.append((tmp_path / "alive").stat().st_size)
    assert 0 < sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", ""),
        ("step 1\nwords\n", "words"),
        (
            "Traceback (most recent call last):\n  File\ntorch._inductor.exc.InductorError: RuntimeError: no gcc\n\n"
            "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this).\n",
            "torch._inductor.exc.InductorError: RuntimeError: no gcc",
        ),
        (
            "Traceback (most recent call last):\n  File\nValueError: a\nTraceback (most recent call last):\n  File\n"
            "KeyError: 'b'\nresource_tracker: There appear to be 2 leaked semaphore objects\n",
            "KeyError: 'b'",
        ),
        ("Traceback (most recent call last):\nValueError: a\ntrain.py: out of memory\n", "train.py: out of memory"),
    ],
)
def test_the_reason_of_a_crash_is_the_line_that_names_it(log, reason):
    assert last_words(log) == reason


def test_triton_finds_in_a_copied_cache_the_kernels_of_its_own_room(tmp_path, candidate):
    """Triton lists the files of a kernel by absolute paths; a link among the lists is not followed."""
    listed = """
    import os
    cache = os.environ["TRITON_CACHE_DIR"] + "/KERNEL"
    found = json.load(open(cache + "/__grp__k.json"))["child_paths"] if os.path.exists(cache) else {}
    print("found", {name: os.path.exists(path) and path.startswith(os.getcwd()) for name, path in found.items()})
    os.makedirs(cache, exist_ok=True)
    open(cache + "/k.cubin", "w").write("kernel")
    json.dump({"child_paths": {"k.cubin": cache + "/k.cubin"}}, open(cache + "/__grp__k.json", "w"))
    os.path.lexists(cache + "/__grp__l.json") or os.symlink(PRECIOUS, cache + "/__grp__l.json")
    """
    precious, content = tmp_path / "precious.json", f"{tmp_path}/first/room/x"
    precious.write_text(content)
    path = candidate(before=f"PRECIOUS = {str(precious)!r}\n{textwrap.dedent(listed)}")
    assert trial(path, tmp_path / "first", TINY, 0).outcome == "ok"
    assert trial(path, tmp_path / "second", TINY, 0, warm=tmp_path / "first").outcome == "ok"
    assert "found {'k.cubin': True}" in (tmp_path / "second" / "log.txt").read_text()
    assert precious.read_text() == content


def test_compiled_code_beyond_its_limit_is_not_kept(tmp_path, candidate, monkeypatch):
    monkeypatch.setattr(limits, "COMPILED_LIMIT", 2**20)
    code = "c = os.environ['TORCHINDUCTOR_CACHE_DIR']; os.mkdir(c); open(c + '/code', 'wb').write(bytes(2**21))"
    assert trial(candidate(before=code), tmp_path / "out", TINY, 0).outcome == "ok"
    assert not (tmp_path / "out" / "compiled").exists()


def test_the_environment_of_a_trial_names_no_key_and_no_folder_of_the_user(hold, tmp_path, monkeypatch):
    for name in ("TORCH_TRACE", "TRITON_DUMP_DIR", "TRITON_HOME", "HF_TOKEN", "PYTORCH_CUDA_ALLOC_CONF", "OMP_WAIT"):
        monkeypatch.setenv(name, "/mine")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    hold(before="print('kept', sorted(name for name, value in os.environ.items() if value == '/mine'))")
    assert "kept ['OMP_WAIT', 'PYTORCH_CUDA_ALLOC_CONF']" in (tmp_path / "out" / "log.txt").read_text()


NAMES_ITS_THREADS = """
import os, sys
import threading
done, names = threading.Event(), []
thread = threading.Thread(target=done.wait)
thread.start()
comm = f"/proc/self/task/{thread.native_id}/comm"
open(comm, "w").write("named")  # what the driver does
print(open(comm).read().strip())
done.set()
parent = os.getppid()
for path in (
    f"/proc/{parent}/task/{parent}/comm",
    f"/proc/{parent}/comm",
    f"/proc/self/task/../../{parent}/task/{parent}/comm",
    "/proc/self/comm",
    "/proc/self/oom_score_adj",
    "/proc/self/task/self",
    "/proc/self/task/new",
):
    try:
        open(path, "w"); print("LEAK", path)
    except OSError:
        pass
for name, content in (("oom_score_adj", "-1000"), ("uid_map", "0 0 1"), ("setgroups", "allow"),
                      ("attr/current", "unconfined"), ("attr/exec", "unconfined"), ("timerslack_ns", "1")):
    try:
        file = os.open(f"/proc/self/task/{os.getpid()}/{name}", os.O_WRONLY)
        os.write(file, content.encode()); print("LEAK", name)
    except OSError:
        pass
print("DONE")
"""


def test_on_a_gpu_a_process_may_name_its_threads_and_write_nowhere_else(monkeypatch):
    monkeypatch.setattr(sandbox, "has_gpu", lambda: True)
    rules = sandbox_rules([], [], [])
    child = start_confined([sys.executable, "-c", NAMES_ITS_THREADS], rules, stdout=subprocess.PIPE, text=True)
    assert child.communicate(timeout=20)[0] == "named\nDONE\n"


def test_who_wants_others_to_be_ended_before_it_is_stopped(hold, monkeypatch):
    """Lowering is possible where the opening for CUDA is; raising the bar has the same effect."""
    monkeypatch.setattr(Watch, "last_to_go", 1001)
    result = hold(before="time.sleep(30)")
    assert result.outcome == "crash" and "others to be ended before it" in result.reason


def test_a_proctor_that_cannot_start_a_process_in_mid_trial_blames_the_candidate(hold, monkeypatch):
    """As where a candidate has filled the table of processes."""

    def full(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(Watch, "start_clock", full)
    result = hold()
    assert result.outcome == "crash" and "gave way while it ran" in result.reason, result


def test_an_examiner_that_the_kernel_has_ended_is_replaced(hold, monkeypatch):
    monkeypatch.setattr(Watch, "look", lambda watch, code: watch.examiner.kill())
    assert hold().outcome == "ok"


NAMES_A_THREAD = """
import os, sys
sys.stdin.readline()
open(f"/proc/self/task/{os.getpid()}/comm", "w").write("named")
print("named", flush=True)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can drop the caches")
def test_a_process_may_name_its_threads_even_after_the_kernel_has_dropped_its_caches(monkeypatch):
    monkeypatch.setattr(sandbox, "has_gpu", lambda: True)
    rules = sandbox_rules([], [], [])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = start_confined([sys.executable, "-c", NAMES_A_THREAD], rules, **pipes)
    time.sleep(0.3)
    Path("/proc/sys/vm/drop_caches").write_text("2")
    assert child.communicate("\n", timeout=20)[0] == "named\n"


OUTLIVES = """
import os, sys
print(os.getpid(), flush=True)
if os.fork() == 0:
    sys.stdin.readline()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can choose the next process id")
def test_the_number_of_a_candidate_is_nobody_elses_while_a_process_of_it_lives():
    """So neither its right to name threads nor the signal that ends its group can meet a stranger."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = start_confined([sys.executable, "-c", OUTLIVES], sandbox_rules([], [], []), **pipes)
    number = int(child.stdout.readline())
    os.waitpid(child.pid, 0)
    for _ in range(20):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
        heir = subprocess.Popen(["true"])
        assert heir.pid != number
        heir.wait()
    print("", file=child.stdin, flush=True)
    child.returncode = 0


def test_a_proctor_whose_clock_was_held_up_finds_it_out_from_the_cpu_time(hold, monkeypatch):
    slow = types.SimpleNamespace(**vars(time))
    slow.monotonic = lambda: time.monotonic() / 20
    monkeypatch.setattr(watch, "time", slow)
    task = dataclasses.replace(TINY, time_budget=9.0)
    result = hold(task=task, begun="burnt = time.process_time() + 4", each_step="if time.process_time() > burnt: break")
    assert result.outcome == "invalid" and "its clock cannot be right" in result.reason, result


KILLS = """
import os, signal
parent = os.getppid()
for number in (parent, -1, -parent):
    try:
        os.kill(number, 0); print("LEAK", number)
    except OSError:
        print("DENIED")
os.kill(os.getpid(), 0)
os.kill(0, 0)
signal.raise_signal(signal.SIGUSR1 if print("DONE", flush=True) else signal.SIGCONT)
"""


def test_on_a_kernel_that_cannot_scope_signals_a_candidate_reaches_no_process_but_itself(monkeypatch):
    import landlockpy

    ruleset = landlockpy.Ruleset
    monkeypatch.setattr(landlockpy, "Ruleset", lambda scoped: ruleset())
    monkeypatch.setattr(sandbox, "landlock_abi", lambda: 5)
    rules = sandbox_rules([], [], [])
    child = start_confined([sys.executable, "-c", KILLS], rules, stdout=subprocess.PIPE, text=True)
    assert child.communicate(timeout=20)[0] == "DENIED\n" * 3 + "DONE\n" and child.returncode == 0


@pytest.mark.skipif(os.getuid() != 0, reason="a user of its own can be had by root alone")
def test_an_ordinary_user_cannot_start_more_threads_than_are_allowed(monkeypatch):
    """Counted over all that the user runs; the count of a user with no other process is the limit itself."""
    code = """
import os, resource
os.setresuid(54321, 54321, 54321)
print(resource.getrlimit(resource.RLIMIT_NPROC)[0])
for number in range(100):
    try:
        if os.fork() == 0:
            os.kill(os.getpid(), 19)
    except BlockingIOError:
        break
print(number, flush=True)
os.kill(0, 9)
"""
    monkeypatch.setattr(limits, "THREAD_LIMIT", 40)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    child = start_confined([sys.executable, "-c", code], None, stdout=subprocess.PIPE, text=True)
    assert child.communicate(timeout=20)[0].split() == ["40", "39"]


@pytest.mark.parametrize("left, fault", [(2**32, None), (2**20, "has filled up, and not by this trial; make room")])
def test_what_others_do_to_the_disk_and_to_the_memory_is_not_held_against_a_trial(
    left, fault, candidate, tmp_path, monkeypatch
):
    """Only a disk that is full ends it, as a fault of the machine."""
    log, real = tmp_path / "out" / "metrics.jsonl", psutil.virtual_memory

    def filled():
        return log.exists()

    def statvfs(_):
        free = left if filled() else 2**40
        return types.SimpleNamespace(
            f_bavail=free, f_frsize=1, f_blocks=2**41, f_bfree=free, f_files=10**9, f_favail=10**9
        )

    monkeypatch.setattr(watch.os, "statvfs", statvfs)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real()._replace(shared=2**40 * filled()))
    path = candidate(each_step="time.sleep(2)")
    if fault:
        with pytest.raises(prepare.Pause, match=fault):
            trial(path, tmp_path / "out", TINY, 0, shares=2)
    else:
        assert trial(path, tmp_path / "out", TINY, 0, shares=2).outcome == "ok"


@pytest.mark.parametrize("shares", [1, 2])
def test_a_trial_has_its_share_of_the_memory_and_files_in_memory_count(shares, candidate, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MEMORY_SHARE", 0.05 * shares)
    code = "f = os.memfd_create('x'); [os.write(f, bytes(2**24)) for _ in range(100)]; time.sleep(9)"
    result = trial(candidate(before=code), tmp_path / "out", TINY, 0, shares=shares)
    assert result.outcome == "crash" and "GB of memory" in result.reason, result


def test_a_file_that_is_deleted_and_held_open_fills_the_disk_all_the_same(hold, monkeypatch):
    monkeypatch.setattr(limits, "DISK_LIMIT", 2**27)
    code = "f = open('big', 'wb'); os.unlink('big'); [f.write(bytes(2**24)) for _ in range(64)]; time.sleep(9)"
    result = hold(before=code)
    assert result.outcome == "crash" and "filled the disk" in result.reason, result
