"""The searches that parts compare. Each is prepared once, and returns votes int64 ``(B, C)``."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from benchmarks.gpu.clock import Record, counted, measured
from benchmarks.gpu.synthetic import CLASSES, Scene, differing
from lightning_advknn.choices import Backend
from lightning_advknn.functional import count_votes, float32_arithmetic
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.scans.quantize import fastest
from lightning_advknn.search.scans.triton_scan import runs_on

Votes = Callable[[Tensor], Tensor]
Prepare = Callable[[Tensor, Tensor, int], Votes]
BACKENDS: tuple[Backend, ...] = ("auto", "int8", "triton", "bfloat16", "float32")
TORCH, FAISS = "torch float32", "faiss-gpu"
_AT_ONCE = 4096


def name_of(backend: Backend) -> str:
    """The method's name of one of our backends."""
    return report.OURS if backend == "auto" else f"{report.OURS} {backend}"


def ours(bank: Tensor, labels: Tensor, k: int, backend: Backend) -> Votes:
    """`MemoryBank`, ready to be asked."""
    memory = MemoryBank(bank, labels, torch.arange(len(bank), device=bank.device), CLASSES, backend=backend)
    memory.votes(bank[:1], k)  # encodes the bank
    return lambda queries: memory.votes(queries, k)


def plain_torch(bank: Tensor, labels: Tensor, k: int) -> Votes:
    """Normalise, multiply in float32 and call `topk`, in chunks of queries."""
    rows = F.normalize(bank)

    @float32_arithmetic()
    def votes(queries: Tensor) -> Tensor:
        parts = torch.split(F.normalize(queries), _AT_ONCE)
        found = torch.cat([(part @ rows.T).topk(k, sorted=False).indices for part in parts])
        return count_votes(labels[found], CLASSES)

    return votes


def faiss_gpu(bank: Tensor, labels: Tensor, k: int) -> Votes:
    """`faiss.GpuIndexFlatIP` on normalised rows, which stay on the GPU."""
    import faiss
    import faiss.contrib.torch_utils  # its indices then take tensors of the GPU

    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), bank.shape[1])
    for part in torch.split(bank, _AT_ONCE):
        index.add(F.normalize(part))

    def votes(queries: Tensor) -> Tensor:
        _, found = index.search(F.normalize(queries), k)
        return count_votes(labels[found.to(labels.device)], CLASSES)

    return votes


def asked(votes: Votes, queries: Tensor, scene: Scene, method: str) -> Record:
    """Time, launches and differing votes of some queries."""
    found, times = measured(lambda: votes(queries), scene.device, scene.sizes.repeats)
    return {
        **times,
        **counted(lambda: votes(queries), scene.device),
        **differing(found, scene.right[: len(queries)]),
        "work": [[2 * len(queries) * len(scene.bank) * scene.width, ceiling_of(method, scene)]],
    }


def backends_on(device: torch.device) -> list[Backend]:
    """Our backends that a device has."""
    triton = device.type == "cuda" and find_spec("triton") is not None and runs_on(device)
    return [backend for backend in BACKENDS if backend != "triton" or triton]


def has_faiss(device: torch.device) -> bool:
    """Whether a faiss for GPUs is installed here and finds one."""
    if device.type != "cuda" or find_spec("faiss") is None:
        return False
    try:
        import faiss

        return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    except Exception:  # it misses a library of CUDA
        return False


def ceiling_of(method: str, scene: Scene) -> str:
    """The product of `ceilings` that bounds a method."""
    word = method.split()[-1]
    if word == report.OURS:
        return fastest(scene.device, scene.width)
    return {"triton": "int8", FAISS: "float32"}.get(word, word)
