"""Whether an attack has changed what it was only to ask, and putting that back."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_advknn.search import StoredRows

_COPIED = 2**28  # bytes of tensors that are copied; of more, checksums tell
_BLOCK = {"cpu": 2**20, "cuda": 2**26}  # bytes summed at once: what fits a cache, and what keeps a GPU busy
_ROUNDING = 2e-3  # of the largest answer: TF32's on a GPU; autocast's is larger
_NAMED = 5  # changes that an error lists

# The tables of every module: parameters, buffers, submodules and hooks.
_TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
_OWN_COUNTS = {"queries"}  # what a victim itself counts
_Plain = bool | int | float | str | torch.dtype | torch.device | None

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

# Of large tensors, as the last attack left them: so each attack reads them once.
_checksums = WeakTensorKeyDictionary()


class _Kept(NamedTuple):
    """A parameter or buffer as it was."""

    tensor: Tensor
    memory: Tensor
    """Its memory: assigning to its ``data`` does not change this."""
    content: Tensor
    """A copy, or a checksum."""
    copied: bool
    requires_grad: bool


class _Part(NamedTuple):
    """A module without its submodules, as it was."""

    kind: type
    training: bool
    forward: Any
    """What runs instead of its class's forward, if anything does."""
    tables: dict[str, dict[Any, Any]]
    tensors: dict[str, _Kept]
    files: dict[str, tuple[StoredRows, tuple[int, ...]]]
    settings: dict[str, Any]


class Snapshot:
    """What modules compute with: tensors by content, modes, `requires_grad`, submodules, hooks and settings.

    Tensors are compared to the bit, however they were written. Up to 256 MiB of them are copied and can be
    put back; of larger ones, such as a bank's features, a checksum of every byte in its place is kept. Rows
    in a file have changed if the file has been written. Settings are attributes that are numbers, text or
    tensors.

    Args:
        modules: By name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._paths: dict[nn.Module, str] = {}
        for prefix, root in modules.items():
            for name, module in root.named_modules(prefix=prefix):
                self._paths.setdefault(module, name)
        self._room = _COPIED
        self._parts = {module: self._part(module) for module in self._paths}

    def changes(self) -> list[str]:
        """What is no longer as it was, but for settings, in words."""
        return [words for module, part in self._parts.items() for words in self._changes_of(module, part)]

    def settings_changes(self, ask: Callable[[], object]) -> list[str]:
        """Settings that are no longer as they were, in words.

        Args:
            ask: Asks the modules. What that changes again is a memory of their own, such as a count of calls,
                and no setting.
        """
        changed = [
            (module, name, before, _value(vars(module).get(name)))
            for module, part in self._parts.items()
            for name, before in part.settings.items()
            # An object instead of nothing is what a module makes at its first use, such as a bank's scan.
            if not _is_value(before, now := vars(module).get(name))
            and (before is not None or _is_setting(name, now))
        ]
        if changed:
            with suppress(Exception):  # of a target that an attack has broken
                ask()
        found = []
        for module, name, before, now in changed:
            if not _is_value(now, vars(module).get(name)):
                del self._parts[module].settings[name]
            elif isinstance(before, Tensor):
                found.append(f"`{self._name(module, name)}`")
            else:
                found.append(f"`{self._name(module, name)}` from {before!r} to {now!r}")
        return found

    def restore(self) -> list[str]:
        """Put all back that was kept whole.

        Returns:
            Names of what has changed and could not be put back.
        """
        lost = []
        for module, part in self._parts.items():
            if type(module) is not part.kind:
                module.__class__ = part.kind
            for name, table in part.tables.items():
                if _first_difference(table, vars(module)[name]):
                    vars(module)[name].clear()
                    vars(module)[name].update(table)
                    for shadowed in table:  # by an attribute, as `prune` and `weight_norm` set them
                        vars(module).pop(shadowed, None)
            module.training = part.training
            if part.forward is not None:
                vars(module)["forward"] = part.forward
            else:
                vars(module).pop("forward", None)
            for name, value in part.settings.items():
                if not _is_value(value, vars(module).get(name)):
                    vars(module)[name] = _value(value)
            lost += [
                self._name(module, name) for name, (file, stamp) in part.files.items() if file.stamp != stamp
            ]
            lost += [self._name(module, name) for name, kept in part.tensors.items() if not _put_back(kept)]
        return lost

    def _part(self, module: nn.Module) -> _Part:
        own = vars(module)
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        return _Part(
            kind=type(module),
            training=module.training,
            forward=own.get("forward"),
            tables={name: dict(own[name]) for name in _TABLES if isinstance(own.get(name), dict)},
            tensors={name: self._kept(tensor) for name, tensor in tensors if _has_content(tensor)},
            files={
                name: (value, value.stamp) for name, value in own.items() if isinstance(value, StoredRows)
            },
            settings={name: _value(value) for name, value in own.items() if _is_setting(name, value)},
        )

    def _kept(self, tensor: Tensor) -> _Kept:
        memory = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        copied = size <= self._room
        self._room -= size if copied else 0
        content = memory.clone() if copied else _last_checksum(tensor)
        return _Kept(tensor, memory, content, copied, tensor.requires_grad)

    def _changes_of(self, module: nn.Module, part: _Part) -> Iterator[str]:
        path = f"`{self._paths[module] or type(module).__name__}`"
        if type(module) is not part.kind:
            yield f"{path} from a {part.kind.__name__} to a {type(module).__name__}"
        if module.training != part.training:
            yield f"{path} to {'training' if module.training else 'evaluation'} mode"
        if vars(module).get("forward") is not part.forward:
            yield f"the forward pass of {path}"
        for table, before in part.tables.items():
            if differs := _first_difference(before, vars(module)[table]):
                hooks = "hook" in table
                yield f"the hooks of {path}" if hooks else f"`{self._name(module, differs)}` for another"
        for name, kept in part.tensors.items():
            if not _is_as_kept(kept):
                yield f"`{self._name(module, name)}`{_gap(kept)}"
            if kept.tensor.requires_grad != kept.requires_grad:
                yield f"`{self._name(module, name)}` to requires_grad={kept.tensor.requires_grad}"
        for name, (file, stamp) in part.files.items():
            if file.stamp != stamp:
                yield f"the file of `{self._name(module, name)}`"

    def _name(self, module: nn.Module, name: str) -> str:
        return f"{path}.{name}" if (path := self._paths[module]) else name


@contextmanager
def unchanged(attack: str, things: Iterable[Any], ask: Callable[[], list[Tensor]]) -> Iterator[None]:
    """Watch over an attack: what it attacks, what that answers and torch's global settings are the same after it as before.

    What has changed is put back, also if the attack fails; but not what lies outside of modules and these
    settings, such as a class's forward pass or autocast: that shows in the answers alone.

    Args:
        attack: Its name.
        things: Modules, and functions that hold some: bound to arguments, as methods, in closures, or as
            attributes.
        ask: Gives what the target answers about some images.

    Raises:
        ValueError: If something has changed.
    """
    modules = _modules_in(things)
    # In training mode a network counts what it is asked.
    before = (
        [] if any(part.training for root in modules.values() for part in root.modules()) else _answers(ask)
    )
    if before and _gap_of_answers(before, _answers(ask)):  # it answers by chance
        before = []
    snapshot = Snapshot(modules)
    settings = {name: get() for name, (get, _) in _GLOBALS.items()}
    try:
        yield
    except BaseException as error:
        _put(settings)
        if (lost := snapshot.restore()) and isinstance(error, Exception):
            raise ValueError(f"{error} It also changed {_list(lost)}: make the victim again.") from error
        raise
    changes = [f"what `{name}` sets" for name, (get, _) in _GLOBALS.items() if get() != settings[name]]
    _put(settings)
    changes = [*snapshot.changes(), *snapshot.settings_changes(ask), *changes]
    if changes:
        lost = snapshot.restore()
        remedy = f", but for {_list(lost)}: make the victim again" if lost else ""
        raise ValueError(
            f"Expected attack {attack} to leave what it attacks as it was, but it changed {_list(changes)}. Nothing that it made"
            f" is kept, and what it changed has been put back{remedy}. Let it change a copy (`copy.deepcopy`)."
        )
    if before and (gap := _gap_of_answers(before, _answers(ask))):
        raise ValueError(
            f"Expected attack {attack} to leave what it attacks as it was, but after it the same images get other answers, by up"
            f" to {gap:.3g}. It has changed something outside of its target, such as a class's `forward`, a function of torch or"
            " autocast. Nothing that it made is kept, but in this process that cannot be put back: start another, and let it"
            " restore what it changes."
        )


def _answers(ask: Callable[[], list[Tensor]]) -> list[Tensor]:
    """None of a target that fails."""
    with suppress(Exception):
        return [answer.detach().clone() for answer in ask()]
    return []


def _gap_of_answers(before: list[Tensor], now: list[Tensor]) -> float:
    """By how much answers differ; 0 where it is rounding, as of tensors that now lie otherwise in memory."""
    if len(before) != len(now) or not all(map(_alike, before, now)):
        return float("inf")
    gaps = [0.0]
    for old, new in zip(before, now, strict=True):
        if not _same(old, new):
            gap = (new.double() - old.double()).abs().nan_to_num(torch.inf).max().item()
            largest = old.double().abs().nan_to_num(0.0).max().item()
            gaps.append(gap if gap > _ROUNDING * largest else 0.0)
    return max(gaps)


def _put(settings: Mapping[str, Any]) -> None:
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
    for name, thing in todo:  # which grows meanwhile
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
    except ValueError:  # of a function that is still being made
        return []


def _is_setting(name: str, value: Any) -> bool:
    if name == "training" or name in _OWN_COUNTS:
        return False
    several = (
        isinstance(value, list | tuple) and len(value) <= 100 and all(isinstance(v, _Plain) for v in value)
    )
    return isinstance(value, _Plain) or several or (isinstance(value, Tensor) and _has_content(value))


def _value(setting: Any) -> Any:
    """A setting that does not change with what it was read from."""
    if isinstance(setting, Tensor):
        return setting.detach().clone()
    return list(setting) if type(setting) is list else setting


def _is_value(value: Any, setting: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(setting, Tensor):
        return _same(value, setting.detach())
    return type(value) is type(setting) and repr(value) == repr(setting)  # as NaN is not NaN


def _first_difference(before: Mapping[Any, Any], now: Mapping[Any, Any]) -> str:
    """The first name that means another thing, or stands in another place; "" if none does."""
    differing = (key for key in {**before, **now} if before.get(key) is not now.get(key))
    moved = (one for one, other in zip(before, now, strict=False) if one != other)
    return str(next(differing, next(moved, "")))


def _has_content(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and not tensor.is_meta and tensor.layout == torch.strided


def _same(left: Tensor, right: Tensor) -> bool:
    if not _alike(left, right):
        return False
    return torch.equal(left, right) or bool(((left == right) | ((left != left) & (right != right))).all())


def _alike(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device)


def _is_as_kept(kept: _Kept) -> bool:
    now = kept.tensor.detach()
    if kept.copied:
        return _same(now, kept.content)
    if not _alike(now, kept.memory):
        return False
    total = _checksum(now)
    _checksums[kept.tensor] = _version(now), total
    return torch.equal(total, kept.content)


def _gap(kept: _Kept) -> str:
    """How much a tensor has changed, in words."""
    now = kept.tensor.detach()
    if not _alike(now, kept.memory):
        return f" to {now.dtype} of shape {tuple(now.shape)} on {now.device}"
    if not kept.copied:
        return ""
    gap = (now.double() - kept.content.double()).abs().nan_to_num(torch.inf).max().item()
    return f" by up to {gap:.3g}"


def _put_back(kept: _Kept) -> bool:
    """Whether a tensor is again what it was."""
    if not _is_as_kept(kept):
        with torch.inference_mode():  # which may also write tensors that were made in it
            if kept.copied and not _same(kept.memory, kept.content):
                kept.memory.copy_(kept.content)
        kept.tensor.data = kept.memory
    if kept.tensor.requires_grad != kept.requires_grad:
        kept.tensor.requires_grad_(kept.requires_grad)
    return kept.copied or _is_as_kept(kept)


def _last_checksum(tensor: Tensor) -> Tensor:
    """That after the last attack, unless the tensor is known to have changed since."""
    version, total = _checksums.get(tensor, (None, None))  # type: ignore[no-untyped-call]
    return total if isinstance(total, Tensor) and version == _version(tensor) else _checksum(tensor.detach())


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """One int64 a block of bytes: its words, each times an odd number of its place, added up."""
    size = _BLOCK.get(tensor.device.type, _BLOCK["cpu"])
    weights = torch.arange(size // 8, device=tensor.device) * -7046029254386353131 | 1  # 2^64 / golden ratio
    sums = []
    for block in torch.split(tensor.reshape(-1), size // tensor.element_size()):
        octets = (block.clone() if block.data_ptr() % 8 else block).view(torch.uint8)
        if missing := -len(octets) % 8:
            octets = torch.cat([octets, octets.new_zeros(missing)])
        words = octets.view(torch.int64)
        sums.append((words * weights[: len(words)]).sum())
    return torch.stack(sums) if sums else weights[:0]
