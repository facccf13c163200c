"""Nights through srun and through ssh, on this one machine: as root on Debian, python tests/slurm.py [PART...]

The cluster is that of cluster.py. Takes some ten minutes, prints a line for each thing that has to hold, and exits with
1 where one does not. PART: of the name of a part, see PARTS, to hold those alone.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import psutil  # noqa: E402
from cluster import Cluster, install, wait_until  # noqa: E402
from conftest import TINY, tiny_documents, tiny_repository  # noqa: E402

import prepare  # noqa: E402
from exam import rows  # noqa: E402
from exam.signals import hear_signals  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Nights


class Night:
    """A night of the loop in a repository of its own, started and started again."""

    def __init__(self, cluster: Cluster, launch, experiments=2, budget=5.0):
        self.cluster, self.launch, self.experiments, self.budget = cluster, launch, experiments, budget
        self.folder = tiny_repository(Path(tempfile.mkdtemp(dir=cluster.folder)) / "night")
        self.log, self.loop = self.folder.with_name("said"), None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        if not self.ended():  # an error in between: its trials end with it
            self.loop.terminate()
        self.end()

    def start(self):
        line = [sys.executable, "agent_loop.py", "--tag", "t", "--task", "tiny", "--researcher", "search", "--greedy"]
        line += ["--budget", str(self.budget), "--max-experiments", str(self.experiments)]
        line += ["--launch", self.launch, "--parallel", "2"]
        with open(self.log, "a") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            environment = self.cluster.environment | {"ANTHROPIC_API_KEY": "secret"}
            self.loop = subprocess.Popen(line, **streams, cwd=self.folder, env=environment)

    def ended(self):
        return self.loop.poll() is not None

    def end(self, number=None):
        """Wait for the end of the loop, after a signal, and return its exit code. Raises TimeoutExpired."""
        if number:
            self.loop.send_signal(number)
        try:
            return self.loop.wait(300)
        finally:
            self.loop.kill()

    def said(self):
        return self.log.read_text()

    def rows(self):
        path = self.folder / "results.tsv"
        return [line.split("\t") for line in path.read_text().splitlines()[1:]] if path.exists() else []

    def trials(self):
        """[(folder of a run, process)] of all trials, wherever they run; what has launched them does not count."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if line[2:3] == ["trial"] and line[1].startswith(str(self.folder)):
                    found[process.pid] = process.ppid(), Path(line[line.index("--out") + 1]), process
        # A fork of a trial's process is the same in all this until it has become another program.
        return [(out, process) for parent, out, process in found.values() if parent not in found]

    def training(self, node=None):
        """(job, folder, process) of a trial, on that node, whose train.py has begun; None while there is none."""
        nodes = {job: name for job, name, _ in self.cluster.jobs()}
        for out, process in self.trials():
            with contextlib.suppress(psutil.Error):
                job = process.environ().get("SLURM_JOB_ID")
                begun = (out / "metrics.jsonl").exists() and (out / "room").exists()
                if begun and node in (None, nodes.get(job)):
                    return job, out, process
        return None

    def await_training(self, node=None):
        """The same once there is one. Raises TimeoutError, at the end of the loop too."""
        found = wait_until("a train.py has begun", lambda: self.training(node) or self.ended())
        if found is True:
            raise TimeoutError(f"the loop has ended before its time: {self.said()[-2000:]}")
        return found

    def left(self):
        """Jobs and trials that are there ten seconds from now."""
        with contextlib.suppress(TimeoutError):
            wait_until("all is gone", lambda: not self.cluster.jobs() and not self.trials(), 10)
        return [*self.cluster.jobs(), *self.trials()]

    def carried_on(self):
        """What holds until the end of a night that was killed and goes on."""
        longest, since = 0.0, {}
        while not self.ended():
            folders, now = [out for out, _ in self.trials()], time.monotonic()
            since = {out: since.get(out, now) for out in folders if folders.count(out) > 1}
            longest = max([longest, *(now - start for start in since.values())])
            time.sleep(0.3)
        yield "a trial that is held again soon ends elsewhere", longest < 6, f"both were there for {longest:.0f} s"

    def whole(self):
        """What holds at the end of every night: its rows, and that nothing is left of it."""
        code, rows, blamed = self.end(), self.rows(), []
        for commit in [row[0] for row in rows if row[3] == "crash"]:  # as quick_train.py has it where it is asked to
            logs = [path.read_text() for path in self.folder.glob(f"runs/t/{commit}/*/log.txt")]
            blamed += [commit] * (not any("crashing as asked" in log for log in logs))
        yield "the loop ends well", code == 0, f"exit code {code}: {self.said()[-2000:]}"
        yield "each experiment has a row", len({row[0] for row in rows}) == len(rows) == self.experiments + 1, rows
        yield "no candidate is blamed for a machine", not blamed, blamed
        left = self.left()
        yield "no job and no trial is left", not left, left


# ---------------------------------------------------------------------------------------------------------------------
# What has to hold: parts yield (what, whether it does, else what was found)


def whole(cluster, launch):
    """a night, with a key in the loop's environment"""
    with Night(cluster, launch, experiments=6, budget=0.8) as night:
        nodes, keys, most = set(), set(), 0
        while not night.ended():
            trials = night.trials()
            nodes, most = nodes | {node for _, node, _ in cluster.jobs() if node}, max(most, len(trials))
            for _, process in trials:
                with contextlib.suppress(psutil.Error):
                    keys |= {name for name in process.environ() if "KEY" in name}
            time.sleep(0.3)
        yield "two trials run at a time", most == 2, most
        yield "no key reaches a trial", not keys, keys
        if "srun" in launch:
            yield "both nodes are used", nodes == {"one", "two"}, nodes
        yield from night.whole()


def cancelled(cluster, launch):
    """scancel in mid-trial"""
    with Night(cluster, launch) as night:
        wait_until("the baseline has its row", night.rows)
        job, out, _ = night.await_training()
        cluster.run("scancel", job)
        yield from night.whole()
        result = out / "result.json"
        yield "the trial is held again", result.exists() and '"lost"' not in result.read_text(), sorted(out.iterdir())


def drained(cluster, launch):
    """a node drained in mid-night, and taken back"""
    with Night(cluster, launch, experiments=4) as night:
        night.await_training("two")
        running = {job for job, node, _ in cluster.jobs() if node == "two"}
        cluster.run("scontrol", "update", "NodeName=two", "State=DRAIN", "Reason=test")
        count, later = len(night.rows()), set()
        while not night.ended() and len(night.rows()) < count + 2:
            later |= {job for job, node, _ in cluster.jobs() if node == "two"} - running
            time.sleep(0.3)
        yield "the night goes on on the other", not night.ended() and not later, later
        cluster.run("scontrol", "update", "NodeName=two", "State=RESUME")
        yield "a node that is back is used", night.await_training("two"), cluster.jobs()
        yield from night.whole()


def lost(cluster, launch):
    """a node that nobody can reach any more, on which a trial goes on"""
    with Night(cluster, launch, budget=30.0) as night:  # it would outlast the loop's wait for its last words
        *_, process = night.await_training("two")
        cluster.end("two", signal.SIGKILL)
        cluster.run("scontrol", "update", "NodeName=two", "State=DOWN", "Reason=test")
        wait_until("the loop holds it again", lambda: "trying again" in night.said() or night.ended())
        started = time.monotonic()
        yield "the trial goes on there", process.is_running(), process
        gone, _ = psutil.wait_procs([process], 60)
        seconds = time.monotonic() - started
        yield "it ends once it is held again", gone and seconds < 6, f"after {seconds:.0f} s"
        yield from night.whole()
    cluster.start_node("two")


def late(cluster, launch):
    """Slurm's time limit in mid-trial"""
    with Night(cluster, launch, experiments=0, budget=40.0) as night:
        night.end()
        train_py = night.folder / "train.py"
        # Slurm's shortest limit is a minute, and may take half a minute more to be noticed.
        train_py.write_text("import time\n\ntime.sleep(60)\n" + train_py.read_text())
        cluster.run("git", "-C", night.folder, "commit", "-qam", "slower to start")
        night.launch, night.experiments = launch.replace("srun", "srun --time=1"), 1
        night.start()
        wait_until("a trial is over", lambda: "trying again" in night.said() or night.ended(), 180)
        yield "the loop says that it will try again", not night.ended(), night.said()[-2000:]
        night.end(signal.SIGINT)
        yield "no candidate is blamed for it", len(night.rows()) == 1, night.rows()
        left = night.left()
        yield "no job and no trial is left", not left, left


def killed(cluster, launch, all_of_it=False):
    """kill -9 of the loop in mid-trial, and the same command again"""
    with Night(cluster, launch) as night:
        wait_until("the baseline has its row", night.rows)
        night.await_training()
        launchers = psutil.Process(night.loop.pid).children()
        night.end(signal.SIGKILL)
        for process in launchers if all_of_it else ():
            process.kill()
        if not all_of_it or "ssh" in launch:  # a job of Slurm's ends with its srun
            yield "a trial outlives the loop", night.trials(), launchers
        night.start()
        yield from night.carried_on()
        yield from night.whole()


def cut(cluster, launch):
    """the same with what has launched the trials, as a power cut ends it"""
    yield from killed(cluster, launch, all_of_it=True)


def interrupted(cluster, launch):
    """Ctrl-C in mid-trial"""
    with Night(cluster, launch) as night:
        night.await_training()
        started = time.monotonic()
        code, seconds = night.end(signal.SIGINT), time.monotonic() - started
        yield "the loop ends within seconds", code == 130 and seconds < 15, f"exit code {code} after {seconds:.0f} s"
        left = night.left()
        yield "no job and no trial is left", not left, left
        night.start()
        yield from night.whole()


LAUNCH = {"srun": "srun -N1 -n1 --quiet {{}}", "ssh": "ssh -F {folder}/ssh.conf here {{}}"}
PARTS = {f"srun-{part.__name__}": part for part in (whole, cancelled, drained, lost, late, killed, cut, interrupted)}
PARTS |= {f"ssh-{part.__name__}": part for part in (whole, killed, cut, interrupted)}

# ---------------------------------------------------------------------------------------------------------------------
# The command line


def show(name, cluster):
    """Hold a part and print what it finds; returns whether all holds."""
    fine, started = [], time.monotonic()
    print(f"{name}: {PARTS[name].__doc__}", flush=True)
    try:
        for what, holds, found in PARTS[name](cluster, LAUNCH[name.partition("-")[0]].format(folder=cluster.folder)):
            fine.append(bool(holds))
            print(f"ok  {what}" if holds else f"NO  {what}: {found}", flush=True)
    except (OSError, subprocess.SubprocessError, psutil.Error) as error:
        fine.append(False)
        print(f"NO  {name} broke off: {error}", flush=True)
    print(f"    {time.monotonic() - started:.0f} s", flush=True)
    return all(fine)


def main():
    asked = sys.argv[1:]
    names = [name for name in PARTS if not asked or any(word in name for word in asked)]
    if not names:
        sys.exit(f"there is no such part; there are {', '.join(PARTS)}")
    hear_signals()
    install()
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as cluster:
        os.environ["AUTORESEARCH_CACHE"] = cluster.environment["AUTORESEARCH_CACHE"] = f"{folder}/cache"
        rows.prepare(TINY, lambda: (tiny_documents, 800, {}))
        prepare.machine_flops()
        return 0 if all([show(name, cluster) for name in names]) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
