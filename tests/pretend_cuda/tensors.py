"""Tensors that say they are on a GPU, and what runs their operators on the CPU."""

import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.pretend_cuda.ledger import ledger, place
from tests.pretend_cuda.refusals import check, common_device

aten = torch.ops.aten

_SYNCS = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero", "unique_consecutive",
    "unique_dim",
}  # fmt: skip
_FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Devices(threading.local):
    """How many GPUs there are, and which is a thread's current one."""

    count = 0  # of all threads
    current = 0

    def known(self, device):
        """The device with its index; raises a RuntimeError beyond the last."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        index = self.current if device.index is None else device.index
        if index >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index} (pretended)")
        return torch.device("cuda", index)


devices = Devices()


class Generator:
    """A GPU's generator: of the same seed it gives other numbers than the CPU's, as real ones do."""

    def __init__(self, device):
        self.device, self._own = device, torch.Generator()
        self.manual_seed(0)

    def manual_seed(self, seed):
        self._seed = seed
        self._own.manual_seed(seed ^ 0x5EED)
        return self

    def initial_seed(self):
        return self._seed

    def get_state(self):
        return self._own.get_state()

    def set_state(self, state):
        self._own.set_state(state)

    @contextmanager
    def drawn_from(self):
        """Operators of the CPU draw from this one."""
        state = torch.get_rng_state()
        torch.set_rng_state(self._own.get_state())
        try:
            yield
        finally:
            self._own.set_state(torch.get_rng_state())
            torch.set_rng_state(state)


class CudaTensor(torch.Tensor):
    """A tensor that says it is on a GPU; `elem` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, elem, device):
        strided = elem.layout == torch.strided
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride() if strided else None,
            storage_offset=elem.storage_offset() if strided else 0,
            dtype=elem.dtype,
            layout=elem.layout,
            device=device,
            requires_grad=False,
        )

    def __init__(self, elem, device):
        self.elem = elem

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_):
        return f"pretended({self.elem!r}, device='{self.device}')"

    def numpy(self, *, force=False):
        if not force:
            raise _no_array(self)
        return self.detach().cpu().numpy()

    def __array__(self, *_, **__):
        raise _no_array(self)

    def __getitem__(self, index):
        return super().__getitem__(_without_lists(index, self.device))

    def __setitem__(self, index, value):
        super().__setitem__(_without_lists(index, self.device), value)

    def tolist(self):
        return self.detach().cpu().tolist()

    def pin_memory(self, *_, **__):
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned (pretended)"
        )

    def __deepcopy__(self, memo):
        with torch.no_grad():
            made = self.detach().clone()
        made.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, proto):  # as `torch.load(map_location="cpu")` would give it
        return self.detach().cpu().__reduce_ex__(proto)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if _traits(func).composite:
            return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


CudaTensor.__module__ = "torch"  # eagerpy, and with it foolbox, knows tensors by this


def _no_array(tensor):
    return TypeError(
        f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host"
        " memory first. (pretended)"
    )


def _without_lists(index, device):
    """An index with lists as tensors: torch would make these on the GPU below dispatch."""
    if isinstance(index, tuple):
        return tuple(_without_lists(each, device) for each in index)
    return torch.tensor(list(index)).to(device) if isinstance(index, list | range) else index


class PretendMode(TorchDispatchMode):
    """Catches what makes tensors on a GPU from nothing or from the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _traits(func).composite:
            with self:
                return func.decompose(*args, **kwargs)
        if CudaTensor in types or _is_cuda(kwargs.get("device")):
            return _run(func, args, kwargs)
        if kwargs.get("pin_memory"):  # which a driver would do
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _is_gpu(value):
    return isinstance(value, CudaTensor)


def _is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


@dataclass(frozen=True)
class _Traits:
    name: str
    is_view: bool
    aliases: bool  # whether a result is, or shares memory with, an argument
    draws: bool
    composite: bool  # made of others, into which torch takes it apart, though not in inference mode


@cache
def _traits(func):
    name = func._schema.name.split("::")[-1]
    aliases = (func.is_view or func._schema.is_mutable) and name not in ("_to_copy", "set_")
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return _Traits(name, func.is_view, aliases, torch.Tag.nondeterministic_seeded in func.tags, composite)


def _each(function, value):
    """A value, list or tuple of values, with a function applied to its tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return (
        type(value)([_each(function, each) for each in value]) if isinstance(value, list | tuple) else value
    )


def _run(func, args, kwargs):
    """An operator with a tensor on a GPU among its arguments or as its result."""
    traits = _traits(func)
    device = common_device(func, traits.name, args, kwargs, _is_gpu)
    if traits.name == "device":
        return device
    target = kwargs.get("device")
    result = device if target is None else devices.known(target) if _is_cuda(target) else None
    check(traits.name, args, kwargs)
    _note(func, traits, args, kwargs, result)
    inner_args = tuple(_each(_values, each) for each in args)
    inner_kwargs = {name: _each(_values, each) for name, each in kwargs.items()}
    if _is_cuda(target):
        inner_kwargs["device"] = torch.device("cpu")
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    call = func
    if func is aten.mm.dtype:  # which CUDA alone has
        call, inner_args = aten.mm.default, tuple(each.to(inner_args[2]) for each in inner_args[:2])
    draws = traits.draws and result is not None
    with torch.cuda.default_generators[result.index].drawn_from() if draws else nullcontext():
        out = call(*inner_args, **inner_kwargs)
    if result is None:
        return out
    if traits.name == "copy_" and not _is_gpu(args[0]):
        return args[0]
    # Views of ordinary tensors are ordinary ones in inference mode, too.
    ordinary = traits.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference()
    with torch.inference_mode(False) if ordinary else nullcontext():
        wrapped = _each(lambda each: each if _is_gpu(each) else CudaTensor(each, result), out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if traits.aliases else wrapped


def _values(tensor):
    return tensor.elem if _is_gpu(tensor) else tensor


def _note(func, traits, args, kwargs, result):
    """Enter an operator into the ledger."""
    name = traits.name
    if traits.is_view or name in _FREE:
        return
    here = place()
    ledger.launches[here] += 1
    ledger.operators[name] += 1
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        up = not _is_gpu(source)
        down = result is None if name == "_to_copy" else not _is_gpu(args[0])
        waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if up:
            ledger.uploads[here] += 1
        elif down:
            ledger.downloads[here] += 1
        if down and waits:
            ledger.syncs[f"{here} (to the CPU)"] += 1
    elif name in _SYNCS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        ledger.syncs[f"{here} ({name})"] += 1
    elif func in _MASKED:
        indices = [each for each in args[1] if each is not None]
        masks = sum(each.dtype in (torch.bool, torch.uint8) for each in indices)
        filled = (
            name != "index" and masks == 1 and args[2].numel() == 1 and not _is_gpu(args[2])
        )  # masked_fill
        if masks and not filled:
            ledger.syncs[f"{here} (boolean index)"] += 1
        if uploads := sum(not _is_gpu(each) for each in indices):
            ledger.uploads[here] += uploads
