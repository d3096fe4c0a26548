"""AdaptiveLoss against cross-entropy on digits with wrong labels: python examples/noisy_digits.py [POLICY]"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from palf_dist import AdaptiveLoss

policy = sys.argv[1] if len(sys.argv) > 1 else "default"
x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
x, y = x.float() / 16, y.long()
seeds, rows, noise, steps = 5, 400, 0.4, 300


def accuracy(seed, adaptive):
    """On clean test rows; both losses get the same noisy training rows, initial model and batches."""
    torch.manual_seed(seed)
    train, test = torch.randperm(len(y)).split([rows, len(y) - rows])
    labels = torch.where(torch.rand(rows) < noise, torch.randint(10, (rows,)), y[train])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    criterion = AdaptiveLoss.load(policy, total_steps=steps) if adaptive else nn.CrossEntropyLoss()
    for index in [torch.randperm(rows)[:32] for _ in range(steps)]:
        known = {"index": index} if adaptive else {}
        criterion(model(x[train[index]]), labels[index], **known).backward()
        if adaptive:
            criterion.step(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return (model(x[test]).argmax(1) == y[test]).float().mean()


found = torch.tensor([[accuracy(seed, adaptive) for adaptive in (False, True)] for seed in range(seeds)])
for seed, (plain, ours) in enumerate(found.tolist()):
    print(f"seed {seed}: cross-entropy {plain:.3f}, AdaptiveLoss {ours:.3f}")
(plain, ours), gain = found.mean(0).tolist(), 100 * found.diff()
print(f"mean of {seeds}: cross-entropy {plain:.3f}, AdaptiveLoss {ours:.3f}")
print(f"difference {gain.mean():+.1f} points, standard error {gain.std() / seeds**0.5:.1f}")
