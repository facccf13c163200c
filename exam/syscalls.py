"""The filter of system calls: what Landlock does not rule, for candidates and for the readers of a sealed model.

Tables first, in the numbers of x86-64 and Arm; then what installs them. Which files a process may open is for
sandbox.py.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 36, 38


LIBC = ctypes.CDLL(None)  # opened once: after a fork, a lock of the loader may be held for good


def prctl(option, value):
    """Linux process control; does nothing elsewhere."""
    if sys.platform == "linux":
        LIBC.prctl(option, value, 0, 0, 0)


# What Landlock does not rule. A line is a group of system calls, as (number on x86_64, number on aarch64 or None), with
# what becomes of a call: an error, or "ignore", which answers 0 and does nothing.
IGNORE = 0
SYSTEM_CALLS = (
    # A server could be reached, or something left behind for a later trial: bind, io_uring_setup, System V memory,
    # semaphores and queues, mq_open, add_key, request_key, keyctl, setxattr in its four forms.
    (errno.EACCES, ((49, 200), (425, 425), (29, 194), (30, 196), (64, 190), (68, 186), (240, 180))),
    (errno.EACCES, ((248, 217), (249, 218), (250, 219), (188, 5), (189, 6), (190, 7), (463, 463))),
    # connect. A driver that looks for its service (CUDA for MPS) hears that there is none.
    (errno.ENOENT, ((42, 203),)),
    # removexattr in its four forms; file_setattr, the flags of any file of the user.
    (errno.EACCES, ((197, 14), (198, 15), (199, 16), (466, 466), (469, 469))),
    # The page cache, which tells what an earlier process read: mincore, cachestat, process_madvise.
    (errno.EACCES, ((27, 232), (451, 451), (440, 440))),
    (errno.ENOSYS, ((327, 286), (328, 287))),
    (IGNORE, ((221, 223),)),  # fadvise64
    # What others do: syslog, inotify_init, inotify_init1, fanotify_init.
    (errno.EACCES, ((103, 116), (253, None), (294, 26), (300, 262))),
    # New namespaces (clone3 would hide its flags), and what looks into the kernel: unshare, setns, perf_event_open,
    # bpf, userfaultfd. truncate by path, which Landlock rules from ABI 3 on.
    (errno.ENOSYS, ((435, 435),)),
    (errno.EACCES, ((272, 97), (308, 268), (298, 241), (321, 280), (323, 282), (76, 45))),
    # Modes, owners and times could mark any file of the user, but honest tools set them on files of their own: chmod,
    # chown, utime and their variants.
    (IGNORE, ((90, None), (91, 52), (268, 53), (452, 452), (92, None), (93, 55), (94, None), (260, 54))),
    (IGNORE, ((132, None), (235, None), (261, None), (280, 88))),
    # Whoever stays in the process group of the candidate ends with it: setpgid, setsid.
    (IGNORE, ((109, 154), (112, 157))),
    # The priority of others: setpriority, ioprio_set. The cores of a trial beside this one: sched_setaffinity.
    (IGNORE, ((141, 140), (251, 30), (203, 122))),
    # Two trials at a time could talk through locks of a file that both may read: flock, and of fcntl below.
    (IGNORE, ((73, 32),)),
)
# Calls that are allowed with certain arguments alone: (otherwise, calls, ((argument, mask, allowed values), ...)). The
# filter compares 32 bits; the upper half of argument 4 is 4.5.
NEW_NAMESPACE = 0x7E020000 | 0x80  # CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET, _NEWTIME
EVERY_BIT = 0xFFFFFFFF
SOME_SYSTEM_CALLS = (
    # socket: CUDA asks for one to MPS. socketpair: no datagrams, which could be sent to a service by its name.
    (errno.EACCES, ((41, 198),), ((0, EVERY_BIT, (socket.AF_UNIX,)), (1, 0xF, (socket.SOCK_SEQPACKET,)))),
    (
        errno.EACCES,
        ((53, 199),),
        ((0, EVERY_BIT, (socket.AF_UNIX,)), (1, 0xF, (socket.SOCK_STREAM, socket.SOCK_SEQPACKET))),
    ),
    (errno.EACCES, ((44, 206),), ((4, EVERY_BIT, (0,)), (4.5, EVERY_BIT, (0,)))),  # sendto: no address
    (errno.EACCES, ((302, 261),), ((0, EVERY_BIT, (0,)),)),  # prlimit: of the process itself
    # sched_setparam, sched_setscheduler, sched_setattr: of the calling thread.
    (IGNORE, ((142, 118), (144, 119), (314, 274)), ((0, EVERY_BIT, (0,)),)),
    (errno.EACCES, ((56, 220),), ((0, NEW_NAMESPACE, (0,)),)),  # clone
)
# Calls that are not made with certain arguments: (what becomes of them, calls, argument, mask, values).
REFUSED_ARGUMENTS = (
    # fcntl: F_SETOWN, F_SETSIG and F_SETOWN_EX would signal others, F_SETLEASE holds up who opens a file, F_NOTIFY.
    (errno.EACCES, ((72, 25),), 1, EVERY_BIT, (8, 10, 15, 1024, 1026)),
    (IGNORE, ((72, 25),), 1, EVERY_BIT, (5, 6, 7, 36, 37, 38)),  # its locks: F_GETLK, F_SETLK, F_SETLKW, F_OFD_...
    # ioctl by its kind: flags and numbers of files (f, v, X, btrfs), owners of sockets.
    (errno.EACCES, ((16, 29),), 1, 0xFF00, (0x6600, 0x7600, 0x5800, 0x9400, 0x8900)),
    # madvise: MADV_COLD and MADV_PAGEOUT drop pages from the page cache.
    (errno.EACCES, ((28, 233),), 2, EVERY_BIT, (20, 21)),
)
# The process that reads a sealed model needs less still: no other program or process, and none to look into (execve,
# execveat, fork, vfork, ptrace, process_vm_readv, process_vm_writev; clone makes threads).
READER_CALLS = ((errno.EACCES, ((59, 221), (322, 281), (57, None), (58, None), (101, 117), (310, 270), (311, 271))),)
CLONE_THREAD = 0x10000
SOME_READER_CALLS = ((errno.EACCES, ((56, 220),), ((0, CLONE_THREAD, (CLONE_THREAD,)),)),)

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH


def signal_calls():
    """(calls, some calls) that keep a process from signalling others where Landlock, before ABI 6, cannot.

    tkill, rt_sigqueueinfo, rt_tgsigqueueinfo and pidfd_send_signal are closed; kill and tgkill reach this process, and
    kill its group.
    """
    closed = (errno.EPERM, ((200, 130), (129, 138), (297, 240), (424, 424)))
    return (closed,), ((errno.EPERM, ((62, 129), (234, 131)), ((0, EVERY_BIT, (0, os.getpid())),)),)


def filter_system_calls(calls, some_calls):
    """Install a seccomp filter for this process and all that it starts; does nothing on other architectures.

    calls, some_calls: as SYSTEM_CALLS and SOME_SYSTEM_CALLS.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        return
    column, architecture = ARCHITECTURES[machine]
    load, mask_with, equal, at_least, jump, end = 0x20, 0x54, 0x15, 0x35, 0x05, 0x06
    answer, allow = 0x50000, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, answer + errno.EACCES)]
    code += [(load, 0, 0, 0), (at_least, 0, 1, 2**30), (end, 0, 0, answer + errno.EACCES)]  # x32 has all calls again
    for otherwise, group, tests in [*((*line, ()) for line in calls), *some_calls]:
        verdict = []
        for argument, mask, allowed in tests:
            verdict += [(load, 0, 0, int(16 + 8 * argument)), (mask_with, 0, 0, mask)]
            verdict += [(equal, len(allowed) - place, 0, value) for place, value in enumerate(allowed)]
            verdict += [(end, 0, 0, answer + otherwise)]
        verdict += [(end, 0, 0, allow if tests else answer + otherwise)]
        for numbers in group:
            if numbers[column] is not None:
                code += [(equal, 0, len(verdict), numbers[column]), *verdict]
    for otherwise, group, argument, mask, refused in REFUSED_ARGUMENTS:
        # Others of its arguments are for the lines below: the number of the call is there again for them.
        for numbers in group:
            verdict = [(load, 0, 0, 16 + 8 * argument), (mask_with, 0, 0, mask)]
            verdict += [(equal, len(refused) - place, 0, value) for place, value in enumerate(refused)]
            verdict += [(jump, 0, 0, 1), (end, 0, 0, answer + otherwise), (load, 0, 0, 0)]
            code += [(equal, 0, len(verdict), numbers[column]), *verdict]
    code += [(end, 0, 0, allow)]
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(lines)))
    if LIBC.prctl(PR_SET_SECCOMP, 2, program, 0, 0):
        raise OSError("the kernel refused the seccomp filter")
