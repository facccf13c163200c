"""The demo: a train.py made worse on purpose, and five recorded ideas, as a model would have them. All else is real.

Three of the ideas mend what is worse and two do harm. The loop is not told which: they are commits, trials, verdicts
and rows like any others.
"""

from lab.elsewhere import Beside
from lab.researcher import Search, constants_draft, find_constants, set_constants

WORSE = {"BATCH_TOKENS": "12000", "HEAD_LR": "0.0003", "MATRIX_LR": "0.001"}
IDEAS = (
    (
        "the output layer learns 27 times faster",
        "Its rate is so low that the model can hardly say what it knows: the loss still falls when the time is over.",
        {"HEAD_LR": "0.008"},
    ),
    (
        "no logit above 3 instead of 15",
        "A model that cannot be too sure of itself should lose less on text that it has never seen.",
        {"SOFT_CAP": "3.0"},
    ),
    (
        "16 rows of text for each step instead of one",
        "One row is mostly chance, so the steps point anywhere. Fewer steps in a better direction should lead further.",
        {"BATCH_TOKENS": "200000"},
    ),
    (
        "a model three times as large",
        "A larger model learns more from each token, even though it will see fewer of them in the same time.",
        {"TOKENS_PER_PARAM": "1"},
    ),
    (
        "the matrices learn 40 times faster",
        "Muon's steps have a size of their own, whatever the gradient, and this one would take hours to get anywhere.",
        {"MATRIX_LR": "0.04"},
    ),
)

FIRST = (
    "this demo starts from a train.py that was made worse on purpose: it learns from one row of text at a time, and",
    "two of its rates are far too low. Five recorded ideas follow, as a model would have them: some help, some harm",
    "the score is val_bpb: how many bits the model needs for a byte of text that it has never seen; lower is better",
)
NEXT = """
To look at it: python agent_loop.py report --html, and open report.html.
What next:
  1. A night with a model: export ANTHROPIC_API_KEY=... and python agent_loop.py --hours 8 --max-cost 15
     or any command that answers: python agent_loop.py --researcher 'claude -p'
  2. On a GPU: python prepare.py --check says whether all is well, python prepare.py --task climbmix gets the text
  3. Your own text, train.py, and plain words in program.md: README.md says how"""


def worse(source: bytes) -> str | None:
    """The train.py that the demo starts from; None where `source` is not the one that it was made for."""
    text = source.decode(errors="replace")
    return set_constants(text, WORSE) if known(text) else None


def known(source: str) -> bool:
    """Whether a train.py has all the constants that the demo changes."""
    return {*WORSE, *(name for _, _, new in IDEAS for name in new)} <= find_constants(source).keys()


class Recorded(Beside):
    """Proposes the recorded ideas in their order, then what the built-in search does."""

    def __init__(self):
        super().__init__(Search())
        self.given = set()  # descriptions: the loop may not have been able to commit one yet

    async def draft(self, brief):
        done = self.given | {experiment.description for experiment in brief.experiments}
        for description, why, new in IDEAS:
            if description not in done and known(brief.source):
                self.given.add(description)
                return constants_draft("demo", brief.source, new, description, why)
        return await self.own.draft(brief)
