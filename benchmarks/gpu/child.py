"""One part in its own process: python -m benchmarks.gpu.child PART DEVICE SIZES [ROOT].

Each record is a line of JSON on standard output, as soon as it is measured.
"""

import importlib
import json
import logging
import sys

import torch

from benchmarks.gpu import sizes


def main(part: str, device: str, size: str, root: str | None = None) -> None:
    """Measure one part and print its records."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    module = importlib.import_module(f"benchmarks.gpu.{part}")
    for record in module.measure(torch.device(device), getattr(sizes, size.upper()), root):
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
