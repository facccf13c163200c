"""The sandbox: Landlock rules, limits and environment of the processes of a trial, and how such a process starts.

For the candidate and for the examiner alike. System calls are for syscalls.py, the end of processes for processes.py.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from exam import limits, syscalls
from exam.files import ROOT
from prepare import cache_root, has_gpu


def openings(root, hidden):
    """Yield the paths that together make up the folder `root` without the `hidden` files and folders below it."""
    hidden = {path for path in hidden if path == root or path.startswith(os.path.join(root, ""))}
    ancestors = {parent for path in hidden for parent in Path(path).parents}

    def walk(path):
        if str(path) in hidden:
            return
        if path not in ancestors:
            yield str(path)
        else:
            for entry in os.scandir(path):
                if not entry.is_symlink():  # a link would open what it points to
                    yield from walk(Path(entry.path))

    return walk(Path(root))


def sandbox_rules(readable, writable, hidden):
    """[(path, rights)] of a process that runs Python: system libraries and devices, `readable` and `writable` paths.

    What it needs of its own entry in /proc, start_confined() adds.
    """
    from landlockpy import AccessFS, fs_for_abi

    listing, reading = AccessFS.READ_DIR, AccessFS.READ_FILE
    hidden = {str(ROOT), str(cache_root()), *hidden}
    roots = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin", "/sbin", "/sys", *filter(None, sys.path)}
    roots |= {"/nix/store", "/run/opengl-driver"}  # where NixOS has Python and the libraries of the GPU's driver
    roots |= {"/opt/rocm", "/opt/amdgpu", "/opt/intel"}  # those of AMD and Intel
    roots |= set(filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(":")))
    roots |= {f"/etc/{name}" for name in ("alternatives", "ld.so.cache", "localtime", "nsswitch.conf", "passwd")}
    # Of /proc, what tells of the machine and stays the same: counters could be moved, and processes named, to be read.
    roots |= {f"/proc/{name}" for name in ("bus", "cpuinfo", "devices", "driver", "filesystems", "meminfo", "modules")}
    roots |= {f"/proc/{name}" for name in ("stat", "sys", "uptime", "version")}
    roots = {os.path.realpath(root) for root in roots if os.path.exists(root)} - {str(ROOT), "/"}
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "dri", "dxg", "kfd")}
    devices |= {str(path) for path in Path("/dev").glob("nvidia*")}
    rules = [(root, listing) for root in roots if os.path.isdir(root)]
    rules += [(path, reading | AccessFS.EXECUTE) for root in roots for path in openings(root, hidden)]
    rules += [(path, reading | AccessFS.WRITE_FILE | AccessFS.IOCTL_DEV) for path in devices if os.path.exists(path)]
    rules += [(path, listing) for path in devices if os.path.isdir(path)]  # Intel's driver looks there for its devices
    rules += [(path, reading | (listing if os.path.isdir(path) else reading)) for path in readable]
    return rules + [(path, fs_for_abi(99) & ~(AccessFS.MAKE_CHAR | AccessFS.MAKE_BLOCK)) for path in writable]


def examiner_rules(out, hidden):
    """Those of an examiner: it reads the folder `out` of a trial and the code of the exam."""
    from landlockpy import AccessFS

    names = (str(ROOT), AccessFS.READ_DIR)  # which Python reads to find a module: names alone
    return [*sandbox_rules([out, ROOT / "prepare.py", ROOT / "exam"], [], hidden), names]


def sandbox_level():
    """What protects a trial on this machine, in words for the records; 'none' where the kernel has no Landlock."""
    with contextlib.suppress(ImportError, OSError):
        import landlockpy

        if landlockpy.supported():
            return f"landlock {landlockpy.abi_version()}"
    return "none"


CANDIDATE_GOES, EXAMINER_GOES = 1000, 500  # oom_score_adj: who goes first where memory runs out


def landlock_abi():
    """The kernel's Landlock version; 0 without it."""
    level = sandbox_level()
    return 0 if level == "none" else int(level.split()[1])


def thread_limit(shares):
    """RLIMIT_NPROC for a candidate: the threads that its user has, and room for its own and its neighbours'.

    shares: how many candidates of that user run at a time. The kernel exempts root.
    """
    import psutil

    user, threads = os.getuid(), limits.THREAD_LIMIT * shares
    if not user:
        return -1
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            threads += process.num_threads() if process.uids().real == user else 0
    return threads


def start_confined(command, rules, pass_fds=(), first_to_go=CANDIDATE_GOES, shares=1, **options):
    """Popen `command` in its own session, under Landlock `rules` (None: unconfined), to die with this process.

    Its process group has the number of the process and is nobody else's: see kill_group(). first_to_go: its
    oom_score_adj, since where memory runs out, a candidate has to go before all others. shares: see thread_limit().
    """
    import resource

    threads = thread_limit(shares)
    scoped, on_gpu = landlock_abi() >= 6, has_gpu()
    own = os.open("/proc/self/task", os.O_PATH | os.O_DIRECTORY) if rules is not None else None

    def confine():
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.FILE_LIMIT, limits.FILE_LIMIT))
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(first_to_go))
        if rules is not None:
            for capability in range(64):  # root's would open the environment of other processes in /proc
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
            # NVIDIA's driver names the threads that it starts by writing /proc/self/task/<thread>/comm, and gives up
            # where it may not. The rule belongs to an inode that the kernel may drop and make anew, so the process
            # holds it open.
            os.dup2(os.open("/proc/self/task", os.O_PATH | os.O_DIRECTORY), own)
            access = landlockpy.AccessFS
            reading = access.READ_FILE | access.READ_DIR
            naming = access.WRITE_FILE | access.TRUNCATE if on_gpu else reading
            of_itself = [("/proc/self", reading), ("/proc/self/task", reading | naming)]
            scopes = landlockpy.Scope.SIGNAL | landlockpy.Scope.ABSTRACT_UNIX_SOCKET
            with landlockpy.Ruleset(scoped=scopes) as ruleset:
                for path, rights in [*rules, *of_itself]:
                    ruleset.allow_path(path, rights)
                ruleset.restrict()  # also sets no_new_privs, without which a filter would need root
            calls, some_calls = ((), ()) if scoped else syscalls.signal_calls()
            syscalls.filter_system_calls(syscalls.SYSTEM_CALLS + calls, syscalls.SOME_SYSTEM_CALLS + some_calls)

    if rules is not None:
        import landlockpy

        pass_fds = (*pass_fds, own)
    try:
        return subprocess.Popen(command, start_new_session=True, preexec_fn=confine, pass_fds=pass_fds, **options)
    finally:
        if own is not None:
            os.close(own)


# What a trial inherits of the environment: no keys, and no folders to write to.
ENVIRONMENT = re.compile(
    r"PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|PYTHONPATH|GPU_DEVICE_ORDINAL"
    r"|(?!TORCH_TRACE|TORCH_LOGS_OUT|TORCH_HOME|TRITON_HOME|(?:TORCH|TRITON|SYCL)\w+_DIR|CUDA_CACHE_PATH)"
    r"(?!\w*(?:KEY|TOKEN|SECRET|PASSWORD))"
    r"(CUDA|NVIDIA|HIP|HSA|ROCM|ROCR|ONEAPI|SYCL|ZE|OMP|MKL|TORCH|TRITON|PYTORCH)_\w+"
)


def environment():
    """Of this process's environment, what the processes of a trial inherit."""
    return {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)}


def room_environment(room, told):
    """Environment of a trial's process in the folder `room`, `told` to it by the proctor: a dict of strings."""
    return environment() | {
        "AUTORESEARCH_TRIAL": json.dumps(told),
        "HOME": str(room),
        "TMPDIR": str(room),
        "TORCHINDUCTOR_CACHE_DIR": str(room / "compiled"),
        "TRITON_CACHE_DIR": str(room / "compiled" / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its worker pool would need the machine's shared memory
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
