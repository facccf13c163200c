"""What this machine shares: the rows of a tag as ideas for others, and what others have made of them."""

import contextlib
import dataclasses
import importlib.metadata
import statistics

from lab.book import Experiment
from lab.elsewhere import standing_of, trials_of
from lab.exchange import Exchange, arrived
from lab.peers import FULL_NAME, Idea, edit_key
from lab.researcher import Draft
from lab.runs import comparable
from lab.tag import Tag
from lab.verdict import noise
from prepare import Pause, Trouble, one_line

CLOSING = 10.0  # seconds that the pushes of a night's last rows get


def idea_of(tag: Tag, experiment: Experiment, drafts: dict[str, Draft]) -> Idea | None:
    """A row of a tag as others get it; None for one that changes no train.py of this tag's, like the baseline.

    drafts: tag.drafts(). Raises Trouble for a train.py that is no text.
    """
    base, result, draft = tag.base(experiment.commit), tag.result(experiment.commit, 0), drafts.get(experiment.commit)
    if not base or not draft:
        return None
    crashed, sigma = experiment.status == "crash", noise(tag.experiments)[0]
    scores, rivals = comparable(experiment, base)
    return Idea(
        who="",
        tag=tag.name,
        commit=experiment.commit,
        source=tag.text(experiment.commit),
        base=tag.text(base.commit),
        description=experiment.description,
        hypothesis=draft.hypothesis,
        status=experiment.status,
        val_bpb=None if crashed else statistics.fmean(scores),
        base_bpb=statistics.fmean(rivals) if rivals else None,
        sigma=sigma if sigma > 0 else None,
        runs=0 if crashed else len(scores),
        base_runs=len(rivals),
        task=tag.settings["task"],
        budget=tag.settings["budget"],
        device=(result and result.device) or "",
        rate=result and result.matmul_flops,
        steps=result and result.steps,
        tokens=result and result.tokens,
        versions={"python": result.python if result else "", "torch": importlib.metadata.version("torch")},
        sha256=tag.settings["sha256"],
        model=draft.origin.get("Model") or draft.origin.get("Researcher") or "by hand",
        of=found_by(experiment.commit, drafts),
    )


def found_by(commit: str, drafts: dict[str, Draft]) -> str:
    """Which shared idea a candidate tries again, by itself or carried over; "" for one of this machine's own."""
    while commit in drafts:
        origin = drafts[commit].origin
        if origin.get("Researcher") == "others":
            return origin["From"]
        commit = origin.get("From", "") if origin.get("Researcher") == "carried over" else ""
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# What has become of it


@dataclasses.dataclass(frozen=True)
class Peer:
    """How the ideas of one machine have fared here."""

    who: str
    tried: int
    held: int


def peers(tag: Tag) -> list[Peer]:
    """The machines whose ideas were tried here, in the order of the first trials."""
    origins = {commit: draft.origin for commit, draft in tag.drafts().items()}
    trials = [*filter(None, trials_of(tag.experiments, origins))]
    held = {who: [trial.held for trial in trials if trial.who == who] for who in dict.fromkeys(t.who for t in trials)}
    return [Peer(who, len(each), sum(each)) for who, each in held.items()]


@dataclasses.dataclass(frozen=True)
class Heard:
    """What other machines say of a change that was kept here."""

    commit: str
    description: str
    kept: int  # machines
    tried: int


def heard(tag: Tag) -> list[Heard]:
    """Of the kept changes of a tag, those that other machines say they have tried."""
    found = []
    with contextlib.suppress(Trouble, OSError):  # what cannot be read is not known
        standing = standing_of(arrived(tag.repository)) if tag.settings else {}
        drafts = tag.drafts() if standing else {}
        for e in tag.experiments:
            if e.status == "keep" and e.commit in drafts and (base := tag.base(e.commit)):
                key = drafts[e.commit].origin.get("Edit") or edit_key(tag.text(base.commit), tag.text(e.commit))
                if key in standing:
                    found.append(Heard(e.commit, e.description, len(standing[key].kept), len(standing[key].tried)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# During a night


class Sharing:
    """Hands the rows of a tag to an exchange, which pushes them in the background; no fault ends the night."""

    def __init__(self, tag: Tag, exchange: Exchange):
        self.tag, self.exchange = tag, exchange
        self.unfit: set[str] = set()  # commits of which no idea can be made
        self.left = 0  # pushes that have to wait for another start, once it has ended

    def rows(self):
        """Share the rows of the tag that were not shared yet."""
        if not self.exchange.outboxes:
            return
        try:
            done, drafts = self.exchange.shared(self.tag.name) | self.unfit, self.tag.drafts()
            for experiment in self.tag.experiments:
                if experiment.commit not in done:
                    self.row(experiment, drafts)
        except (Trouble, OSError) as fault:  # the next row tries again
            self.tag.say(f"what is new is not shared yet: {one_line(fault, 200)}", "yellow")

    def row(self, experiment: Experiment, drafts: dict[str, Draft]):
        """Share one row, if it is one that others can use."""
        try:
            idea = idea_of(self.tag, experiment, drafts)
        except Pause:
            raise
        except Trouble as trouble:  # its train.py is no text, or its commit is gone
            idea = None
            self.tag.say(f"{experiment.commit} is not shared: {one_line(trouble, 200)}", "yellow")
        if idea:
            self.exchange.share(idea)
        else:
            self.unfit.add(experiment.commit)


@contextlib.contextmanager
def sharing(tag: Tag, shares_to: list[str], takes_from: list[str], seconds=CLOSING):
    """The Sharing of a tag for the duration of a night, with git remotes by name, path or URL; None without any.

    seconds: that the last pushes get. Raises Trouble for what cannot be a remote.
    """
    if not shares_to and not takes_from:
        yield None
        return
    if shares_to and not FULL_NAME.fullmatch(f"who/{tag.name}/0000000"):
        raise Trouble(f"a tag named {tag.name[:80]} cannot be shared; give one of at most 64 letters")
    exchange = Exchange(tag.repository, tuple(takes_from), tuple(shares_to), tag.say)
    given = Sharing(tag, exchange)
    try:
        yield given
    finally:
        if left := exchange.close(seconds):
            given.left = left
            tag.say(f"{left} shared experiments could not be pushed yet; the next start with --share does it", "yellow")


def share(tag: Tag, remotes: list[str]):
    """Push what a tag has found, and was not pushed yet, to git remotes. Raises Trouble where one does not take it."""
    tag.look()
    if not tag.settings or not tag.experiments:
        raise Trouble(f"there are no results of a tag {tag.name} here to share; report --tag T shows what there is")
    with sharing(tag, remotes, [], seconds=300.0) as given:
        given.rows()
        count = len(given.exchange.shared(tag.name))
    if given.left:
        raise Trouble("not everything is shared; nothing is lost, and the same command tries again")
    of = len(tag.experiments) - 1  # the baseline changes nothing
    tag.say(f"{count} of {of} experiments of tag {tag.name} are shared, under the name {given.exchange.who}")
