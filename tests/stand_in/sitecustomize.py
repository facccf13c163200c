"""Lets every Python process of an environment see the device of gpu_stand_in.py, where TORCH_STAND_IN names a card.

Python imports this module at its start, in isolated processes too; `gpu_python` in conftest.py makes the environment.
"""

import errno
import importlib.machinery
import os
import pathlib
import platform
import socket
import sys

DEVICE_FILES = {"cuda": ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"), "xpu": ("/dev/dri/renderD128",)}


class Importer:
    """Finds torch, and has the device set up as soon as it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            sys.meta_path.remove(self)
            execute(module)
            import gpu_stand_in

            gpu_stand_in.set_up()

        spec.loader.exec_module = exec_module
        return spec


def play_files(paths):
    """Device files seem to be there, and torch to be built for Intel's GPUs."""
    exists, read_text = os.path.exists, pathlib.Path.read_text

    def read(path, *args, **options):
        text = read_text(path, *args, **options)
        return text.replace("xpu: Optional[str] = None", "xpu: Optional[str] = '1'") if path.stem == "version" else text

    os.path.exists, pathlib.Path.read_text = lambda path: path in paths or exists(path), read


def play_mac():
    """What tells a Mac, and what it lacks of Linux."""
    platform.mac_ver = lambda *_: ("15.0", ("", "", ""), "arm64")
    del os.sched_getaffinity, os.waitid
    pair = socket.socketpair

    def socketpair(family=socket.AF_UNIX, kind=socket.SOCK_STREAM, protocol=0):
        if kind == socket.SOCK_SEQPACKET:
            raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")
        return pair(family, kind, protocol)

    socket.socketpair = socketpair


if os.environ.get("TORCH_STAND_IN"):
    kind = os.environ.get("TORCH_STAND_IN_KIND", "cuda")
    if kind == "mps":
        play_mac()
    else:
        play_files(DEVICE_FILES[kind])
    sys.meta_path.insert(0, Importer())
