"""Watch over an attack: its target and torch's global settings must be the same afterwards."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_advknn.integrity.snapshot import Snapshot
from lightning_advknn.integrity.tensors import alike, same

_ROUNDING = 2e-3  # relative to the largest answer: enough for TF32, but not for autocast
_NAMED = 5  # changes that an error lists

_GLOBALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_default_device": (torch.get_default_device, torch.set_default_device),
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.set_float32_matmul_precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}


@contextmanager
def unchanged(attack: str, things: Iterable[Any], ask: Callable[[], list[Tensor]]) -> Iterator[None]:
    """Raise an error if an attack changes its target or torch's global settings, and undo the change.

    Changes are also undone if the attack fails. Changes outside of modules and these settings, such as a
    class's forward or autocast, cannot be undone; they are detected by the target's answers.

    Args:
        attack: Name of the attack.
        things: Modules, and functions that hold modules: as bound arguments or attributes, in closures, or as
            the object of a method.
        ask: Returns the target's answers for some images.

    Raises:
        ValueError: If something has changed.
    """
    modules = _modules_in(things)
    # In training mode, asking would change a network's statistics.
    training = any(module.training for root in modules.values() for module in root.modules())
    before = [] if training else _answers(ask)
    if before and _gap_of_answers(before, _answers(ask)):  # the answers are random
        before = []
    snapshot = Snapshot(modules)
    settings = {name: get() for name, (get, _) in _GLOBALS.items()}
    try:
        yield
    except BaseException as error:
        _restore(settings)
        if (lost := snapshot.restore()) and isinstance(error, Exception):
            raise ValueError(f"{error} It also changed {_list(lost)}: make the victim again.") from error
        raise
    changes = [f"what `{name}` sets" for name, (get, _) in _GLOBALS.items() if get() != settings[name]]
    _restore(settings)
    changes = [*snapshot.changes(), *snapshot.settings_changes(ask), *changes]
    if changes:
        lost = snapshot.restore()
        remedy = f", but for {_list(lost)}: make the victim again" if lost else ""
        raise ValueError(
            f"Expected attack {attack} to leave its target unchanged, but it changed {_list(changes)}."
            f" Nothing that it made is kept, and the changes have been undone{remedy}. Let it change a copy"
            " (`copy.deepcopy`)."
        )
    if before and (gap := _gap_of_answers(before, _answers(ask))):
        raise ValueError(
            f"Expected attack {attack} to leave its target unchanged, but after it the same images get other"
            f" answers, by up to {gap:.3g}. It has changed something outside of its target, such as a class's"
            " `forward`, a function of torch or autocast. Nothing that it made is kept. Start another"
            " process, as this cannot be undone, and let the attack restore what it changes."
        )


def _answers(ask: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The target's answers; empty if it fails."""
    with suppress(Exception):
        return [answer.detach().clone() for answer in ask()]
    return []


def _gap_of_answers(before: list[Tensor], now: list[Tensor]) -> float:
    """The largest difference of answers; 0 if it is rounding, which depends on places in memory."""
    if len(before) != len(now) or not all(map(alike, before, now)):
        return float("inf")
    gaps = [0.0]
    for old, new in zip(before, now, strict=True):
        if not same(old, new):
            gap = (new.double() - old.double()).abs().nan_to_num(torch.inf).max().item()
            largest = old.double().abs().nan_to_num(0.0).max().item()
            gaps.append(gap if gap > _ROUNDING * largest else 0.0)
    return max(gaps)


def _restore(settings: Mapping[str, Any]) -> None:
    for name, (get, put) in _GLOBALS.items():
        if get() != settings[name]:
            put(settings[name])


def _list(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _modules_in(things: Iterable[Any]) -> dict[str, nn.Module]:
    """The modules that things are or hold, by name."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    todo = [("", thing) for thing in things]
    for name, thing in todo:  # grows in the loop
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            while name in found:
                name += "'"
            found[name] = thing
        elif isinstance(thing, partial):
            todo += [(name, thing.func), *((name, each) for each in thing.args), *thing.keywords.items()]
        elif isinstance(thing, MethodType):
            todo.append((name, thing.__self__))
        elif isinstance(thing, FunctionType):
            cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
            todo += [(free, held) for free, cell in cells for held in _content(cell)]
        elif callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__"):
            todo += [(name, each) for each in vars(thing).values()]
        elif isinstance(thing, list | tuple):
            todo += [(name, each) for each in thing]
        elif isinstance(thing, dict):
            todo += [(str(key), each) for key, each in thing.items()]
    return found


def _content(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # the cell is still empty
        return []
