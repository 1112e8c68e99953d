"""One thread: the models are tiny, and threads waiting for each other cost more than they give."""

import torch

torch.set_num_threads(1)
