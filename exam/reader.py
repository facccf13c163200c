"""The examiner's own process: an isolated interpreter that forks a reader for each question about a sealed model.

It has done nothing but import torch when it forks. A reader sees every row at most once, either as it is or with its
end replaced, and learns the targets of a batch when it has computed its logits. So there is nothing that it could
remember, and nothing in its memory that could give a target away. Who asks the questions is in examiner.py.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # in an isolated interpreter, which would not look beside the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exam import limits, speed, syscalls
from prepare import MOST_TENSORS, Pause, Refused, Task, build_forward, compute_logits, device_kind, one_line

if __name__ == "__main__":  # what an owner has beside prepare.py must not take the place of a package's modules
    del sys.path[0]

READY, LOSSES, SPEED, REFUSED = b"k", b"l", b"s", b"r"


def exam(descriptor):
    """The examiner's life: fork a reader for each question that comes through the socket `descriptor`."""
    import resource

    import torch  # noqa: F401 - imported before a question comes, while the candidate starts up

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # of complaints; it writes no other file
    channel = socket.socket(fileno=descriptor)
    while True:
        question, descriptors, _, _ = socket.recv_fds(channel, 2**16, 1)
        if not question:
            return
        if json.loads(question)["device"] == "mps":  # Apple's libraries do not work in a process that was forked
            command = [sys.executable, "-I", __file__, str(descriptors[0]), question]
            code = subprocess.run(command, stdin=subprocess.DEVNULL, pass_fds=descriptors).returncode
        else:
            if not (child := os.fork()):
                channel.close()
                answer(json.loads(question), socket.socket(fileno=descriptors[0]))
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(descriptors[0])
        channel.send(b"%d" % code)


# What the operators of a sealed model raise; anything else is a fault of ours.
MODEL_FAULTS = (RuntimeError, TypeError, LookupError, ArithmeticError, ValueError, AttributeError, MemoryError)


def answer(question, channel):
    """A reader's life: {"device"} alone asks how fast it is; with "path", "task", "batch" for the losses of a model."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.filter_system_calls(syscalls.READER_CALLS, syscalls.SOME_READER_CALLS)
    set_up_memory()
    said = REFUSED
    try:
        if "path" in question:
            limit_memory(question["device"])
            read_rows(question, Task(**question["task"]), channel.makefile("rwb"))
            return
        said, words = SPEED, json.dumps(speed.measure_flops(0.2))
    except BrokenPipeError:  # the proctor has seen enough
        return
    except (Refused, Pause) as refusal:
        words = str(refusal)
    except MODEL_FAULTS as error:
        words = f"the sealed model fails on the validation rows: {one_line(error, 300)}"
    data = words.encode(errors="replace")[: 2**15]
    channel.sendall(said + len(data).to_bytes(4, "little") + data)


M_PERTURB, M_MMAP_MAX, M_TRIM_THRESHOLD = -6, -4, -1


def set_up_memory():
    """Tell the C library's allocator, where it can be told, how a reader wants its memory."""
    if mallopt := getattr(syscalls.LIBC, "mallopt", None):
        mallopt(M_PERTURB, 1 + os.urandom(1)[0] % 255)  # memory that was not written differs from reader to reader
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap, and the heap does not shrink: to have the kernel
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # hand out fresh pages again and again would take half of the exam


def limit_memory(device):
    """Have a program that takes all of a CPU's memory fail by itself; on a GPU the driver maps more than there is.

    macOS knows no such limit.
    """
    import resource

    if device == "cpu":
        most = int(limits.MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


HEADER_LIMIT = 2**25  # bytes of the safetensors header, which holds the program
# In safetensors' names, and in torch's. Others (8 bits and fewer, quantised, half complex) have kernels few have tried.
STORED_DTYPES = frozenset("BOOL U8 I8 I16 I32 I64 F16 BF16 F32 F64 C64".split())


def load_tensor(file, name):
    """One tensor of an open safetensors file; raises Refused for a dtype that sealed models have no use for."""
    import torch

    dtype = file.get_slice(name).get_dtype()
    if dtype not in STORED_DTYPES:
        raise Refused(f"the submission holds a tensor of {dtype}, which is not allowed in a sealed model")
    tensor = file.get_tensor(name)
    return tensor.view(torch.uint8) != 0 if dtype == "BOOL" else tensor  # kernels count on bytes of 0 and 1


def load_sealed(path):
    """(program, forward) of a submission; raises Refused for anything but plain tensors and allowed calls."""
    import safetensors

    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > HEADER_LIMIT:
                raise Refused(f"the submission is not a sealed model: its header exceeds {HEADER_LIMIT >> 20} MB")
        with safetensors.safe_open(path, "pt") as file:
            program = json.loads((file.metadata() or {})["program"])
            device = program["device"]
            if device not in ("cpu", device_kind()):
                raise Refused(f"the model was sealed for a device that is not here: {device!r}")
            names = {name for name in program["tensors"].values() if name is not None}
            if len(names) > MOST_TENSORS:
                raise Refused(f"the model has more than {MOST_TENSORS} tensors")
            tensors = {name: load_tensor(file, name).to(device) for name in names}
        return program, build_forward(program, tensors)
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"the submission is not a sealed model: {str(error)[:200]}") from None


def read_rows(question, task, file):
    """Answer with the losses of the model at question["path"], batch after batch, until the proctor closes `file`."""
    import torch
    import torch.nn.functional as F

    program, forward = load_sealed(question["path"])
    device, shape = question["device"], (question["batch"], task.seq_len)
    if (program["device"], program["batch"]) != (device, shape[0]):
        raise Refused(f"the model was sealed for batches of {program['batch']!r} rows on {program['device']!r}")

    def receive():
        data = np.frombuffer(file.read(2 * shape[0] * shape[1]), dtype=np.uint16)
        return torch.from_numpy(data.astype(np.int64)).view(shape).to(device) if data.size else None

    with torch.inference_mode():
        while (tokens := receive()) is not None:
            logits = compute_logits(forward, tokens, task)
            file.write(READY)
            file.flush()
            targets = receive()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            file.write(LOSSES + losses.cpu().numpy().tobytes())
            file.flush()
            del tokens, logits, targets, losses


if __name__ == "__main__":
    descriptor, *asked = sys.argv[1:]
    if asked:
        answer(json.loads(asked[0]), socket.socket(fileno=int(descriptor)))
    else:
        exam(int(descriptor))
