"""The runs of a candidate: as many as the verdict asks for, on a machine that may be slow, full, hot or broken.

A trial that failed on such a machine is held again; only what the candidate did counts against it.
"""

import collections
import dataclasses
import itertools
import math
import shutil
import statistics
from pathlib import Path

from exam.result import Result
from lab import launch, verdict
from lab.book import Experiment
from lab.researcher import Draft, Say
from lab.tag import Tag
from prepare import Pause, Trouble, one_line

SLOW_TRIES = 3  # of a run that fails while the machine is slower than SAME_SPEED, until the loop waits
MOST_FAULTS = 3  # of the machine in a row, until the best shows whether it is the candidate that brings them about
SLOW_PAUSES = 2  # until the best shows whether the machine's new speed is one to be judged at


@dataclasses.dataclass(frozen=True)
class Running:
    """A trial under way, for the live view."""

    commit: str
    description: str
    run: int
    curve: Path  # its metrics.jsonl


class Measure:
    """Holds the trials of one tag, and remembers what went wrong with the machine since the start of the loop."""

    def __init__(self, tag: Tag, say: Say, greedy=False, sandbox=True):
        self.tag, self.say, self.greedy, self.sandbox = tag, say, greedy, sandbox
        self.running: Running | None = None
        self.faults = collections.Counter()  # {commit: trials in a row in which the machine was at fault}
        self.settled, self.slow_pauses = None, 0  # rate at which the best has shown to run again; pauses for slowness

    def measure(self, commit: str, draft: Draft) -> tuple[Experiment, str]:
        """Run a candidate as often as it takes: its finished experiment, and why it ended so.

        Raises Pause where the machine has to change first, and Trouble where the owner has to mend something.
        """
        experiment = Experiment(commit, 0.0, 0.0, "crash", draft.description)
        self._make_comparable(commit)
        best_ran_again = False
        for run in itertools.count():
            result = self._trial(commit, run, draft.description)
            if result.outcome != "ok":
                if commit == self.tag.settings["start"]:
                    shutil.rmtree(self.tag.path(commit, run))  # so that the next start tries again
                    reason = f"the baseline does not run: {result.reason}"
                    raise Trouble(f"{reason}; mend train.py or the machine, start again")
                return dataclasses.replace(experiment, memory_gb=0.0), result.reason
            experiment = experiment.after(result)
            if self.tag.result(commit, run + 1):  # an earlier start has held it: all there are decide
                continue
            ruling = self._judge(experiment, best_ran_again)
            if ruling.decision == "best":
                self._run_best_again(ruling.reason)
                best_ran_again = True
                ruling = self._judge(experiment, best_ran_again)
            if ruling.decision != "again":
                val_bpb, count = statistics.fmean(ruling.scores), len(ruling.scores)
                experiment = dataclasses.replace(experiment, val_bpb=val_bpb, status=ruling.decision)
                return experiment, f"{ruling.reason}, {count} run{'s' * (count > 1)}"
            if ruling.unusual:
                self.say(f"{ruling.reason}; running {commit} again", "yellow")

    def _judge(self, experiment, best_ran_again):
        if experiment.commit == self.tag.settings["start"]:
            return verdict.judge_baseline(experiment, self.greedy)
        return verdict.judge(experiment, self.tag.best, self.tag.experiments, self.greedy, best_ran_again)

    def _make_comparable(self, commit):
        """Run the best again where nothing could be compared with it otherwise."""
        if commit != self.tag.settings["start"] and not self.greedy and not verdict.noise(self.tag.experiments)[1]:
            for _ in range(verdict.BASELINE_RUNS):  # somebody has deleted the evidence
                self._run_best_again("how much a run varies is not known any more")
        if self.slow_pauses >= SLOW_PAUSES and self.tag.experiments:
            self._run_best_again("the machine stays slow")

    def _run_best_again(self, reason):
        """One more run of the best commit, which counts from then on."""
        best = self.tag.best
        self.say(f"{reason}; running the best, {best.commit}, again", "yellow")
        result = self._trial(best.commit, len(self.tag.results(best.commit)), best.description)
        if result.outcome == "ok":
            self.tag.ran_again(result)
            self.settled = result.matmul_flops

    # -- one trial, and whose fault its failure is

    def _trial(self, commit, run, description):
        """The result of `commit` with seed `run`, which an earlier start may have left.

        Raises Pause where the machine, and not the candidate, is at fault. A trial that failed on a slow machine counts
        for nothing: its run is held again, after some tries in a row at another time.
        """
        for _ in range(SLOW_TRIES):
            result = self.tag.result(commit, run) or self._hold(commit, run, description)
            slow = self._slowness(commit, result)
            if not slow:
                self.slow_pauses = 0
                return result
            if self.slow_pauses >= SLOW_PAUSES and not self.tag.experiments:
                return result  # a baseline that no wait has helped: the machine may never have had the rate it is given
            self.say(f"{slow}; run {run + 1} of {commit} does not count ({one_line(result.reason, 200)})", "yellow")
            (self.tag.path(commit, run) / "result.json").unlink()
        self.slow_pauses += 1
        raise Pause(f"{slow}; end what else uses it ({commit} failed: {one_line(result.reason, 200)})")

    def _hold(self, commit, run, description):
        """Hold one trial and return its result. Raises Pause where the machine could not hold it."""
        tag = self.tag
        tag.check_exam()
        self.running = Running(commit, description, run, tag.path(commit, run) / "metrics.jsonl")
        result = launch.hold(self._request(commit, run))
        if result.outcome == "fault":
            raise Trouble(f"the trial of {commit} could not be held: {result.reason}")
        # A baseline's proctor that was killed is another fault of the machine; a candidate may have had its own killed.
        if result.outcome == "paused" or result.outcome == "lost" and not tag.experiments:
            self.faults[commit] += 1
            return self._judge_fault(commit, result)
        self.faults[commit] = 0
        if result.outcome == "lost":  # whatever has ended the proctor, the night goes on
            return Result("crash", f"the trial broke off: {result.reason}")
        self._check_evidence(commit, run)
        return result

    def _request(self, commit, run):
        tag = self.tag
        best, start = tag.best, tag.settings["start"]
        return launch.Request(
            source=tag.repository.source(f"refs/autoresearch/{tag.name}/{commit}"),
            out=tag.path(commit, run),
            task=tag.task,
            seed=run,
            flops=tag.settings["flops"],
            beat=max([each.val_bpb for each in best.runs] or [best.val_bpb]) if best else None,
            # To compile takes a GPU a minute. But what a candidate has compiled is a folder of code, in which it could
            # tell the next trial something: so it is the baseline's.
            warm=None if (commit, run) == (start, 0) else tag.path(start, 0),
            sandbox=self.sandbox,
        )

    def _check_evidence(self, commit, run):
        """Raise Trouble or Pause, and forget the result, where exam or device are not those of the tag's first run."""
        tag, path = self.tag, self.tag.path(commit, run) / "result.json"
        try:
            result = tag.result(commit, run)
        except Trouble:  # a file of the exam was replaced in mid-trial
            path.unlink()
            raise
        first = tag.result(tag.settings["start"], 0)
        was, now = (each and each.device for each in (first, result))
        if was and now and was != now and not was.startswith("CPU"):
            path.unlink()
            raise Pause(f"the trials of this tag ran on {was}, and now there is {now}")

    def _judge_fault(self, commit, fault):
        """The result of a trial of `commit` that the machine did not let be held: a crash, after some in a row.

        Raises Pause where it is too early to blame the candidate: a run of the best has to go well first, and a fault
        of the best's own trials, or of the baseline's, that has been named never is.
        """
        tag, times, named = self.tag, self.faults[commit], fault.outcome == "paused"
        if times <= MOST_FAULTS or named and (not tag.experiments or commit == tag.best.commit):
            raise Pause(fault.reason if named else f"the trial of {commit} broke off: {fault.reason}")
        if tag.experiments:
            self._run_best_again(f"the trial of {commit} could not be held {times} times in a row ({fault.reason})")
        return Result("crash", f"the machine failed in its trials, {times} times in a row: {fault.reason}")

    def _usual_speed(self, commit):
        """Matrix-multiply rate, FLOP/s, that the machine should reach in a trial of `commit`, by what it has reached.

        The fastest of the best's runs, for want of one of any experiment's, of the earlier runs of `commit`, or what
        was known of the machine when the tag was started.
        """
        best = [run.speed for run in self.tag.best.runs] if self.tag.experiments else []
        others = [run.speed for e in self.tag.experiments for run in e.runs]
        own = [result.matmul_flops for result in self.tag.results(commit) if result.outcome == "ok"]
        measured = next(filter(any, (best, others, own)), [self.tag.settings["flops"]])
        return min(max(filter(None, measured)), self.settled or math.inf)

    def _slowness(self, commit, result):
        """How slow the machine was, in words, where that may be why a trial of `commit` failed; else None."""
        late = result.outcome == "invalid" and result.eval_seconds >= self.tag.task.exam_limit
        speed = result.matmul_flops
        if not speed or not (late or result.outcome in ("timeout", "crash")):
            return None
        usual = self._usual_speed(commit)
        if verdict.same_speed(speed, usual) or speed > usual:
            return None
        return f"the machine multiplies matrices at {speed / 1e12:.3g} TFLOP/s, and had {usual / 1e12:.3g}"
