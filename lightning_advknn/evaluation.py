"""From images to one row per sample: the only source of every number.

The victim is asked about an image, the image is attacked, and the victim is asked again about the stored
result. `make_rows` puts both verdicts side by side, and `summarize` reduces rows to accuracies, distortions
and credibilities. The callback, the commands, tables, figures and W&B all read these.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_advknn import functional
from lightning_advknn.attacks import Attack, LogitsFn, Target
from lightning_advknn.attacks.parts.arguments import returned_images
from lightning_advknn.attacks.parts.precision import prepared
from lightning_advknn.attacks.parts.threads import can_share, copy_for_thread, in_threads
from lightning_advknn.choices import Convention, GradientPrecision
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data.given import Images, Labels, as_images, as_labels
from lightning_advknn.functional import check_images, check_labels, float32_arithmetic
from lightning_advknn.integrity import unchanged
from lightning_advknn.ranks import is_lost

Rows = dict[str, Tensor]
"""Columns by name, one row per image: ``id``, ``label``, ``l2`` and ``linf``. With the suffixes ``_before``
and ``_after`` (the attack): the predictions ``dnn``, ``knn``, ``dknn`` and ``surrogate``, the votes ``votes``
``(n, L, C)``, ``knn_credibility`` and ``dknn_credibility``."""

CPU_BATCH, GPU_BATCH = 64, 1000
"""Images attacked at once: they fit a CPU's caches, and keep a GPU busy."""

Watch = Callable[[int, Target, Tensor, Tensor], AbstractContextManager[None]]
"""Looks at an attack on a batch: gets its number, what is attacked, images ``(B, ...)`` and labels ``(B,)``."""


class Verdicts(NamedTuple):
    """Predictions, votes and credibilities of n images."""

    dnn: Tensor | None
    """Class of the network, int64 ``(n,)``; None if it has no head."""
    knn: Tensor
    """Class of the kNN on one layer, int64 ``(n,)``."""
    dknn: Tensor
    """Class of DkNN (Eq. 4), int64 ``(n,)``."""
    votes: Tensor
    """int64 ``(n, L, C)``."""
    knn_credibility: Tensor
    """Eq. (5) on that layer alone, float64 ``(n,)``."""
    dknn_credibility: Tensor
    """Eq. (5), float64 ``(n,)``."""


@torch.no_grad()
@float32_arithmetic()
def observe(
    dknn: DkNN, images: Tensor, batch_size: int = 500, rows: range | None = None
) -> tuple[Tensor | None, Tensor]:
    """Run the network and the neighbour search, the slow part.

    Args:
        dknn: The victim.
        images: float32 ``(n, channels, H, W)`` in [0, 1].
        batch_size: Images in a forward pass; results do not depend on it.
        rows: Positions of consecutive images to query; None for all. The other images only fill up the
            forward passes, so that the arithmetic is the same as if all were queried.

    Returns:
        Classes of the network, int64 ``(n,)``, or None if its output is not ``(n, C)``; and votes, int64
        ``(n, L, C)``. If `rows` are given, both are of these images.

    Raises:
        NotFittedError: Before `fit`.
        ValueError: If an image is out of range or has another shape than the training images, or a feature is
            not finite.
    """
    dknn.check_images(images)
    asked = range(len(images)) if rows is None else rows
    classes: list[Tensor] = []

    def features() -> Iterator[dict[str, Tensor]]:
        for start in range(asked.start - asked.start % batch_size, max(asked.stop, 1), batch_size):
            logits, found = dknn.network.logits_and_features(images[start : start + batch_size])
            some = slice(max(asked.start - start, 0), asked.stop - start)
            if isinstance(logits, Tensor) and logits.shape[1:] == (dknn.num_classes,):
                classes.append(logits[some].argmax(1))
            yield {layer: each[some] for layer, each in found.items()}

    votes = dknn.votes_in_turn(features())
    return torch.cat(classes) if classes else None, votes


def decide(
    dnn: Tensor | None, votes: Tensor, layer: int, calibration_votes: Tensor, convention: Convention
) -> Verdicts:
    """Make verdicts from the results of `observe`.

    Args:
        dnn: int64 ``(n,)``; None if the network has no head.
        votes: int64 ``(n, L, C)``.
        layer: Position of the kNN's layer among the L layers.
        calibration_votes: int64 ``(N, L)``, as in `DkNN`.
        convention: How credibility counts ties.
    """
    one = votes[:, layer : layer + 1]
    return Verdicts(
        dnn,
        functional.dknn_prediction(one),
        functional.dknn_prediction(votes),
        votes,
        functional.credibility(one, calibration_votes[:, layer], convention),
        functional.credibility(votes, calibration_votes.sum(1), convention),
    )


def judge(victim: DkNN, layer: str, images: Tensor, batch_size: int = 500) -> Verdicts:
    """Query a calibrated victim, and the kNN on one of its layers: `observe`, then `decide`.

    Raises:
        ValueError: If the victim does not have the layer or is not calibrated, or `observe` refuses the
            images.
    """
    if layer not in victim.layers:
        raise ValueError(f"Expected `layer` to be one of {list(victim.layers)}, but got {layer!r}.")
    dnn, votes = observe(victim, images, batch_size)
    return decide(dnn, votes, victim.layers.index(layer), victim.calibration_votes, victim.convention)


@float32_arithmetic()
def perturb(
    attack: Attack,
    target: Target,
    images: Tensor,
    labels: Tensor,
    precision: GradientPrecision = "float32",
    name: str | None = None,
    watch: Watch | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Run an attack and check what it returns and what it leaves behind.

    On logits, all batches have one size: the last one is filled up, so the arithmetic for an image does not
    depend on the number of images. On a CPU, batches of an attack that allows it (`attacks.attack`) are
    attacked in as many threads as torch has, each of which computes alone. On a victim, the attack gets all
    images at once and makes its own batches, because neighbour search and gradients need different sizes.
    Meanwhile modules are frozen and in evaluation mode. The attack gets copies of images and labels.

    Args:
        attack: The attack with its settings bound.
        target: A logits function or a victim.
        images: float32 ``(n, channels, H, W)`` in [0, 1].
        labels: Classes to move away from, int64 ``(n,)``.
        precision: How gradients are computed.
        name: Name of the attack in errors; None for its function's name.
        watch: Looks at the attack on each batch; None for nothing.
        batch_size: Images in a batch on logits; None for 64 on a CPU and 1,000 on a GPU. A GPU rounds some
            networks in another way at another size.

    Returns:
        Adversarial images, float32, same shape, as they are stored and judged.

    Raises:
        ValueError: If an image or a label is out of range, or if the attack fails, returns anything but
            floating-point images of the same shape in [0, 1], or changes its target, another module that it
            holds or torch's global settings. Changes are undone.
    """
    name = repr(name or getattr(getattr(attack, "func", attack), "__name__", type(attack).__name__))
    check_images(images)
    victim = target if isinstance(target, DkNN) else None
    check_labels(labels, len(images), victim.num_classes if victim else None)
    n, size = len(images), batch_size or (GPU_BATCH if images.is_cuda else CPU_BATCH)
    if victim:
        size = max(n, 1)
    # Positions in all batches. The last batch is filled up with the first images.
    rows = torch.arange(-(-n // size) * size, device=images.device) % max(n, 1)

    @torch.no_grad()
    def ask() -> list[Tensor]:
        answers: list[Tensor] = []
        for few in (1, 2):
            if victim is None:
                answers.append(target(images[:few].clone()))
            else:
                logits, features = victim.network.logits_and_features(images[:few].clone())
                answers += [*features.values(), *([logits] if isinstance(logits, Tensor) else [])]
        return answers

    def run(ready: Target, numbered: tuple[int, Tensor]) -> Tensor:
        number, batch = numbered
        part, own = images[batch], labels[batch]  # copies
        with _errors_of(name), watch(number, ready, part, own) if watch else nullcontext():
            returned = attack(ready, part.clone(), own.clone())
        return returned_images(f"attack {name}", returned, part)

    batches = torch.split(rows, size)
    share = images.device.type == "cpu" and can_share(attack, target)
    threads = min(torch.get_num_threads(), len(batches)) if share else 1
    with ExitStack() as stack:
        targets = [target, *(copy_for_thread(cast(nn.Module, target)) for _ in range(threads - 1))]
        ready = [stack.enter_context(prepared(each, precision)) for each in targets]
        stack.enter_context(unchanged(name, (target, attack), ask))
        if share:
            parts = in_threads(run, enumerate(batches), ready)
        else:
            parts = [run(ready[0], numbered) for numbered in enumerate(batches)]
    return torch.cat(parts)[:n]


@contextmanager
def _errors_of(attack: str) -> Iterator[None]:
    """Name the attack in its errors, except in those that the machine causes."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except SystemExit as error:
        if error.code == 143:  # the process was asked to terminate
            raise
        raise ValueError(f"Attack {attack} failed: it called sys.exit({error.code!r}).") from error
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost(error):
            raise
        raise ValueError(f"Attack {attack} failed: {type(error).__name__}: {error}") from error


@torch.no_grad()
@float32_arithmetic()
def predict(logits_fn: LogitsFn, images: Tensor, batch_size: int = 500) -> Tensor:
    """Predict the class with the highest logit, int64 ``(n,)``."""
    return torch.cat([logits_fn(part).argmax(1) for part in torch.split(images, batch_size)])


def make_rows(
    ids: Tensor,
    labels: Tensor,
    images: Tensor,
    adversarial: Tensor,
    before: Verdicts,
    after: Verdicts,
    surrogate: tuple[Tensor, Tensor] | None = None,
) -> Rows:
    """Put verdicts before and after an attack side by side.

    Args:
        ids: Image ids, int64 ``(n,)``.
        labels: True classes, int64 ``(n,)``.
        images: Clean images, float32 ``(n, ...)``.
        adversarial: Same shape.
        before: Verdicts on `images`.
        after: Verdicts on `adversarial`.
        surrogate: Classes of the attacked surrogate before and after, int64 ``(n,)`` each; None for none.

    Raises:
        ValueError: If a label is not a class, or the numbers of images, ids and verdicts differ.
    """
    check_labels(labels, len(images), before.votes.shape[-1])
    sizes = {len(each) for each in (images, ids, before.votes, after.votes)}
    if len(sizes) > 1:
        raise ValueError(f"Expected as many images as ids and verdicts, but got {sorted(sizes)}.")
    rows: Rows = {
        "id": ids,
        "label": labels,
        "l2": functional.l2_distortion(images, adversarial),
        "linf": functional.linf_distortion(images, adversarial),
    }
    for place, (when, verdicts) in enumerate((("before", before), ("after", after))):
        rows |= {f"{name}_{when}": each for name, each in verdicts._asdict().items() if each is not None}
        if surrogate is not None:
            rows[f"surrogate_{when}"] = surrogate[place]
    return rows


@torch.no_grad()
@float32_arithmetic()
def imitation(surrogate: LogitsFn, images: Tensor, votes: Tensor, batch_size: int = 500) -> Rows:
    """Measure how well a surrogate imitates the kNN on each image.

    Args:
        surrogate: Gives the logits of q(x).
        images: float32 ``(n, channels, H, W)`` in [0, 1].
        votes: Votes of the kNN on the surrogate's layer for the same images, int64 ``(n, C)``.
        batch_size: Images in a forward pass.

    Returns:
        ``agreement``: whether both predict the same class, bool ``(n,)``; ``kl``: the divergence of q(x) from
        the vote distribution (Eq. 15), ``(n,)``.
    """
    logits = torch.cat([surrogate(part) for part in torch.split(images, batch_size)])
    return {
        "agreement": logits.argmax(1) == functional.knn_prediction(votes),
        "kl": functional.consistency_loss(logits, functional.vote_distribution(votes)),
    }


def average(columns: Rows) -> Mapping[str, float]:
    """Average each column over all ranks."""
    means = {}
    for name, column in columns.items():
        mean = MeanMetric().set_dtype(torch.float64).to(column.device)
        mean.update(column.double())
        means[name] = mean.compute().item()
    return means


def on_cpu(rows: Rows) -> Rows:
    """Copy rows to the CPU, all columns at once, as a GPU is waited for in each copy."""
    if not any(column.is_cuda for column in rows.values()):
        return rows
    # Wide dtypes first, as a column of bytes may only start where its dtype may.
    columns = dict(sorted(rows.items(), key=lambda item: -item[1].element_size()))
    packed = torch.cat([column.contiguous().view(-1).view(torch.uint8) for column in columns.values()]).cpu()
    parts = torch.split(packed, [column.nbytes for column in columns.values()])
    copied = {
        name: part.view(column.dtype).view(column.shape)
        for part, (name, column) in zip(parts, columns.items(), strict=True)
    }
    return {name: copied[name] for name in rows}


def concatenate(parts: list[Rows]) -> Rows:
    """Join rows that have the same columns."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _AttackMetrics(Metric):
    """The paper's metrics of rows, over batches and ranks.

    `compute` returns float64 scalars. ``knn_acc`` and ``dknn_acc``, and ``dnn_acc`` and ``surrogate_acc`` if
    the rows have these columns, are accuracies in [0, 1] after the attack. ``l2`` is the mean true L2 over
    all images. ``<victim>_l2_success`` is the mean over the successes: the images that the victim
    misclassifies after the attack (success = 1 - accuracy, as in the paper; NaN if there are none).
    ``<victim>_credibility`` and ``<victim>_credibility_success`` are means of the same kinds. ``linf`` is the
    largest Linf, ``n`` the number of images.
    """

    full_state_update = False
    n: Tensor
    l2: Tensor
    linf: Tensor
    victims = ("dnn", "knn", "dknn", "surrogate")

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("n", zero.clone(), dist_reduce_fx="sum")
        self.add_state("l2", zero.clone(), dist_reduce_fx="sum")
        self.add_state("linf", zero.clone(), dist_reduce_fx="max")
        for victim in self.victims:
            for name in ("seen", "correct", "l2_success", "credibility", "credibility_success"):
                self.add_state(f"{victim}_{name}", zero.clone(), dist_reduce_fx="sum")

    def update(self, rows: Rows) -> None:
        """Add rows."""
        self.n += len(rows["id"])
        self.l2 += rows["l2"].sum()
        if len(rows["id"]):
            self.linf = torch.maximum(self.linf, rows["linf"].max())
        for victim in self.victims:
            if f"{victim}_after" not in rows:
                continue
            correct = rows[f"{victim}_after"] == rows["label"]
            self._add(victim, "seen", torch.ones_like(correct))
            self._add(victim, "correct", correct)
            self._add(victim, "l2_success", rows["l2"][~correct])
            credibility = rows.get(f"{victim}_credibility_after")
            if credibility is not None:
                self._add(victim, "credibility", credibility)
                self._add(victim, "credibility_success", credibility[~correct])

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name."""
        result = {"n": self.n, "l2": self.l2 / self.n, "linf": self.linf}
        for victim in self.victims:
            seen, correct = getattr(self, f"{victim}_seen"), getattr(self, f"{victim}_correct")
            if not seen:
                continue
            result[f"{victim}_acc"] = correct / seen
            wrong = seen - correct
            result[f"{victim}_l2_success"] = getattr(self, f"{victim}_l2_success") / wrong
            if victim in ("knn", "dknn"):
                result[f"{victim}_credibility"] = getattr(self, f"{victim}_credibility") / seen
                result[f"{victim}_credibility_success"] = (
                    getattr(self, f"{victim}_credibility_success") / wrong
                )
        return result

    def _add(self, victim: str, name: str, values: Tensor) -> None:
        state = f"{victim}_{name}"
        setattr(self, state, getattr(self, state) + values.sum(dtype=torch.float64))


def summarize(rows: Rows, over_ranks: bool = False) -> Mapping[str, float]:
    """Reduce rows to metrics by name, as `_AttackMetrics.compute` describes them.

    Args:
        rows: Rows of this process.
        over_ranks: Whether to include the rows of all ranks of the process group; then each rank must call
            this.
    """
    metrics = _AttackMetrics(sync_on_compute=over_ranks).to(rows["id"].device)
    metrics.update(rows)
    return {name: value.item() for name, value in metrics.compute().items()}


@dataclass(frozen=True)
class Judged:
    """Errors and credibilities of one victim on n images.

    Args:
        wrong: Whether it misclassifies the image, bool ``(n,)``.
        credibility: Eq. (5), float64 ``(n,)``; None for the network, which has none.
    """

    wrong: Tensor
    credibility: Tensor | None


def judge_rows(
    rows: Rows, layers: Sequence[str], calibration_votes: Tensor, convention: Convention
) -> dict[str, Judged]:
    """Judge all victims after an attack by the votes in the rows, without a query.

    Args:
        rows: See `Rows`.
        layers: Names of the layers of the votes.
        calibration_votes: int64 ``(N, L)``, as in `DkNN`.
        convention: How credibility counts ties.
    """
    votes, labels = rows["votes_after"], rows["label"]
    voters = {f"knn/{layer}": [position] for position, layer in enumerate(layers)}
    voters["dknn"] = list(range(len(layers)))
    found = {"dnn": Judged(rows["dnn_after"] != labels, None)} if "dnn_after" in rows else {}
    for victim, positions in voters.items():
        own = votes[:, positions]
        found[victim] = Judged(
            functional.dknn_prediction(own) != labels,
            functional.credibility(own, calibration_votes[:, positions].sum(1), convention),
        )
    return found


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`; `print` shows a summary.

    Args:
        rows: One row per image, see `Rows`; on the CPU.
        layer: Layer of the kNN in the columns ``knn_*``.
        attacked: Whether there was an attack. If not, the columns ``*_after`` repeat ``*_before``.
        note: What credibility is measured against, as a sentence.
    """

    rows: Rows
    layer: str
    attacked: bool
    note: str

    @property
    def metrics(self) -> dict[str, Mapping[str, float]]:
        """Metrics of `summarize`, ``before`` the attack and ``after`` it."""
        clean = {
            name: self.rows[f"{name.removesuffix('_after')}_before"] if name.endswith("_after") else column
            for name, column in self.rows.items()
        }
        unchanged = dict.fromkeys(("l2", "linf"), torch.zeros_like(self.rows["l2"]))
        return {"before": summarize(clean | unchanged), "after": summarize(self.rows)}

    def __str__(self) -> str:
        rows, metrics = self.rows, self.metrics
        shown = metrics if self.attacked else {"before": metrics["before"]}
        several = rows["votes_after"].shape[1] > 1
        names = {"dnn_acc": "network", "knn_acc": f"kNN on {self.layer}"}
        names |= {"dknn_acc": "DkNN"} if several else {}
        names |= {"surrogate_acc": "surrogate"}
        width = max(22, *map(len, names.values()))
        lines = [f"{len(rows['id'])} images".ljust(width) + "".join(f"{when:>9}" for when in shown)]
        for key, name in names.items():
            if key in metrics["before"]:
                lines.append(name.ljust(width) + "".join(f"{each[key]:>9.2%}" for each in shown.values()))
        credibility = "".join(f"{each['dknn_credibility']:9.3f}" for each in shown.values())
        lines.append("mean credibility".ljust(width) + credibility)
        if self.attacked:
            wrong = rows["dknn_after"] != rows["label"]
            who = "DkNN" if several else "the kNN"
            near = _mean_and_median(rows["l2"][wrong])
            lines.append(f"true L2: {_mean_and_median(rows['l2'])} over all images;")
            lines.append(f"  {near} over the {wrong.sum()} that {who} gets wrong after the attack")
            lines.append(f"largest Linf: {metrics['after']['linf']:.3f}")
        return "\n".join([*lines, self.note])


def evaluate(
    victim: DkNN,
    images: Images,
    labels: Labels,
    adversarial: Images | None = None,
    *,
    surrogate: LogitsFn | None = None,
    batch_size: int = 500,
) -> Evaluation:
    """Evaluate a victim on images and on their adversarials as stored, in float32.

    The kNN in the results is the one on the victim's last layer.

    Args:
        victim: A fitted victim. Credibility is measured against its `reference_votes`.
        images: ``(n, ...)`` in [0, 1].
        labels: True classes, integers ``(n,)``.
        adversarial: Adversarial images, same shape; None for no attack.
        surrogate: Surrogate whose predictions are evaluated too; None for none.
        batch_size: Images in a forward pass; results do not depend on it.

    Raises:
        NotFittedError: If the victim is not fitted. It is scikit-learn's, and a ValueError.
        ValueError: If an image is out of range or has another shape than the training images, or the numbers
            of images, labels and adversarials differ.
    """
    device = victim.calibration_votes.device
    clean = as_images(images).to(device)
    known = as_labels(labels, len(clean)).to(device)
    stored = clean if adversarial is None else as_images(adversarial).to(device)
    votes, layer = victim.reference_votes(), len(victim.layers) - 1

    def verdicts(asked: Tensor) -> Verdicts:
        return decide(*observe(victim, asked, batch_size), layer, votes, victim.convention)

    before = verdicts(clean)
    after = before if adversarial is None else verdicts(stored)
    ids = torch.arange(len(clean), device=device)
    classes = None if surrogate is None else (predict(surrogate, clean), predict(surrogate, stored))
    rows = make_rows(ids, known, clean, stored, before, after, classes)
    note = f"Credibility against the votes of {len(votes)} calibration images."
    if not len(victim.calibration_votes):
        note = f"Credibility against leave-one-out votes of {len(votes)} training images;"
        note += " `calibrate` takes held-out ones."
    return Evaluation(on_cpu(rows), victim.layers[layer], adversarial is not None, note)


def _mean_and_median(values: Tensor) -> str:
    if not len(values):
        return "mean -, median -"
    return f"mean {values.mean():.3f}, median {values.quantile(0.5):.3f}"
