"""DistributedDataParallel: torchrun --standalone --nproc-per-node 2 examples/ddp.py [POLICY]"""

import sys

import torch
import torch.distributed.nn  # before there is a group, or the functions in it hold on to that group (their default)
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from palf_dist import AdaptiveLoss
from palf_dist.types import CONTROLS

policy = sys.argv[1] if len(sys.argv) > 1 else "default"
distributed.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
x, y = x.float() / 16, y.long()
labels = torch.where(torch.rand(1200) < 0.3, torch.randint(10, (1200,)), y[:1200])
rows = TensorDataset(x[:1200], labels, torch.arange(1200))  # each with its number, the same on all ranks
sampler = DistributedSampler(rows)
loader, epochs = DataLoader(rows, 32, sampler=sampler), 15
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
criterion = AdaptiveLoss.load(policy, total_steps=epochs * len(loader))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for epoch in range(epochs):
    sampler.set_epoch(epoch)
    for inputs, targets, index in loader:
        criterion(model(inputs), targets, index=index).backward()
        criterion.step(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
with torch.no_grad():
    accuracy = (model(x[1200:]).argmax(1) == y[1200:]).float().mean()
controls = {name: round(value, 4) for name, value in zip(CONTROLS, criterion.controls.tolist(), strict=True) if value}
print(f"rank {distributed.get_rank()}: test accuracy {accuracy:.3f}, {controls}", flush=True)
del model  # it holds on to the group, too; with the last of those the threads of the group end
distributed.destroy_process_group()
