"""Ideas through real git remotes: what goes out, what comes in, what a dead remote and a hostile peer can do."""

import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_peers import BASE, IDEA, SOURCE

from lab import exchange, plumbing, store
from lab.exchange import Exchange, Link
from lab.plumbing import Fault
from lab.repository import Repository
from prepare import Trouble

# ---------------------------------------------------------------------------------------------------------------------
# Machines and remotes


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Nothing waits for minutes."""
    monkeypatch.setattr(Link, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(Link, "PAUSES", (0.1, 0.2))


def git(folder, *arguments, stdin=None, **options):
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(["git", "-C", folder, *arguments], input=stdin, capture_output=True, timeout=60, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(errors="replace").strip()


@pytest.fixture
def remote(tmp_path):
    """An empty bare repository."""
    folder = tmp_path / "remote.git"
    git(tmp_path, "init", "-q", "--bare", folder)
    return folder


def make_home(folder):
    """A repository with an owner who has something to hide."""
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "Olivia Owner")
    git(folder, "config", "user.email", "olivia@example.org")
    (folder / "train.py").write_text(BASE)
    (folder / "secret.txt").write_text("the password of Olivia\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "Olivia's first")
    return folder


@pytest.fixture
def machine(tmp_path):
    """machine(name, remotes, shares_to): an Exchange of a repository `name`, with what it `said` and its `home`."""
    opened = []

    def machine(name, remotes=(), shares_to=()):
        home = tmp_path / name
        if not home.exists():
            make_home(home)
        said = []
        made = Exchange(
            Repository(home),
            tuple(map(str, remotes)),
            tuple(map(str, shares_to)),
            lambda text, style="": said.append(text),
        )
        made.said, made.home = said, home
        opened.append(made)
        return made

    yield machine
    for each in opened:
        each.close(0.5)


def until(condition, seconds=30):
    """Wait until condition() holds, and return what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
    return found


def look(peer):
    """Have a look, wait for its end, and return {commit of its ref: idea}."""
    before = [link.next_look for link in peer.links]
    peer.look()
    until(lambda: all(link.next_look > then for link, then in zip(peer.links, before)))
    return {idea.commit: idea for idea in peer.ideas()}


def refs(folder, prefix="refs/"):
    lines = git(folder, "for-each-ref", "--format=%(refname) %(objectname)", prefix).splitlines()
    return dict(line.split() for line in lines)


def idea(commit, **changes):
    return dataclasses.replace(IDEA, commit=commit, **changes)


def plant(folder, name, files=None, entries=(), parent=None, move=()):
    """Put a commit under refs/autoresearch/<name>, its tree of sound files but for `files` and `entries`; its hash."""
    content = IDEA.files() | (files or {})
    blobs = {
        file: git(folder, "hash-object", "-w", "--stdin", stdin=text)
        for file, text in content.items()
        if text is not None
    }
    lines = [f"100644 blob {blob}\t{file}" for file, blob in blobs.items() if file not in dict(move)]
    lines += [f"{mode} {blobs[file]}\t{file}" for file, mode in move] + list(entries)
    tree = git(folder, "mktree", "--missing", stdin="".join(f"{line}\n" for line in lines))
    return point(folder, name, commit_of(folder, tree, parent))


WHOEVER = {f"GIT_{who}_{what}": "x@x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def commit_of(folder, tree, parent=None):
    parents = ("-p", parent) if parent else ()
    return git(folder, "commit-tree", tree, *parents, "-m", "x", env={**os.environ, **WHOEVER})


def point(folder, name, commit):
    git(folder, "update-ref", f"refs/autoresearch/{name}", commit)
    return commit


# ---------------------------------------------------------------------------------------------------------------------
# What goes out


def test_what_one_machine_shares_the_others_get(machine, remote):
    a, b, c = machine("a", (), [remote]), machine("b", [remote], []), machine("c", (), [remote])
    a.share(idea("1111111"))
    c.share(idea("2222222", status="crash", val_bpb=None))
    assert a.close() == c.close() == 0
    found = look(b)
    assert found == {
        "1111111": idea("1111111", who=a.who),
        "2222222": idea("2222222", who=c.who, status="crash", val_bpb=None),
    }
    again = machine("a", [remote])
    assert look(again).keys() == {"2222222"}, "its own are no news"
    assert again.who == a.who != c.who and not b.said and not a.said
    assert machine("a", [remote]).ideas() == again.ideas(), "and they are there at the next start"


def test_a_stranger_can_read_three_files_a_day_and_no_name(machine, remote):
    a = machine("a", (), [remote])
    a.share(idea("1111111"))
    assert a.close() == 0
    ((ref, commit),) = refs(remote).items()
    assert ref == f"refs/autoresearch/{a.who}/nov23/1111111"
    listed = git(remote, "cat-file", "--batch-all-objects", "--batch-check=%(objectname) %(objecttype)").split("\n")
    objects = dict(line.split() for line in listed)
    blobs = {git(remote, "rev-parse", f"{commit}:{file}") for file in ("train.py", "base.py", "result.json")}
    assert objects == {
        commit: "commit",
        git(remote, "rev-parse", f"{commit}^{{tree}}"): "tree",
        **dict.fromkeys(blobs, "blob"),
    }
    lines = git(remote, "cat-file", "commit", commit).split("\n")
    day = int(time.time()) // 86400 * 86400
    stamps = [f"{kind} autoresearch <autoresearch@localhost> {day} +0000" for kind in ("author", "committer")]
    assert lines[1:] == [*stamps, "", IDEA.description]
    for each in objects:
        text = git(remote, "cat-file", "-p", each)
        assert not any(word in text for word in ("Olivia", "olivia", "secret", str(a.home), os.uname().nodename + "\n"))
    assert git(a.home, "for-each-ref", "refs/autoresearch") == "", "nor does the owner's repository know of it"


def test_a_name_of_the_owners_choice_takes_the_place_of_the_random_one(machine, remote):
    a = machine("a")
    assert len(a.who) == 8 and int(a.who, 16) >= 0
    git(a.home, "config", "autoresearch.name", "lab-7")
    assert machine("a").who == "lab-7"
    for bad in ("Lab 7", "-x", "a/b", "x" * 33):
        git(a.home, "config", "autoresearch.name", bad)
        with pytest.raises(Trouble, match="autoresearch.name"):
            machine("a")


def test_what_was_shared_is_never_changed(machine, remote):
    a = machine("a", (), [remote])
    a.share(idea("1111111"))
    a.share(idea("1111111", description="another one"))
    assert a.close() == 0
    before = refs(remote)
    again = machine("a", (), [remote])
    again.share(idea("1111111", description="a third one"))
    assert again.close() == 0 and refs(remote) == before and not a.said + again.said


def test_a_ref_that_is_there_is_not_moved_and_said_once(machine, remote):
    a = machine("a", (), [remote])
    squatter = plant(remote, f"{a.who}/nov23/1111111", {"base.py": b"x = 1\n"})
    a.share(idea("1111111"))
    a.share(idea("2222222"))
    assert a.close() == 0, "it is given up"
    assert refs(remote)[f"refs/autoresearch/{a.who}/nov23/1111111"] == squatter
    assert len(refs(remote)) == 2 and len(a.said) == 1 and "is there already" in a.said[0]


def test_two_loops_that_push_the_same_names_at_once_move_nothing(machine, remote):
    for name in ("a", "b"):
        make_home(remote.parent / name)
        git(remote.parent / name, "config", "autoresearch.name", "both")
    a, b = machine("a", (), [remote]), machine("b", (), [remote])
    names = [f"{number:07}" for number in range(6)]
    for name in names:
        for each in (a, b):
            each.share(idea(name, description=f"of {each.home.name}"))
    seen = {}

    def settled():
        for ref, commit in refs(remote).items():
            assert seen.setdefault(ref, commit) == commit
        return not any(each.store.names(f"outbox/{each.outboxes[0]}") for each in (a, b))

    until(settled)
    assert len(seen) == len(names)
    found = look(machine("c", [remote])).values()
    assert {each.description for each in found} <= {"of a", "of b"} and len(found) == len(names)


def test_two_loops_of_one_repository_share_at_once(machine, remote):
    a, b = machine("a", (), [remote]), machine("a", (), [remote])
    for number in range(4):
        a.share(idea(f"a{number}"))
        b.share(idea(f"b{number}"))
        b.share(idea(f"a{number}"))
    until(lambda: len(refs(remote)) == 8)
    a.close()  # what waits may be the other's, which is just about to note that it was pushed
    assert b.close() == 0 and not a.said + b.said


def test_two_loops_of_one_repository_know_what_either_has_fetched(machine, remote):
    plant(remote, "honest/t/1111111")
    a, b = machine("a", [remote]), machine("a", [remote])
    assert look(a).keys() == look(b).keys() == {"1111111"}


def test_what_was_meant_for_one_remote_goes_to_no_other(machine, remote, tmp_path):
    other = tmp_path / "other.git"
    git(tmp_path, "init", "-q", "--bare", other)
    a = machine("a", (), [remote])
    a.share(idea("1111111"))
    a.close()
    b = machine("a", (), [other])
    b.share(idea("2222222"))
    b.close()
    assert [ref[-7:] for ref in refs(other)] == ["2222222"]
    b = machine("a", (), [other])
    b.share(idea("1111111"))
    b.close()
    assert len(refs(other)) == 2, "to share it again is to mean it"


def test_a_remote_may_be_a_name_with_an_address_to_push_to(machine, remote, tmp_path):
    home = make_home(tmp_path / "a")
    git(home, "remote", "add", "lab", "../nothing.git")
    git(home, "config", "remote.lab.pushurl", "../remote.git")
    a = machine("a", (), ["lab"])
    a.share(idea("1111111"))
    assert a.close() == 0 and len(refs(remote)) == 1


def test_a_shared_experiment_is_signed_where_the_owners_commits_are(machine, remote, tmp_path):
    home, key = make_home(tmp_path / "a"), tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    for name, value in {"commit.gpgSign": "yes", "gpg.format": "ssh", "user.signingKey": str(key)}.items():
        git(home, "config", name, value)
    a = machine("a", (), [remote])
    a.share(idea("1111111"))
    assert a.close() == 0
    assert "SSH SIGNATURE" in git(remote, "cat-file", "commit", *refs(remote).values())
    assert "signed" in a.said[0] and len(a.said) == 1
    assert look(machine("b", [remote])).keys() == {"1111111"}


def test_what_cannot_be_signed_is_not_shared_and_said_once(machine, remote, tmp_path):
    home = make_home(tmp_path / "a")
    git(home, "config", "commit.gpgSign", "true")
    git(home, "config", "gpg.program", "false")
    a = machine("a", (), [remote])
    a.share(idea("1111111"))
    a.share(idea("2222222"))
    assert a.close() == 0 and not refs(remote)
    assert len(a.said) == 2 and "is not shared" in a.said[1]


def test_an_idea_that_nobody_would_read_is_not_shared(machine, remote):
    a = machine("a", (), [remote])
    a.share(idea("1111111", source="#" * 300_000))
    assert a.close() == 0 and not refs(remote) and "too large" in a.said[0]


# ---------------------------------------------------------------------------------------------------------------------
# Dead remotes, dead loops


def test_a_remote_that_is_not_there_is_said_once_and_used_when_it_comes(machine, tmp_path):
    later, away = tmp_path / "later.git", tmp_path / "away.git"
    a = machine("a", (), [later])
    a.share(idea("1111111"))
    until(lambda: max(a.links[0].faults.values()) > 2)
    assert len(a.said) == 1 and "does not work" in a.said[0]
    git(tmp_path, "init", "-q", "--bare", later)
    until(lambda: refs(later) and not any(a.links[0].faults.values()))
    later.rename(away)
    a.share(idea("2222222"))
    until(lambda: max(a.links[0].faults.values()) > 1)
    away.rename(later)
    until(lambda: len(refs(later)) == 2 and not any(a.links[0].faults.values()))
    assert ["can be reached again" in said for said in a.said] == [False, True, False, True]


PLAYED_SSH = """\
#!/bin/sh
# ssh, for a host whose network is down as long as there is a file `down`
if [ -e {folder}/down ]; then echo $$ >> {folder}/hung; sleep 300; fi
shift
exec sh -c "$1"
"""


@pytest.fixture
def far(tmp_path, remote, monkeypatch):
    """The URL of `remote` by way of an ssh of which it depends on a file `down` in tmp_path whether it hangs."""
    (tmp_path / "ssh").write_text(PLAYED_SSH.format(folder=tmp_path))
    (tmp_path / "ssh").chmod(0o700)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(tmp_path / "ssh"))
    monkeypatch.setenv("GIT_SSH_VARIANT", "simple")
    return f"ssh://far{remote}"


def hung(tmp_path):
    """Processes of the played ssh that hang."""
    path = tmp_path / "hung"
    pids = [int(line) for line in path.read_text().split()] if path.exists() else []
    return [
        pid for pid in pids if os.path.exists(f"/proc/{pid}/stat") and " Z " not in open(f"/proc/{pid}/stat").read()
    ]


def test_a_remote_that_hangs_holds_up_nothing_and_leaves_no_process(machine, remote, far, tmp_path):
    (tmp_path / "down").touch()
    a = machine("a", [remote], [far])
    a.share(idea("1111111"))
    until(lambda: hung(tmp_path))
    plant(remote, "peer/t/1111111")
    a.look()
    until(lambda: a.ideas()), "the other remote is looked at"
    assert a.close(0.2) == 1 and not hung(tmp_path) and not refs(remote, f"refs/autoresearch/{a.who}")
    (tmp_path / "down").unlink()
    assert machine("a", (), [far]).close() == 0, "it goes out at the next start, without being shared again"
    assert refs(remote, f"refs/autoresearch/{a.who}")


def test_a_remote_that_takes_too_long_is_given_up(machine, far, tmp_path, monkeypatch):
    monkeypatch.setattr(plumbing, "SECONDS", 0.5)
    (tmp_path / "down").touch()
    a = machine("a", (), [far])
    a.share(idea("1111111"))
    until(lambda: any(a.links[0].faults.values()))
    assert "no end within" in a.said[0]
    (tmp_path / "down").unlink()
    monkeypatch.setattr(plumbing, "SECONDS", 60.0)
    assert a.close() == 0


SHARING = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from test_peers import IDEA
from lab.exchange import Exchange
from lab.repository import Repository
exchange = Exchange(Repository(Path({home!r})), (), ({remote!r},), print)
for number in range(1000):
    exchange.share(dataclasses.replace(IDEA, commit=str(number)))
    print(number, flush=True)
"""


def test_what_was_shared_before_a_kill_goes_out_at_the_next_start(machine, remote, far, tmp_path):
    home, chance = make_home(tmp_path / "a"), random.Random(1)
    (tmp_path / "down").touch()
    last = -1
    for _ in range(3):
        code = SHARING.format(root=str(ROOT), home=str(home), remote=far)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(last + 3):
            last = max(last, int(process.stdout.readline()))
        time.sleep(chance.random() / 10)
        process.kill()
        process.wait()
        process.stdout.close()
    for pid in hung(tmp_path):
        os.kill(pid, signal.SIGKILL)
    (tmp_path / "down").unlink()
    a = machine("a", (), [far])
    assert a.close(30) == 0 and not a.said
    assert {str(number) for number in range(last + 1)} <= {ref.split("/")[-1] for ref in refs(remote)}


def test_locks_and_halves_of_killed_commands_are_cleared_away_at_the_start(machine, remote):
    a = machine("a", (), [remote])
    a.share(idea("1111111"))
    a.close()
    a.store.use.close()
    path = a.store.path
    left = [
        path / "packed-refs.lock",
        path / f"refs/outbox/{a.outboxes[0]}/{a.who}/t/2222222.lock",
        path / "config.lock",
    ]
    left += [
        path / "incoming/half/pack/tmp_pack_1",
        path / "objects/pack/tmp_pack_1",
        path / f"refs/sent/x/{a.who}.lock",
    ]
    for each in left:
        each.parent.mkdir(parents=True, exist_ok=True)
        each.touch()
    b = machine("a", (), [remote])
    b.share(idea("2222222", tag="t"))
    assert b.close() == 0 and len(refs(remote)) == 2
    assert not any(each.exists() for each in left)


# ---------------------------------------------------------------------------------------------------------------------
# What is no remote

NO_REMOTES = ["", "-x", "--upload-pack=touch {mark}", "ext::sh -c 'touch {mark}'", "fd::3", "ftp://x/y", "rsync://x/y"]
NO_REMOTES += ["nosuch", "/a\nb", "EXT::x"]


@pytest.mark.parametrize("text", NO_REMOTES)
def test_what_cannot_be_a_remote_is_refused_in_one_sentence(machine, remote, tmp_path, text):
    mark = tmp_path / "mark"
    text = text.format(mark=mark)
    for remotes, shares_to in (([text], ()), ((), [remote, text])):
        with pytest.raises(Trouble) as trouble:
            machine("a", remotes, shares_to)
        assert "\n" not in str(trouble.value) and "remote" in str(trouble.value) and not mark.exists()


def test_a_named_remote_with_such_an_address_is_refused_too(machine, remote, tmp_path):
    home = make_home(tmp_path / "a")
    for address in (f"ext::touch {tmp_path}/mark", f"--upload-pack=touch {tmp_path}/mark"):
        git(home, "config", "remote.lab.url", address)
        with pytest.raises(Trouble, match="cannot be a remote"):
            machine("a", ["lab"])


def test_git_itself_is_told_to_take_no_such_address(machine, remote, tmp_path):
    """The owner's url.*.insteadOf may lead anywhere, and so may a redirect."""
    a = machine("a", [remote])
    code = f"ext::sh -c touch% {tmp_path}/mark"
    for address in (code, f"ssh://-oProxyCommand=touch {tmp_path}/mark/x", f"--upload-pack=touch {tmp_path}/mark"):
        for command in ("ls-remote", "fetch", "push"):
            with pytest.raises(Fault):
                a.store.git.run(command, "--end-of-options", address, "refs/x/y:refs/x/y")
    assert not (tmp_path / "mark").exists()
    subprocess.run(["git", "ls-remote", code], env=os.environ | {"GIT_ALLOW_PROTOCOL": "ext"}, capture_output=True)
    assert (tmp_path / "mark").exists(), "which it would do otherwise"


def test_a_password_in_an_address_is_not_told(machine, tmp_path):
    a = machine("a", (), ["http://me:hush@127.0.0.1:9/x.git"])
    a.share(idea("1111111"))
    until(lambda: a.said)
    assert "127.0.0.1" in a.said[0] and "hush" not in a.said[0]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile peers: what is no idea


def large(size):
    return random.Random(0).randbytes(size // 2).hex().encode()


EMPTY = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
BAD = {
    "a symlink": {"move": [("train.py", "120000 blob")]},
    "an executable": {"move": [("base.py", "100755 blob")]},
    "a submodule": {"files": {"base.py": None}, "entries": [f"160000 commit {'1' * 40}\tbase.py"]},
    "a submodule more": {"entries": [f"160000 commit {'1' * 40}\tmore"]},
    "a folder": {"files": {"train.py": None}, "entries": [f"040000 tree {EMPTY}\ttrain.py"]},
    "a file more": {"files": {"more.py": b""}},
    ".gitmodules": {"files": {".gitmodules": b'[submodule "x"]\npath = x\nurl = ../x\n'}},
    "a file less": {"files": {"base.py": None}},
    "another name": {"files": {"base.py": None, "Base.py": b"x"}},
    "a large source": {"files": {"train.py": large(2**18 + 2)}},
    "a larger one": {"files": {"base.py": large(2**22)}},
    "zeros without end": {"files": {"train.py": b"\0" * 2**26}},
    "a large result": {"files": {"result.json": b" " * 2**15 + IDEA.files()["result.json"]}},
    "no result": {"files": {"result.json": b"[]"}},
    "no text": {"files": {"train.py": b"\xff"}},
}


def check_that_only_the_sound_one_arrives(b, remote, bad):
    """Two looks at a remote with a sound idea and `bad` commits; the second has nothing to fetch."""
    plant(remote, "honest/t/1111111")
    for _ in range(store.FAILURES):
        assert look(b).keys() == {"1111111"}
    assert b.links[0].offers() == {} and not b.said
    kept = git(b.store.path, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)").split()
    assert len(kept) == 5 and not bad & set(kept)
    assert not list((b.store.path / "incoming").iterdir())


@pytest.mark.parametrize("name", BAD)
def test_a_commit_that_holds_anything_else_is_left_out_and_hides_nobody(machine, remote, monkeypatch, name):
    monkeypatch.setattr(plumbing, "FILE_BYTES", 2**21)
    git(remote, "hash-object", "-w", "-t", "tree", "--stdin", stdin=b"")
    bad = plant(remote, "bad/t/2222222", **BAD[name])
    check_that_only_the_sound_one_arrives(machine("b", [remote]), remote, {bad})


def test_a_large_file_would_arrive_without_its_bound(machine, remote, monkeypatch):
    plant(remote, "bad/t/2222222", **BAD["a large source"])
    monkeypatch.setattr(store, "SOURCE_BYTES", 2**20)
    monkeypatch.setattr("lab.peers.SOURCE_BYTES", 2**20)
    assert look(machine("b", [remote])).keys() == {"2222222"}


@pytest.mark.parametrize("name", ["a symlink", "an executable"])
def test_another_kind_of_file_would_arrive_without_its_check(machine, remote, monkeypatch, name):
    plant(remote, "bad/t/2222222", **BAD[name])
    monkeypatch.setattr(store, "TREE", re.compile(store.TREE.pattern.replace(b"100644", rb"\d+"), re.DOTALL))
    assert look(machine("b", [remote])).keys() == {"2222222"}


def test_a_history_would_arrive_without_its_check(machine, remote, monkeypatch):
    plant(remote, "bad/t/2222222", parent=plant(remote, "honest/t/1111111"))
    monkeypatch.setattr(store, "COMMIT", re.compile(rb"tree ([0-9a-f]{40})\n"))
    assert look(machine("b", [remote])).keys() == {"1111111", "2222222"}


def test_a_history_a_tag_a_bare_blob_and_a_broken_tree_are_left_out(machine, remote):
    old = plant(remote, "bad/t/0")
    git(remote, "update-ref", "-d", "refs/autoresearch/bad/t/0")
    bad = {plant(remote, "bad/t/1", parent=old)}
    tag = f"object {old}\ntype commit\ntag x\ntagger x <x> 0 +0000\n\nx\n"
    bad.add(point(remote, "bad/t/2", git(remote, "hash-object", "-w", "-t", "tag", "--stdin", stdin=tag)))
    bad.add(point(remote, "bad/t/3", git(remote, "hash-object", "-w", "--stdin", stdin="x")))
    tree = b"0100644 train.py\0" + bytes.fromhex(git(remote, "rev-parse", f"{old}:train.py"))
    tree = git(remote, "hash-object", "-w", "--literally", "-t", "tree", "--stdin", stdin=tree)
    bad.add(point(remote, "bad/t/4", commit_of(remote, tree)))
    check_that_only_the_sound_one_arrives(machine("b", [remote]), remote, bad)


def test_a_remote_that_has_not_got_what_it_offers_hides_nobody(machine, remote):
    bad = plant(remote, "bad/t/2222222", {"train.py": b"gone = 1\n"})
    blob = git(remote, "rev-parse", f"{bad}:train.py")
    (remote / "objects" / blob[:2] / blob[2:]).unlink()
    check_that_only_the_sound_one_arrives(machine("b", [remote]), remote, {bad})


def test_nothing_of_a_stranger_reaches_the_owners_repository(machine, remote):
    b = machine("b", [remote])
    before = git(b.home, "count-objects", "-v"), refs(b.home), sorted(path.name for path in (b.home / ".git").iterdir())
    commit = plant(remote, "honest/t/1111111")
    assert look(b)
    assert before[:2] == (git(b.home, "count-objects", "-v"), refs(b.home))
    assert before[2] == sorted(path.name for path in (b.home / ".git").iterdir()), "not even a FETCH_HEAD"
    assert subprocess.run(["git", "-C", b.home, "cat-file", "-e", commit], capture_output=True).returncode


# ---------------------------------------------------------------------------------------------------------------------
# Hostile peers: names and numbers


def test_refs_with_names_that_could_mean_something_else_are_not_fetched(machine, remote):
    commit = plant(remote, "honest/t/1111111")
    for name in (
        "--upload-pack=x/t/1",
        "peer/-x/1",
        "peer/t/--exec=x",
        "peer/t",
        "peer/t/1/2",
        "peer/t/" + "x" * 65,
        "peer/t/a$(id)",
        "peer/t/a;id",
        "peer/t/é",
        "peer/%2e%2e/1",
        "peer/@/1",
    ):
        with contextlib.suppress(AssertionError):  # where git would not have it either
            point(remote, name, commit)
    point(remote, "peer_2/nov.23/ABC-1", commit)
    b = machine("b", [remote])
    assert look(b).keys() == {"1111111", "ABC-1"}
    until(lambda: b.links[0].rest() is None)
    assert len(b.store.names(f"inbox/{b.inboxes[0]}")) == 2


@pytest.fixture
def lying(tmp_path, monkeypatch):
    """lying(lines, after=""): the URL of a server that answers each question with these lines and shell commands."""

    def lying(lines, after=""):
        packets = [f"{len(line) + 5:04x}{line}\n" for line in lines]
        (tmp_path / "answer").write_text("".join(packets))
        (tmp_path / "ssh").write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n{after}\nprintf 0000\ncat > /dev/null\n")
        (tmp_path / "ssh").chmod(0o700)
        monkeypatch.setenv("GIT_SSH_COMMAND", str(tmp_path / "ssh"))
        monkeypatch.setenv("GIT_SSH_VARIANT", "simple")
        return "ssh://far/x"

    return lying


def test_names_that_git_itself_would_never_list_are_not_taken(machine, lying):
    names = ["x/../y", "../../heads/main", "peer/t/.x", "peer/t/x y", "peer/t/x:refs", "+peer/t/x", "peer/t/x\x1b[2J"]
    names += ["peer/t/x.lock", "peer/t/^x", "peer/t/*", "peer/t/", "peer//x", "good/t/x"]
    lines = [f"{'1' * 40} refs/autoresearch/{name}" for name in sorted(names)]
    b = machine("b", [lying([f"{'1' * 40} HEAD\0agent=x", *lines])])
    assert b.links[0].offers() == {"good": [("good/t/x", "1" * 40)]}


def test_a_list_without_end_ends(machine, lying, tmp_path, monkeypatch):
    monkeypatch.setattr(plumbing, "MEMORY_BYTES", 2**28)
    lines = [f"{'1' * 40} refs/autoresearch/peer/t/{number}" for number in range(10_000)]
    b = machine("b", [lying([f"{'1' * 40} HEAD\0agent=x", *lines], f"while cat {tmp_path}/answer; do :; done")])
    b.look()
    until(lambda: b.said)
    assert "does not work" in b.said[0] and not b.ideas()


def test_what_bears_this_machines_name_is_not_taken_for_anothers(machine, remote):
    b = machine("b", [remote])
    plant(remote, f"{b.who}/t/2222222")
    plant(remote, "honest/t/1111111")
    assert look(b).keys() == {"1111111"}
    assert look(machine("c", [remote])).keys() == {"1111111", "2222222"}, "to others it is as good as any"
    b.share(idea("3333333"))
    git(b.home, "config", "autoresearch.name", "new")
    assert look(machine("b", [remote])).keys() == {"1111111"}, "nor after it has taken another name"


def test_a_ref_that_moves_is_read_once(machine, remote):
    b = machine("b", [remote])
    plant(remote, "honest/t/1111111")
    look(b)
    plant(remote, "honest/t/1111111", {"train.py": b"x = 2\n"})
    assert look(b)["1111111"].source == SOURCE and b.links[0].offers() == {}


def test_of_two_remotes_with_one_name_the_first_counts(machine, remote, tmp_path):
    other = tmp_path / "other.git"
    git(tmp_path, "init", "-q", "--bare", other)
    plant(remote, "honest/t/1111111")
    plant(other, "honest/t/1111111", {"train.py": b"x = 2\n"})
    assert look(machine("b", [remote, other]))["1111111"].source == SOURCE
    assert look(machine("b", [other, remote]))["1111111"].source == "x = 2\n"


def flood(remote, names):
    """Thousands of refs to one commit, as a push of them leaves them."""
    commit = plant(remote, "flood/t/0")
    with open(remote / "packed-refs", "w") as file:
        file.write("# pack-refs with: peeled fully-peeled sorted \n")
        file.write("".join(sorted(f"{commit} refs/autoresearch/{name}\n" for name in names)))


def test_a_flood_of_one_peer_takes_a_bounded_part_of_a_look_and_hides_nobody(machine, remote, monkeypatch):
    flood(remote, [f"flood/t/{number}" for number in range(20_000)])
    for number in range(3):
        plant(remote, f"honest/t/{number}")
    monkeypatch.setattr(exchange, "OF_ONE_A_LOOK", 20)
    monkeypatch.setattr(exchange, "OF_ONE", 30)
    b = machine("b", [remote])
    counts = []
    for _ in range(3):
        look(b)
        counts.append([sum(idea.who == who for idea in b.ideas()) for who in ("honest", "flood")])
    assert counts == [[3, 20], [3, 40], [3, 40]]
    assert len(look(machine("c", [remote]))) == 23


def test_a_flood_of_many_names_is_cut_off_and_leaves_room_by_chance(machine, remote, monkeypatch):
    flood(remote, [f"flood{number}/t/1" for number in range(20_000)])
    monkeypatch.setattr(exchange, "MOST_A_LOOK", 40)
    monkeypatch.setattr(plumbing, "FILE_BYTES", 2**20)
    b = machine("b", [remote])
    assert 0 < len(b.links[0].offers()) < 20_000
    look(b)
    assert len(b.ideas()) == 40 and not b.said
    monkeypatch.setattr(plumbing, "FILE_BYTES", 2**25)
    assert len(b.links[0].offers()) == 20_000 + 1 - 40, "without the bound all are listed"


def test_a_store_that_is_full_fetches_no_more_and_says_so_once(machine, remote, monkeypatch):
    plant(remote, "honest/t/1111111")
    b = machine("b", [remote])
    look(b)
    plant(remote, "honest/t/2222222")
    monkeypatch.setattr(store, "MOST_TEXT", 10)
    for _ in range(2):
        b.look()
        until(lambda: not b.links[0].to_look and b.said)
    assert len(b.ideas()) == 1 and len(b.said) == 1


def test_bad_commits_without_end_cost_a_look_a_bounded_time(machine, remote, monkeypatch):
    for number in range(30):
        plant(remote, f"bad/t/{number}", {"base.py": b"%d" % number, **BAD["a larger one"]["files"]})
    monkeypatch.setattr(plumbing, "FILE_BYTES", 2**21)
    monkeypatch.setattr(Link, "LOOK_SECONDS", 0.3)
    b = machine("b", [remote])
    look(b)
    assert 0 < len(b.links[0].offers()["bad"]) <= 30 and not b.said
