"""One thread from the start: kinds that PEFT rebuilds from an SVD of the base change their signs with the number."""

import torch

torch.set_num_threads(1)
