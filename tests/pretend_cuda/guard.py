"""Compiles and loads guard.cpp, which lets autograd run for pretended devices."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.real_gpu import REAL_GPU

_SOURCE = Path(__file__).with_name("guard.cpp")
_COMPILER = os.environ.get("CXX", "g++")


def obstacle() -> str | None:
    """Why GPUs cannot be pretended here; None if they can."""
    if REAL_GPU:
        return "there is a real GPU"
    if not torch.backends.cuda.is_built():
        return "torch is a build for the CPU alone, which does not know the device type cuda"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "guard.cpp is written for Linux on x86-64"
    if not shutil.which(_COMPILER):
        return f"no C++ compiler: {_COMPILER} is not installed"
    return None


def load(devices: int) -> None:
    """Tell autograd how many devices there are."""
    ctypes.CDLL(str(_library())).pretend(devices)


def _library() -> Path:
    """The compiled file, in a folder of temporary files that is this user's alone."""
    folder = Path(tempfile.gettempdir()) / f"pretend-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"Expected {folder} to be this user's, but it is another's: delete it.")
    content = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    library = folder / f"guard-{torch.__version__}-{content}.so"
    if not library.is_file():
        # Another process may do the same: each compiles to a file of its own, and the last one stays.
        made = library.with_suffix(f".{os.getpid()}.tmp")
        root = Path(torch.__file__).parent
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
        command = [_COMPILER, *flags, str(_SOURCE), "-ltorch_cpu", "-lc10", "-o", str(made)]
        subprocess.run(command, check=True)
        made.replace(library)
    return library
