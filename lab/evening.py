"""Who researches tonight, and what an owner still has to do before a night can begin."""

import re

import prepare
from lab.api import Api
from lab.command import Command
from lab.demo import Recorded
from lab.elsewhere import Replay
from lab.model import Model
from lab.repository import Repository
from lab.researcher import Researcher, Search
from lab.tag import Tag
from lab.transfer import kept_changes, replayed
from prepare import Task, Trouble


def sound_tag(tag: str) -> str:
    """A tag, whose name can be that of a branch and a folder. Raises Trouble for another one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag) or ".." in tag or tag.endswith((".", ".lock")):
        raise Trouble(f"{tag!r} cannot be a tag; use letters, digits, dots, dashes")
    return tag


def choose_researcher(tag: Tag, arguments) -> Researcher:
    """The one asked for; after a replay only one that was named."""
    default = "demo" if arguments.demo else None if arguments.replay else "llm"
    named = default if arguments.researcher is None else arguments.researcher
    researcher = {"search": Search, "demo": Recorded}.get(named, lambda: None)()
    if named == "llm":
        researcher = Model(Api(arguments, tag.folder / "cost.jsonl", tag.say), tag.say)
    elif named is not None and not researcher:
        researcher = Model(Command(named, tag.folder / "command.log", tag.say), tag.say)
    if not arguments.replay:
        return researcher
    if (name := sound_tag(arguments.replay)) == tag.name:
        raise Trouble(f"tag {name} cannot replay itself; give the new run another --tag")
    changes, done = kept_changes(Tag(tag.repository, name, tag.say)), replayed(tag)
    if not tag.settings and tag.repository.source("HEAD") == changes[-1].source.encode():
        raise Trouble(f"this train.py has what {name} has kept; start from another: git switch main, as a rule")
    return Replay([change for change in changes if change.origin["From"] not in done], researcher)


MODELS = """export ANTHROPIC_API_KEY=...                      for Claude
   or export ANTHROPIC_BASE_URL=...                     for a local --model
   or python agent_loop.py --researcher 'claude -p'     any command that answers
   or python agent_loop.py --researcher search          which asks nobody"""


def first_steps(task: Task, researcher: Researcher, repository: Repository):
    """Raise Trouble where a run still needs something from its owner, once it has told them what, and the commands."""
    steps = []
    if task.dataset != "pycode" and not prepared(task):
        steps.append((f"the text of {task.name}", f"python prepare.py --task {task.name}"))
    if not researcher.has_key:
        steps.append(("a model to ask", MODELS))
    if not steps:
        return
    missing = " and ".join(what for what, _ in steps)
    if not repository.has_identity:
        steps.append(("your name on the commits, if you like", "git config user.name ...; git config user.email ..."))
    print("What this still needs:\n")
    for number, (what, command) in enumerate(steps, 1):
        print(f"{number}. {what}\n      {command}\n")
    print("To see it all work in five minutes, without any of that:\n      python agent_loop.py --demo\n")
    raise Trouble(f"not started, for lack of {missing}; the commands are above")


def prepared(task: Task) -> bool:
    """Whether the text of a task is there as rows."""
    return (prepare.cache_root() / task.dataset / "meta.json").exists()
