"""What a GPU refuses and a CPU takes."""

import torch

aten = torch.ops.aten

# Operators that take an index of the CPU beside a tensor on the GPU.
_INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
COPIES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor, aten.copy.default}

# They take no 0-dim tensor of another device: no TensorIterator is behind them.
_STRICT = {
    "_embedding_bag", "_embedding_bag_forward_only", "_int_mm", "addmm", "baddbmm", "bmm", "cat", "convolution",
    "dot", "embedding", "equal", "gather", "index_add", "index_add_", "index_select", "mm", "mv",
    "native_batch_norm", "scatter", "scatter_", "scatter_add", "scatter_add_", "searchsorted", "stack", "topk",
}  # fmt: skip

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "mv": 0, "dot": 0, "addmv": 1}
"""Products, and the position of their first factor."""


def common_device(func, name, args, kwargs, is_gpu):
    """The GPU of an operator's tensors, None if all are on the CPU.

    Raises:
        RuntimeError: If they are on several devices and CUDA does not take that.
    """
    tensors = list(_tensors(args))
    tensors += _tensors(kwargs.values())
    gpus = [each for each in tensors if is_gpu(each)]
    if not gpus:
        return None
    chosen = next((each.device for each in gpus if each.dim()), gpus[0].device)
    if func in COPIES:
        return chosen
    for each in gpus:
        if each.device != chosen and (each.dim() or name in _STRICT):
            raise _mixed(chosen, each.device, name)
    if len(gpus) < len(tensors):
        # An operator's first argument is indexed; its third, if there is one, has the values to put.
        indices = list(_tensors(args[1])) if func in _INDEXING and is_gpu(args[0]) else []
        for each in tensors:
            allowed = is_gpu(each) or any(each is index for index in indices)
            if not allowed and (each.dim() or name in _STRICT):
                raise _mixed(torch.device("cpu"), chosen, name)
    return chosen


def _tensors(values):
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _mixed(first, second, name):
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices,"
        f" {first} and {second}! (pretended; in {name})"
    )


def check(name, args, kwargs):
    """Raise a RuntimeError for what has no kernel on CUDA."""
    if name == "_int_mm":
        left, right = args[:2]
        if left.size(0) <= 16:
            raise RuntimeError(
                f"self.size(0) needs to be greater than 16, but got {left.size(0)} (pretended)"
            )
        if left.size(1) % 8 or right.size(1) % 8:
            shapes = f"{tuple(left.shape)} @ {tuple(right.shape)}"
            raise RuntimeError(f"_int_mm: expected multiples of 8, but got {shapes} (pretended)")
    if name in _PRODUCTS and not args[_PRODUCTS[name]].is_floating_point():
        raise RuntimeError(f'"{name}_cuda" not implemented for {args[_PRODUCTS[name]].dtype} (pretended)')
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu' (pretended)")
