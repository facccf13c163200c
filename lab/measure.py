"""The runs of a candidate: as many as the verdict asks for, on machines that may be slow, full, hot, broken or away.

A trial that failed on such a machine is held again; only what the candidate did counts against it.
"""

import asyncio
import collections
import dataclasses
import itertools
import math
import shutil
import statistics
from collections.abc import Callable

from exam.files import remove
from exam.result import Result
from lab import launch, verdict
from lab.book import Experiment
from lab.conditions import SEEDS
from lab.profile import NO_USE, looked_on
from lab.researcher import Draft, Say
from lab.runs import disturbed, out_of_step, same_speed
from lab.simpler import only_deletes
from lab.slots import POLL, Running, Slot, end_all
from lab.tag import Tag
from prepare import Pause, Trouble, one_line

SLOW_TRIES = 3  # of a run that fails while the machine is slower than SAME_SPEED, until the slot waits
SLOW_PAUSES = 2  # until the best shows whether the machine's new speed is one to be judged at
# Faults of the machine in a row, until the best shows whether it is the candidate that brings them about: in trials
# here, and in those of launchers, which lose what they please.
MOST_FAULTS, MOST_LOST = 3, 8
CLASS_TRIES = 3  # runs of the best by a launcher, which cannot be told on what, to have one on a candidate's device


class Measure:
    """Holds the trials of one tag, and remembers what went wrong with the machines since the start of the loop."""

    def __init__(self, tag: Tag, say: Say, greedy=False, sandbox=True, patient=True):
        """patient: whether to pause until a quiet moment where others disturb what went well, besides trying again."""
        self.tag, self.say, self.greedy, self.sandbox, self.patient = tag, say, greedy, sandbox, patient
        self.running: dict[Slot, Running] = {}
        self.faults = collections.Counter()  # {(commit, run): trials in a row in which the machine was at fault}
        self.slow_pauses = collections.Counter()  # {slot: pauses in a row for slowness}
        self.set_aside = collections.Counter()  # {(commit, run): trials that did not count}
        self.closely: set[tuple[str, int]] = set()  # (commit, run) whose exam is to look closely at any score
        self.rounds = 0  # of the baseline's runs, which did not agree
        self.settled: dict[str, float] = {}  # {device: rate at which the best has shown to run again}
        self.best_runs = asyncio.Lock()  # of those that run the best again, which may spare the next one that
        self.beginning = asyncio.Lock()  # held for as long as a trial has this machine to itself

    async def measure(self, commit: str, draft: Draft, slot: Slot) -> tuple[Experiment, str]:
        """Run a candidate as often as it takes: its finished experiment, and why it ended so.

        Raises Pause where the machine has to change first, and Trouble where the owner has to mend something.
        """
        experiment = Experiment(commit, 0.0, 0.0, "crash", draft.description)
        await self._make_comparable(slot)
        compared, tries = None, 0  # the best that has run again for this candidate, and how often
        for run in itertools.count():
            result = await self._trial(commit, run, draft.description, slot)
            if result.outcome != "ok":
                return dataclasses.replace(experiment, memory_gb=0.0), result.reason
            experiment = experiment.after(result)
            if self.tag.result(commit, run + 1):  # an earlier start has held it: all there are decide
                continue
            ruling = self._judge(experiment, compared, draft)
            while ruling.decision == "best":
                best = self.tag.best.commit
                if await self._run_best_again(ruling.reason, slot):
                    tries += 1
                    compared = best if tries >= (CLASS_TRIES if slot.launcher else 1) else None
                ruling = self._judge(experiment, compared, draft)
            if ruling.decision == "keep" and self._too_little_looked_at(commit):
                self.say(f"{commit} scored what seemed hopeless at first; its exam has to look closer", "yellow")
                return await self.measure(commit, draft, slot)
            if ruling.decision != "again":
                return _finished(experiment, ruling)
            if ruling.unusual:
                self.say(f"{ruling.reason}; running {commit} again", "yellow")

    async def profile(self, commit: str, slot: Slot):
        """Find out where the time of a training step of `commit` goes, in a short run that has no score."""
        request = self._request(commit, 0, slot)
        source = looked_on(request.source, request.task.time_budget)
        out = self.tag.profile(commit)
        try:
            async with self.beginning:
                self.running[slot] = Running(slot, commit, "where its time goes", 0, out)
            await self._held(dataclasses.replace(request, source=source, out=out), slot)
        finally:  # of use is only what it has printed
            for left in NO_USE:
                remove(out / left)

    async def measure_baseline(
        self, draft: Draft, slots: tuple[Slot, ...], think_ahead: Callable[[], None]
    ) -> tuple[Experiment, str]:
        """The same of the baseline, whose runs are held side by side as far as there are slots.

        think_ahead: called as soon as its first run tells what to think about, or else there would be no time for it.
        """
        start = self.tag.settings["start"]
        experiment, held = Experiment(start, 0.0, 0.0, "crash", draft.description), 0
        wanted = 1 if self.greedy else verdict.BASELINE_RUNS
        if not self.greedy and not self.tag.results(start):
            self.say(f"it runs {wanted} times, since the scores of equal code differ: by how much?")
        if len(slots) >= wanted:
            think_ahead()
        while True:
            runs = range(held, max(held + 1, min(wanted, held + len(slots))))
            for result in await _side_by_side(
                self._trial(start, run, draft.description, slot) for run, slot in zip(runs, slots)
            ):
                if result.outcome != "ok":
                    for run in runs:
                        shutil.rmtree(self.tag.path(start, run), ignore_errors=True)  # the next start tries again
                    reason = f"the baseline does not run: {result.reason}"
                    raise Trouble(f"{reason}; mend train.py or the machine, start again")
                experiment = experiment.after(result)
            held = runs.stop
            think_ahead()
            if held >= wanted and self._disagree(start, experiment.runs):
                experiment, held = dataclasses.replace(experiment, runs=()), 0
                continue
            ruling = verdict.judge_baseline(experiment, self.greedy)
            if held >= wanted and not self.tag.result(start, held) and ruling.decision != "again":
                return _finished(experiment, ruling)

    def _disagree(self, start, runs) -> bool:
        """Whether runs of the baseline are to be held again, since equal code made far fewer steps in them.

        Raises Pause, after some tries, for the machine to become quiet; after some of these they are taken as they are.
        """
        odd = out_of_step(runs)
        if not odd:
            return False
        said = f"the baseline made {', '.join(f'{run.steps or 0:.0f}' for run in runs)} steps, with equal code"
        if self.rounds >= (SLOW_TRIES * SLOW_PAUSES if self.patient else SLOW_TRIES - 1):
            self.say(f"{said}: no quiet moment was found, and only large gains will be told from noise", "red")
            return False
        self.rounds += 1
        for run in odd:
            (self.tag.path(start, run) / "result.json").unlink()
        if self.rounds % SLOW_TRIES == 0:
            raise Pause(f"{said}; end what else uses the machine")
        self.say(f"{said}: others disturb it; running again what fell behind", "yellow")
        return True

    def _too_little_looked_at(self, commit) -> bool:
        """Whether runs of a candidate are to be held again, since their exam looked less closely than a keep asks for.

        What was hopeless when a run began may have become good: on a machine on which the best has run only since.
        """
        runs = [
            run for run, result in enumerate(self.tag.results(commit)) if result.val_bpb >= (result.beat or math.inf)
        ]
        self.closely |= {(commit, run) for run in runs}
        for run in runs:
            (self.tag.path(commit, run) / "result.json").unlink()
        return bool(runs)

    def _judge(self, experiment, compared, draft):
        tag, best = self.tag, self.tag.best
        # A stranger's deletion has to be better, like anything of theirs.
        own = draft.origin.get("Researcher") != "others"
        deletes = own and only_deletes(tag.source(experiment.commit), tag.source(best.commit))
        return verdict.judge(experiment, best, tag.experiments, self.greedy, best.commit == compared, deletes)

    def beats(self, experiment: Experiment, base: Experiment) -> bool:
        """Whether a finished candidate is worth carrying over, since its base is not the best any more."""
        if experiment.status == "crash":
            return False
        return experiment.status == "keep" or verdict.beats_base(experiment, base, self.tag.experiments, self.greedy)

    async def _make_comparable(self, slot):
        """Run the best again where nothing could be compared with it otherwise."""
        if not self.greedy and not verdict.noise(self.tag.experiments)[1]:
            why = "runs/ has lost the runs that tell how much one varies"
            if any(len(experiment.runs) > 1 for experiment in self.tag.experiments):
                why = "no two runs were at one speed of the machine, which would tell how much one varies"
            for _ in range(verdict.BASELINE_RUNS):
                await self._run_best_again(why, slot)
        if self.slow_pauses[slot] >= SLOW_PAUSES:
            await self._run_best_again("the machine stays slow", slot)

    async def _run_best_again(self, reason, slot) -> Result | None:
        """The result of one more run of the best commit, which counts from then on.

        None, and no run, where another slot has just run it, or found another best: there is something new to judge by.
        """
        asked = self.tag.best
        async with self.best_runs:
            best = self.tag.best
            if best is not asked:
                return None
            self.say(f"{reason}; running the best, {best.commit}, again", "yellow")
            result = await self._trial(best.commit, len(self.tag.results(best.commit)), best.description, slot)
            if result.outcome == "ok":
                self.tag.ran_again(best.commit, result)
                self.settled[result.device or ""] = result.matmul_flops
            return result

    # -- one trial, and whose fault its failure is

    async def _trial(self, commit, run, description, slot):
        """The result of the run of this number, which an earlier start may have left.

        Raises Pause where the machine, and not the candidate, is at fault. A trial that failed on a slow machine counts
        for nothing, and neither does one that others have disturbed: it is held again, after some tries in a row at
        another time.
        """
        for left in reversed(range(SLOW_TRIES)):
            result = self.tag.result(commit, run) or await self._hold(commit, run, description, slot)
            fault = self._slowness(commit, result) or self._disturbance(commit, run, result)
            if not fault:
                self.slow_pauses[slot] = 0
                return result
            # No wait has helped: the machine may never be quieter, or never have had the rate that it is given.
            if self.slow_pauses[slot] >= SLOW_PAUSES and (result.outcome == "ok" or not self.tag.experiments):
                return result
            if result.outcome == "ok" and not self.patient and not left:
                self.say(f"{fault}; no quiet moment was found, so this run counts all the same", "yellow")
                self.slow_pauses[slot] = SLOW_PAUSES
                return result
            # What is disturbed each time may bring it about by itself, as one that heats a GPU more than the best does.
            if result.outcome == "ok" and self.set_aside[commit, run] >= SLOW_TRIES * SLOW_PAUSES:
                self.say(f"{fault}, as in all of its trials before; so this one counts", "yellow")
                return result
            self.set_aside[commit, run] += 1
            ended = f" ({one_line(result.reason, 200)})" * (result.outcome != "ok")
            self.say(f"{fault}; run {run + 1} of {commit} does not count{ended}", "yellow")
            (self.tag.path(commit, run) / "result.json").unlink()
        self.slow_pauses[slot] += 1
        raise Pause(f"{fault}; end what else uses it{ended}")

    async def _hold(self, commit, run, description, slot):
        """Hold one trial and return its result. Raises Pause where the machine could not hold it."""
        tag, out, key = self.tag, self.tag.path(commit, run), (commit, run)
        tag.check_exam()
        result = await self._turn(Running(slot, commit, description, run, out), alone=self.faults[key] >= MOST_FAULTS)
        if result.outcome == "fault" and not slot.launcher:
            raise Trouble(f"the trial of {commit} could not be held: {result.reason}")
        if slot.launcher and self.sandbox and result.sandbox == "none":
            (out / "result.json").unlink()
            raise Pause(f"{result.host} has no sandbox; have {slot.launcher[0]} leave it out, or give --no-sandbox")
        # A launcher, and a baseline, do not kill a proctor by themselves; a candidate may have had its own killed.
        lost = result.outcome == "lost"
        if result.outcome in ("paused", "fault") or lost and (slot.launcher or not tag.experiments):
            if slot.launcher and not (out / "where").exists():
                raise Pause(result.reason)
            self.faults[key] += 1
            return await self._judge_fault(key, result, slot)
        self.faults[key] = 0
        if lost:  # whatever has ended the proctor, the night goes on
            return Result("crash", f"the trial broke off: {result.reason}")
        try:
            tag.result(commit, run)
        except Trouble:  # a file of the exam was replaced in mid-trial
            (out / "result.json").unlink()
            raise
        return result

    async def _turn(self, running: Running, alone: bool) -> Result:
        """Hold a trial beside those of the other slots; alone: once these have ended, and before others begin."""
        slot, request = running.slot, self._request(running.commit, running.run, running.slot)
        async with self.beginning:
            while alone and not slot.launcher and self.running:
                await asyncio.sleep(POLL)
            self.running[slot] = running
            if alone:
                return await self._held(request, slot)
        return await self._held(request, slot)

    async def _held(self, request, slot):
        try:
            return await launch.hold(request, slot)
        finally:
            self.running.pop(slot)

    def _request(self, commit, run, slot):
        tag = self.tag
        start = tag.settings["start"]
        return launch.Request(
            source=tag.repository.source(f"refs/autoresearch/{tag.name}/{commit}"),
            out=tag.path(commit, run),
            task=tag.task,
            seed=run % SEEDS,
            flops=tag.settings["flops"],
            # On another device than those that the best has run on, what is hopeless is not known.
            beat=None if slot.launcher or (commit, run) in self.closely else verdict.hopeless(tag.experiments),
            # To compile takes a GPU a minute. But what a candidate has compiled is a folder of code, in which it could
            # tell the next trial something: so it is the baseline's.
            warm=None if not tag.result(start, 0) or (commit, run) == (start, 0) else tag.path(start, 0),
            sandbox=self.sandbox,
        )

    async def _judge_fault(self, key, fault, slot):
        """The result of a trial that the machine did not let be held: a crash of its candidate, after some in a row.

        Raises Pause where it is too early to blame that: a run of the best has to go well first. What is in the book is
        never blamed, and neither is a baseline for a fault that has been named.
        """
        tag, times, commit = self.tag, self.faults[key], key[0]
        named, most = fault.outcome != "lost" or slot.launcher, MOST_LOST if slot.launcher else MOST_FAULTS
        reason = fault.reason if named else f"the trial of {commit} broke off: {fault.reason}"
        recorded = commit in {experiment.commit for experiment in tag.experiments}
        if times <= most or recorded or named and not tag.experiments:
            raise Pause(reason)
        if tag.experiments:
            asked = f"the trial of {commit} could not be held {times} times in a row ({fault.reason})"
            result = await self._run_best_again(asked, slot)
            if not result or result.outcome != "ok":
                raise Pause(reason)
        return Result("crash", f"the machine failed in its trials, {times} times in a row: {fault.reason}")

    def _usual_speed(self, commit, device):
        """Matrix-multiply rate, FLOP/s, that a device should reach in a trial of `commit`, by what it has reached.

        The fastest of the best's runs, for want of one of any experiment's, of the earlier runs of `commit`, or what
        was known of the machine when the tag was started; None for a device that nothing is known of.
        """
        runs = [run for e in self.tag.experiments for run in e.runs]
        best = self.tag.best.runs if self.tag.experiments else ()
        own = Experiment(commit, 0.0, 0.0, "", "")
        for result in self.tag.results(commit):
            own = own.after(result) if result.outcome == "ok" else own
        found = [[run.speed for run in known if run.device == device] for known in (best, runs, own.runs)]
        first = self.tag.result(self.tag.settings["start"], 0)
        if not first or (first.device or "") == device:
            found.append([self.tag.settings["flops"]])
        measured = [*filter(None, next(filter(any, found), []))]
        return min(max(measured), self.settled.get(device) or max(measured)) if measured else None

    def _slowness(self, commit, result):
        """How slow the machine was, in words, where that may be why a trial of `commit` failed; else None."""
        speed = result.matmul_flops
        if not speed or not (self._late(result) or result.outcome in ("timeout", "crash")):
            return None
        usual = self._usual_speed(commit, result.device or "")
        if same_speed(speed, usual) or speed > usual:
            return None
        return f"the machine multiplies matrices at {speed / 1e12:.3g} TFLOP/s, and had {usual / 1e12:.3g}"

    def _disturbance(self, commit, run, result):
        """What others did to a trial of `commit` that went well or lacked time, in words; else None."""
        late = result.outcome == "timeout" or self._late(result)
        if result.outcome != "ok" and not late:
            return None
        best, measured = self.tag.best, Experiment(commit, 0.0, 0.0, "", "").after(result).runs[0]
        if said := disturbed(measured, list(best.runs) if best else []):
            return f"{said} while {commit} trained"
        if self._late(result) and not best:
            return "the machine is too slow or too busy for the exam"
        runs = [*best.runs, measured] if best and commit == best.commit else [measured]
        # By its own word, and so only once: a kept train.py that has told too many would have each run of it repeated.
        if not self.set_aside[commit, run] and len(runs) - 1 in out_of_step(runs):
            most = max(each.steps or 0 for each in best.runs)
            return f"{commit} made {measured.steps:.0f} steps, and {most:.0f} before"
        return None

    def _late(self, result):
        """Whether an exam took so long that it was broken off."""
        return result.outcome == "invalid" and result.eval_seconds >= self.tag.task.exam_limit


def _finished(experiment, ruling):
    """(experiment, why) of one whose ruling is the last."""
    val_bpb, count = statistics.fmean(ruling.scores), len(ruling.scores)
    experiment = dataclasses.replace(experiment, val_bpb=val_bpb, status=ruling.decision)
    return experiment, f"{ruling.reason}, {count} run{'s' * (count > 1)}"


async def _side_by_side(coroutines):
    """What coroutines return, in their order; where one raises, once all have ended."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks)
    finally:
        await end_all(tasks)
    return [task.result() for task in tasks]
