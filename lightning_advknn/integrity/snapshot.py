"""Modules as they were: what has changed since, and how to restore it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_advknn.integrity.tensors import KeptTensor, has_content, same
from lightning_advknn.search import StoredRows

_COPIED = 2**28  # bytes of tensors to copy; larger ones get checksums

# The dicts of every module: parameters, buffers, submodules and hooks.
_TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
_OWN_COUNTS = {"queries"}  # counted by victims themselves
_Plain = bool | int | float | str | torch.dtype | torch.device | None


class _ModuleState(NamedTuple):
    """A module without its submodules, as it was."""

    kind: type
    training: bool
    forward: Any
    """The attribute that overrides its class's forward, if there is one."""
    tables: dict[str, dict[Any, Any]]
    tensors: dict[str, KeptTensor]
    files: dict[str, tuple[StoredRows, tuple[int, ...]]]
    settings: dict[str, Any]


class Snapshot:
    """The state of modules: tensors, modes, `requires_grad`, submodules, hooks and settings.

    Tensors are compared bit for bit. Up to 256 MiB of them are copied and can be restored. Larger ones, such
    as a bank's features, get a checksum of all bytes. Rows in a file have changed if the file has been
    written. Settings are attributes that are numbers, strings or tensors.

    Args:
        modules: Modules by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._paths: dict[nn.Module, str] = {}
        for prefix, root in modules.items():
            for name, module in root.named_modules(prefix=prefix):
                self._paths.setdefault(module, name)
        self._room = _COPIED
        self._states = {module: self._state(module) for module in self._paths}

    def changes(self) -> list[str]:
        """Describe each change since then, except of settings."""
        return [words for module, state in self._states.items() for words in self._changes_of(module, state)]

    def settings_changes(self, ask: Callable[[], object]) -> list[str]:
        """Describe each change of a setting since then.

        Args:
            ask: Runs the modules. Attributes that this changes again, such as counters of calls, are not
                settings.
        """
        changed = [
            (module, name, before, _value(vars(module).get(name)))
            for module, state in self._states.items()
            for name, before in state.settings.items()
            # An attribute of None may be made at a module's first use, such as a bank's scan.
            if not _is_value(before, now := vars(module).get(name))
            and (before is not None or _is_setting(name, now))
        ]
        if changed:
            with suppress(Exception):  # an attack may have broken its target
                ask()
        found = []
        for module, name, before, now in changed:
            if not _is_value(now, vars(module).get(name)):
                del self._states[module].settings[name]
            elif isinstance(before, Tensor):
                found.append(f"`{self._name(module, name)}`")
            else:
                found.append(f"`{self._name(module, name)}` from {before!r} to {now!r}")
        return found

    def restore(self) -> list[str]:
        """Restore everything that was copied.

        Returns:
            Names of tensors and files that have changed and could not be restored.
        """
        lost = []
        for module, state in self._states.items():
            if type(module) is not state.kind:
                module.__class__ = state.kind
            for name, table in state.tables.items():
                if _first_difference(table, vars(module)[name]):
                    vars(module)[name].clear()
                    vars(module)[name].update(table)
                    for shadowed in table:  # by an attribute, as `prune` and `weight_norm` set them
                        vars(module).pop(shadowed, None)
            module.training = state.training
            if state.forward is not None:
                vars(module)["forward"] = state.forward
            else:
                vars(module).pop("forward", None)
            for name, value in state.settings.items():
                if not _is_value(value, vars(module).get(name)):
                    vars(module)[name] = _value(value)
            lost += [
                self._name(module, name) for name, (file, stamp) in state.files.items() if file.stamp != stamp
            ]
            lost += [self._name(module, name) for name, kept in state.tensors.items() if not kept.restore()]
        return lost

    def _state(self, module: nn.Module) -> _ModuleState:
        own = vars(module)
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        return _ModuleState(
            kind=type(module),
            training=module.training,
            forward=own.get("forward"),
            tables={name: dict(own[name]) for name in _TABLES if isinstance(own.get(name), dict)},
            tensors={name: self._keep(tensor) for name, tensor in tensors if has_content(tensor)},
            files={
                name: (value, value.stamp) for name, value in own.items() if isinstance(value, StoredRows)
            },
            settings={name: _value(value) for name, value in own.items() if _is_setting(name, value)},
        )

    def _keep(self, tensor: Tensor) -> KeptTensor:
        size = tensor.numel() * tensor.element_size()
        copied = size <= self._room
        self._room -= size if copied else 0
        return KeptTensor.keep(tensor, copied)

    def _changes_of(self, module: nn.Module, state: _ModuleState) -> Iterator[str]:
        path = f"`{self._paths[module] or type(module).__name__}`"
        if type(module) is not state.kind:
            yield f"{path} from a {state.kind.__name__} to a {type(module).__name__}"
        if module.training != state.training:
            yield f"{path} to {'training' if module.training else 'evaluation'} mode"
        if vars(module).get("forward") is not state.forward:
            yield f"the forward pass of {path}"
        for table, before in state.tables.items():
            if differs := _first_difference(before, vars(module)[table]):
                hooks = "hook" in table
                yield f"the hooks of {path}" if hooks else f"`{self._name(module, differs)}` for another"
        for name, kept in state.tensors.items():
            if not kept.is_unchanged():
                yield f"`{self._name(module, name)}`{kept.difference()}"
            if kept.tensor.requires_grad != kept.requires_grad:
                yield f"`{self._name(module, name)}` to requires_grad={kept.tensor.requires_grad}"
        for name, (file, stamp) in state.files.items():
            if file.stamp != stamp:
                yield f"the file of `{self._name(module, name)}`"

    def _name(self, module: nn.Module, name: str) -> str:
        return f"{path}.{name}" if (path := self._paths[module]) else name


def _is_setting(name: str, value: Any) -> bool:
    if name == "training" or name in _OWN_COUNTS:
        return False
    several = (
        isinstance(value, list | tuple) and len(value) <= 100 and all(isinstance(v, _Plain) for v in value)
    )
    return isinstance(value, _Plain) or several or (isinstance(value, Tensor) and has_content(value))


def _value(setting: Any) -> Any:
    """A copy of a setting, if it is a tensor or a list."""
    if isinstance(setting, Tensor):
        return setting.detach().clone()
    return list(setting) if type(setting) is list else setting


def _is_value(value: Any, setting: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(setting, Tensor):
        return same(value, setting.detach())
    return type(value) is type(setting) and repr(value) == repr(setting)  # `repr`, so that NaN equals NaN


def _first_difference(before: Mapping[Any, Any], now: Mapping[Any, Any]) -> str:
    """The first key whose value or place differs; "" if none does."""
    differing = (key for key in {**before, **now} if before.get(key) is not now.get(key))
    moved = (one for one, other in zip(before, now, strict=False) if one != other)
    return str(next(differing, next(moved, "")))
