"""What became of one trial: result.json, typed, and its summary. What the loop makes of it is not for here."""

import dataclasses
import json
from pathlib import Path

from exam.files import write_atomically

COUNTED = ("ok", "invalid", "crash", "timeout")  # outcomes that are the candidate's doing
# Those that are not: what may pass by itself, what needs the owner, and a proctor that has ended without a word.
UNCOUNTED = ("paused", "fault", "lost")


@dataclasses.dataclass
class Result:
    """What became of one trial, as result.json holds it; None, 0.0 or "" for what was not found out.

    outcome: one of COUNTED and UNCOUNTED. Times are in seconds, memory in MiB, matmul_flops in FLOP/s as the machine
    multiplied right after the training, and cpu_rate as numpy did then or after the exam, whichever was more; others is
    the share of the CPU cores' time that others had during it, gpu_others that of an NVIDIA card, gpu_held_back the
    share of the time in which heat or the power supply held that back; leak is the largest change of a loss by later
    tokens, which from a score of beat on was looked for in some rows alone. host and cores: the name of the machine
    that held it, and on how many CPU cores. sha256: {file: digest} of what decides a score.
    """

    outcome: str
    reason: str | None = None
    val_bpb: float | None = None
    training_seconds: float = 0.0
    startup_seconds: float = 0.0
    eval_seconds: float = 0.0
    total_seconds: float = 0.0
    cpu_seconds: float = 0.0
    cpu_rate: float | None = None
    others: float | None = None
    gpu_others: float | None = None
    gpu_held_back: float | None = None
    gpu_megahertz: float | None = None
    gpu_celsius: float | None = None
    steps: float | None = None
    tokens: float | None = None
    params: float | None = None
    peak_rss_mb: float = 0.0
    peak_vram_mb: float | None = None
    leak: float | None = None
    beat: float | None = None
    device: str | None = None
    matmul_flops: float | None = None
    host: str = ""
    cores: int = 0
    task: str = ""
    budget: float = 0.0
    seed: int = 0
    sandbox: str = ""
    python: str = ""
    sha256: dict = dataclasses.field(default_factory=dict)

    @property
    def counted(self):
        """Whether the candidate has had its trial."""
        return self.outcome in COUNTED

    @property
    def memory_gb(self):
        """The most memory that training took, in GiB: the GPU's where there is one."""
        return (self.peak_vram_mb or self.peak_rss_mb) / 1024

    @classmethod
    def read(cls, path):
        """The Result in a file; None where that is missing or damaged. Entries of other names are left out."""
        try:
            found = json.loads(Path(path).read_text())
            result = cls(**{field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found})
            return result if result.is_sound() else None
        except (OSError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError):
            return None

    def is_sound(self):
        """Whether all is of its type and finite, the outcome a known one, and a score or a reason there."""
        for field in dataclasses.fields(self):
            value, number = getattr(self, field.name), isinstance(0.0, field.type) or isinstance(0, field.type)
            if number and value is not None:
                if type(value) not in (int, float) or not abs(value) < 1e18:  # JSON need not tell 9.0 from 9
                    return False
            elif not isinstance(value, field.type):
                return False
        strings = all(isinstance(text, str) for item in self.sha256.items() for text in item)
        told = (self.val_bpb or 0) > 0 if self.outcome == "ok" else bool(self.reason)
        return self.outcome in COUNTED + UNCOUNTED and strings and told

    def write(self, path):
        """Write the file as a whole or not at all; what is None is left out."""
        known = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        write_atomically(path, json.dumps(known, indent=1) + "\n")


SUMMARY = (  # name, what it is of a Result, times what, format
    ("val_bpb", "val_bpb", 1, ".6f"),
    ("training_seconds", "training_seconds", 1, ".1f"),
    ("startup_seconds", "startup_seconds", 1, ".1f"),
    ("eval_seconds", "eval_seconds", 1, ".1f"),
    ("total_seconds", "total_seconds", 1, ".1f"),
    ("peak_vram_mb", "peak_vram_mb", 1, ".1f"),
    ("peak_rss_mb", "peak_rss_mb", 1, ".1f"),
    ("total_tokens_M", "tokens", 1e-6, ".1f"),
    ("num_steps", "steps", 1, ".0f"),
    ("num_params_M", "params", 1e-6, ".1f"),
)


def print_summary(result):
    """Print a Result the way that scripts of karpathy/autoresearch expect it, one `name: value` a line."""
    print("---")
    if result.outcome != "ok":
        print(f"outcome:          {result.outcome}\nreason:           {result.reason}")
    for name, key, scale, form in SUMMARY:
        if (value := getattr(result, key)) is not None:
            print(f"{name + ':':<18}{value * scale:{form}}")
