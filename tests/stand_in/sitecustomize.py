"""Lets every Python process of an environment see the device of cuda_stand_in.py, where TORCH_STAND_IN names a card.

Python imports this module at its start, in isolated processes too; `gpu_python` in conftest.py makes the environment.
"""

import importlib.machinery
import os
import sys

DEVICE_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm")


class Importer:
    """Finds torch, and has the device set up as soon as it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            import cuda_stand_in

            cuda_stand_in.set_up()

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("TORCH_STAND_IN"):
    exists = os.path.exists
    os.path.exists = lambda path: path in DEVICE_FILES or exists(path)
    sys.meta_path.insert(0, Importer())
