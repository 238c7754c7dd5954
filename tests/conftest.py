"""Every test process computes with one thread: the suite itself runs in as many processes as there are cores."""

import torch

torch.set_num_threads(1)
