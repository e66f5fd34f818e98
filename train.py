"""Train, validate or test a backbone or a surrogate: python train.py fit --config configs/mnist/backbone.yaml."""

from lightning_advknn.cli import AdvKNNCLI

if __name__ == "__main__":
    AdvKNNCLI()
