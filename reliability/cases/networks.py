"""Networks whose outputs depend on more than the image, and layers that run twice."""

from functools import partial
from pathlib import Path

from reliability.case import Case, Outcome, evaluate, small_experiment, train


def _refused(folder: Path, network: str, words: tuple[str, ...], layers: list[str] | None = None) -> Outcome:
    """The outcome where attack.py and train.py should refuse a network before they train."""
    small_experiment(
        folder,
        network={"init_args.function": f"reliability.networks.{network}"},
        backbone={} if layers is None else {"model.init_args.layers": layers},
        attack={"surrogates": {}},
    )
    outcome = evaluate(folder).refused(*words)
    trained = list(folder.glob("runs/cache/backbone/*"))
    fitted = train(folder, "fit", "--config=backbone.yaml")
    refused = all(word.lower() in fitted.err.lower() for word in words) and fitted.code != 0
    ended = list(folder.glob("runs/training/**/*.ckpt"))
    return outcome._replace(ok=outcome.ok and refused and not trained and not ended)


def _case(
    name: str,
    what: str,
    network: str,
    *words: str,
    layers: list[str] | None = None,
    expected: str = "Refused before training.",
) -> Case:
    return Case(name, what, expected, partial(_refused, network=network, words=words, layers=layers))


CASES = [
    _case(
        "06-random-network",
        "`F.dropout(x)` without `training=self.training`.",
        "DropoutAlways",
        "random numbers",
        "training=self.training",
    ),
    _case(
        "07-batch-stats",
        "Batch norm without running statistics.",
        "BatchStatistics",
        "batch",
        "['model.conv1.1']",
        "track_running_stats=True",
    ),
    _case(
        "integrity-training-batch-norm",
        "`F.batch_norm(..., training=True)`.",
        "TrainingBatchNorm",
        "changed `model.conv1.1.running_mean`",
        "training=self.training",
    ),
    _case(
        "integrity-mean-of-batch",
        "A network that divides by a mean over the batch.",
        "MeanOfBatch",
        "batch",
        "mean over the whole batch",
    ),
    _case("integrity-drop-path", "Stochastic depth of 5 % in evaluation mode.", "DropPath", "random numbers"),
    _case(
        "integrity-remembering",
        "A network whose outputs depend on earlier images.",
        "Remembering",
        "asked twice",
        "depends on what it was asked before",
    ),
    _case(
        "integrity-shared-relu",
        "One ReLU at two places, named in `layers`.",
        "SharedReLU",
        "'model.relu1': 2",
        "['normalize', 'model.conv1', 'model.conv2'",
        layers=["model.relu1", "model.fc"],
        expected="Refused; layers that run once are listed.",
    ),
]
