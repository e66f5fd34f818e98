"""Whether there is a GPU that runs compiled kernels and graphs; a pretended one does not."""

import torch

REAL_GPU = bool(torch.backends.cuda.is_built() and torch._C._cuda_getDeviceCount())
