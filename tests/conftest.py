"""One thread from the start: kinds that PEFT rebuilds from an SVD of the base change their signs with the number.

Triton reads its setting when it is first imported, whoever does that: kernels are interpreted where there is no CUDA.
"""

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
