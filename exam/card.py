"""What an NVIDIA card went through while a candidate trained, by the driver's own account (NVML), which none can write.

Nothing depends on it: without the driver, or where several cards leave open which one is meant, nothing is known.
"""

import contextlib
import os
import statistics

from prepare import device_kind


class Card:
    """The GPU that a trial uses, from the moment that this is made, which is before the candidate is on it."""

    def __init__(self):
        self.megahertz, self.celsius, self.held_back, self.others = [], [], [], []
        self.card, self.strangers, self.asked = None, set(), 0
        if device_kind() != "cuda":
            return
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self.card = find_card()
            if self.card:
                self.strangers = self._pids()

    def look(self, own: set[int]):
        """Note what it does at this moment; own: process ids of the candidate."""
        if not self.card:
            return
        import pynvml

        for note in (self._note_clock, lambda: self._note_others(own)):
            with contextlib.suppress(pynvml.NVMLError):  # not all cards tell all
                note()

    def facts(self) -> dict[str, float]:
        """Of all looks, as result.json has it: what is not known is left out."""
        known = {
            "gpu_megahertz": (statistics.fmean, self.megahertz),
            "gpu_celsius": (max, self.celsius),
            "gpu_held_back": (statistics.fmean, self.held_back),
            "gpu_others": (statistics.fmean, self.others),
        }
        return {name: round(of(values), 3) for name, (of, values) in known.items() if values}

    def _note_clock(self):
        import pynvml

        self.megahertz.append(pynvml.nvmlDeviceGetClockInfo(self.card, pynvml.NVML_CLOCK_SM))
        self.celsius.append(pynvml.nvmlDeviceGetTemperature(self.card, pynvml.NVML_TEMPERATURE_GPU))
        # Under a full load most cards are at their limit of power, which is the candidate's doing: that does not count.
        faults = (
            pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
            | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
            | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        self.held_back.append(float(bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.card) & faults)))

    def _note_others(self, own):
        """The share of the card that others have had since the last look.

        A container hides the process ids: where none of the candidate's is among them, who was there first are others.
        """
        import pynvml

        pids = self._pids()
        others = pids - own if pids & own else pids & self.strangers
        try:
            samples = pynvml.nvmlDeviceGetProcessUtilization(self.card, self.asked)
        except pynvml.NVMLError_NotFound:  # nobody has used it since
            samples = []
        self.asked = max([self.asked, *(sample.timeStamp for sample in samples)])
        used = {sample.pid: sample.smUtil / 100 for sample in sorted(samples, key=lambda sample: sample.timeStamp)}
        self.others.append(min(1.0, sum(share for pid, share in used.items() if pid in others)))

    def _pids(self):
        import pynvml

        return {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self.card)}


def find_card():
    """NVML's handle of the card that CUDA calls the first; None where that cannot be told for sure.

    NVML counts cards by their place on the bus, CUDA by their speed unless CUDA_DEVICE_ORDER says otherwise.
    """
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible.startswith("GPU-"):
        return pynvml.nvmlDeviceGetHandleByUUID(visible)
    cards = [pynvml.nvmlDeviceGetHandleByIndex(place) for place in range(pynvml.nvmlDeviceGetCount())]
    alike = len({pynvml.nvmlDeviceGetName(card) for card in cards}) == 1
    sure = alike or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    return cards[int(visible)] if sure and visible.isdecimal() and int(visible) < len(cards) else None
