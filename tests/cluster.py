"""A Slurm cluster and a host to log in to, on this one machine: as root on Debian, python tests/cluster.py

Slurm, munge and sshd are installed where they are missing, and run in a temporary folder until Ctrl-C: two nodes of one
core each, and an sshd of the loopback. No service of the system is started, and nothing but the packages stays.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from exam.signals import hear_signals  # noqa: E402

PACKAGES = {"srun": "slurm-wlm", "slurmctld": "slurm-wlm", "munged": "munge", "sshd": "openssh-server"}
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it whether a package may start its services
NODES = "one", "two"
LOGINS = Path("/run/sshd")  # that sshd wants, whatever its configuration says
FREEZER = Path("/sys/fs/cgroup/freezer")  # where slurmd makes a folder for each job

# ---------------------------------------------------------------------------------------------------------------------
# What has to be installed


def install():
    """Install what is missing, without a service of the system being started."""
    missing = sorted({package for command, package in PACKAGES.items() if not shutil.which(command)})
    if not missing:
        return
    apt = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=60"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        for line in ([*apt, "update"], [*apt, "install", "--no-install-recommends", *missing]):
            subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=600)
    finally:
        if ours:
            POLICY.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The machines

SLURM = """
ClusterName=nights
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""
CGROUPS = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""
SSHD = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
PidFile none
SetEnv AUTORESEARCH_CACHE={folder}/cache OMP_NUM_THREADS=1
"""
SSH = """
Host here
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking accept-new
  BatchMode yes
  LogLevel ERROR
"""


def free_ports(count):
    """So many ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def wait_until(what, happens, seconds=60.0):
    """The first thing that happens() returns which is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (found := happens()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)
    return found


class Cluster:
    """The daemons, in one folder, from entering to leaving."""

    def __init__(self, folder: Path):
        self.folder, self.daemons, self.made = folder, {}, []  # made: folders elsewhere
        self.environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}

    def __enter__(self):
        try:
            self.start_slurm()
            self.start_sshd()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root", "--full")
            wait_until("no job is left", lambda: not self.jobs(), 20)
        for name in reversed([*self.daemons]):
            self.end(name)
        left = self.processes()  # of jobs that nobody looks after any more
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, 10)
        groups = [path for node in NODES for path in FREEZER.glob(f"slurm_{node}/**/")]
        for path in [*sorted(groups, reverse=True), *self.made]:
            with contextlib.suppress(OSError):
                path.rmdir()

    def run(self, *command, timeout=30):
        """What a command says. Raises CalledProcessError."""
        line = [str(part) for part in command]
        options = {"capture_output": True, "text": True, "timeout": timeout, "env": self.environment}
        return subprocess.run(line, check=True, **options).stdout

    def start(self, name, *command):
        log = open(self.folder / f"{name}.out", "a")
        with log:
            line = [shutil.which(command[0]), *map(str, command[1:])]
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.daemons[name] = subprocess.Popen(line, **streams, env=self.environment, start_new_session=True)

    def end(self, name, number=signal.SIGTERM):
        process = self.daemons.pop(name)
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def processes(self):
        """All processes that name the folder, or write there, but this one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # Of a slurmstepd, which has overwritten its words and its environment, only its log tells.
                files = [file.path for file in process.open_files()]
                named = [*process.cmdline(), *process.environ().values(), *files]
                if process.pid != os.getpid() and any(str(self.folder) in text for text in named):
                    found.append(process)
        return found

    def start_slurm(self):
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        proctrack = "cgroup" if os.access(FREEZER, os.W_OK) else "linuxproc"
        values = {"folder": folder, "host": host, "ports": free_ports(3), "proctrack": proctrack}
        (folder / "slurm.conf").write_text(SLURM.format(**values))
        (folder / "cgroup.conf").write_text(CGROUPS)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        places = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
        self.start("munged", "munged", "--foreground", "--force", *places)
        wait_until("munged", (folder / "munge.socket").exists)
        self.start("slurmctld", "slurmctld", "-D", "-f", folder / "slurm.conf")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node):
        cores = sorted(os.sched_getaffinity(0))  # each node has one of its own, where there are two
        core = str(cores[NODES.index(node) % len(cores)])
        self.start(node, "taskset", "-c", core, "slurmd", "-D", "-N", node, "-f", self.folder / "slurm.conf")
        wait_until(f"node {node} is idle", lambda: "IDLE" in self.node(node))

    def node(self, node):
        with contextlib.suppress(subprocess.CalledProcessError):  # as long as slurmctld starts
            return self.run("scontrol", "show", "node", node).partition("State=")[2].split()[0]
        return ""

    def jobs(self):
        """[(id, node, state)] of all jobs; node: "" where none is given yet."""
        lines = self.run("squeue", "-h", "-o", "%i|%N|%T").splitlines()
        return [tuple(line.split("|")) for line in lines]

    def start_sshd(self):
        folder, (port,) = self.folder, free_ports(1)
        for key in ("host", "user"):
            self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
        (folder / "sshd.conf").write_text(SSHD.format(folder=folder, port=port))
        (folder / "ssh.conf").write_text(SSH.format(folder=folder, port=port))
        if not LOGINS.exists():
            LOGINS.mkdir()
            self.made.append(LOGINS)
        self.start("sshd", "sshd", "-D", "-e", "-f", folder / "sshd.conf")

        def answers():
            with contextlib.suppress(subprocess.CalledProcessError):
                return self.run("ssh", "-F", folder / "ssh.conf", "here", "echo", "well") == "well\n"

        wait_until("sshd answers", answers)


def main():
    hear_signals()
    install()
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder, Cluster(Path(folder)):
        print(f"export SLURM_CONF={folder}/slurm.conf; sinfo; ssh -F {folder}/ssh.conf here", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
