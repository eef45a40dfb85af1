import torch

# Tensors of the tests are small, and on a busy machine two threads wait for each other ten times as long as one works.
torch.set_num_threads(1)
