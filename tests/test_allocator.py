"""Memory that is freed and allocated again, in a process of its own: the system's own count of page faults."""

import platform
import subprocess
import sys

import pytest

ROUNDS, BLOCKS, MIB = 20, 4, 12
PAGES = ROUNDS * BLOCKS * MIB * 2**20 // 4096

COUNT = f"""
import resource
{{first}}
for _ in range({ROUNDS}):
    blocks = [b"1" * ({MIB} * 2**20) for _ in range({BLOCKS})]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
KEEP = "from lightning_advknn.allocator import keep_freed_memory; keep_freed_memory()"


def faults(first: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(first=first)], capture_output=True, text=True, check=True, env={}
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    assert faults(KEEP) < PAGES // 4 < faults("import lightning_advknn")


def test_elsewhere_nothing_happens(monkeypatch):
    from lightning_advknn.allocator import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", None)
    keep_freed_memory()
