"""Makes torch and Lightning believe in GPUs."""

import contextlib
import importlib
import threading
from types import SimpleNamespace

import torch

from tests.pretend_cuda import guard
from tests.pretend_cuda.tensors import CudaTensor, Devices, Generator, PretendMode, devices

MEMORY = 80 * 2**30
CAPABILITY = (9, 0)


def install(count):
    """From now on there are GPUs, in this thread and those started later. There is no way back."""
    if Devices.count:
        raise RuntimeError(f"GPUs are pretended already: {Devices.count}.")
    guard.load(count)
    Devices.count = count
    _patch_cuda(count)
    _patch_constructors()
    _patch_process_groups()
    _patch_lightning(count)
    _patch_threads()
    torch._C._set_cudnn_enabled(False)  # its operators have no kernels for the CPU
    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to("cuda")` keeps its parameters
    PretendMode().__enter__()


class _Stream:
    def __init__(self, device=None, *_, **__):
        self.device = devices.known("cuda" if device is None else device)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        pass

    wait_stream = wait_event = record_event = query = lambda self, *_: None


@contextlib.contextmanager
def _current(device):
    before = devices.current
    _set_current(device)
    try:
        yield
    finally:
        devices.current = before


def _set_current(device):
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda":
        devices.current = devices.known(device).index


def _properties(device=None):
    device = devices.known("cuda" if device is None else device)
    return SimpleNamespace(
        name="pretended GPU",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=132,
        total_memory=MEMORY,
        uuid=f"pretended-{device.index}",
    )


def _patch_cuda(count):
    generators = tuple(Generator(torch.device("cuda", index)) for index in range(count))

    def generator(device="cuda"):
        return generators[devices.known(device).index]

    def seed(number):
        generator().manual_seed(number)

    def seed_all(number):
        for each in generators:
            each.manual_seed(number)

    def set_all(states):
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)

    random = {
        "manual_seed": seed,
        "manual_seed_all": seed_all,
        "initial_seed": lambda: generator().initial_seed(),
        "get_rng_state": lambda device="cuda": generator(device).get_state(),
        "set_rng_state": lambda state, device="cuda": generator(device).set_state(state),
        "get_rng_state_all": lambda: [each.get_state() for each in generators],
        "set_rng_state_all": set_all,
    }
    nothing = {
        name: lambda *_, **__: None
        for name in ("_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats")
    }
    zero = {
        name: lambda *_, **__: 0 for name in ("memory_allocated", "max_memory_allocated", "memory_reserved")
    }
    patches = {
        **random,
        **nothing,
        **zero,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: count,
        "current_device": lambda: devices.current,
        "set_device": _set_current,
        "device": _current,
        "get_device_name": lambda device=None: _properties(device).name,
        "get_device_capability": lambda device=None: CAPABILITY if _properties(device) else None,
        "get_device_properties": _properties,
        "mem_get_info": lambda device=None: (MEMORY * 7 // 8, MEMORY),
        "memory_stats": lambda device=None: {},
        "Stream": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "default_generators": generators,
    }
    for name, patch in patches.items():
        setattr(torch.cuda, name, patch)
    for name, patch in random.items():
        setattr(torch.cuda.random, name, patch)
    torch._C._cuda_clearCublasWorkspaces = torch._C._cuda_emptyCache = lambda: None


def _patch_constructors():
    """`torch.tensor` and its like move data to the GPU below dispatch: here the data are moved above it."""

    def patched(make):
        def made(data, *args, device=None, requires_grad=False, **kwargs):
            on_gpu = device is not None and torch.device(device).type == "cuda"
            if isinstance(data, CudaTensor):
                found = data.detach().clone() if make.__name__ == "tensor" else data
                found = found if kwargs.get("dtype") is None else found.to(kwargs["dtype"])
                return found if device is None else found.to(device)
            if isinstance(data, list | tuple) and data and isinstance(data[0], CudaTensor):
                data = [each.tolist() for each in data]
            if not on_gpu:
                more = {"requires_grad": True} if requires_grad else {}
                return make(data, *args, **kwargs, **more, **({} if device is None else {"device": device}))
            return make(data, *args, **kwargs).to(device).requires_grad_(requires_grad)

        return made

    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, patched(getattr(torch, name)))

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        like = {"dtype": dtype or self.dtype, "device": device or self.device}
        return torch.tensor(data, **like, requires_grad=requires_grad)

    torch.Tensor.new_tensor = new_tensor


def _patch_process_groups():
    """NCCL needs GPUs: gloo stands for it."""
    real = torch.distributed.init_process_group

    def init(backend=None, *args, **kwargs):
        kwargs.pop("device_id", None)
        return real(backend and str(backend).replace("nccl", "gloo"), *args, **kwargs)

    torch.distributed.init_process_group = torch.distributed.distributed_c10d.init_process_group = init


def _patch_lightning(count):
    for name in ("lightning_fabric.accelerators.cuda", "lightning_fabric.utilities.device_parser"):
        module = importlib.import_module(name)
        if hasattr(module, "num_cuda_devices"):
            module.num_cuda_devices = lambda: count


def _patch_threads():
    """Modes are a thread's own: each thread enters its own."""
    real = threading.Thread.run

    def run(self):
        with PretendMode():
            real(self)

    threading.Thread.run = run
