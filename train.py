"""Train, validate or test a backbone or a surrogate: python train.py fit --config configs/mnist/backbone.yaml."""

import sys

from lightning_advknn.allocator import keep_freed_memory
from lightning_advknn.commands.train import main

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
