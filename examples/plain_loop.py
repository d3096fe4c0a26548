"""A plain PyTorch loop on noisy digits, with evaluation and a restart: python examples/plain_loop.py [POLICY]"""

import sys

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from palf_dist import AdaptiveLoss

policy = sys.argv[1] if len(sys.argv) > 1 else "default"
torch.manual_seed(0)
x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
x, y = x.float() / 16, y.long()
labels = torch.where(torch.rand(1200) < 0.3, torch.randint(10, (1200,)), y[:1200])
rows = TensorDataset(x[:1200], labels, torch.arange(1200))  # each with its number
loader, epochs = DataLoader(rows, 64, shuffle=True), 15


def fresh():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    criterion = AdaptiveLoss.load(policy, total_steps=epochs * len(loader))
    return model, criterion, torch.optim.AdamW(model.parameters(), lr=0.01)


parts = fresh()
for epoch in range(epochs):
    if epoch == 8:  # as after a restart: these three states are all that is needed to go on
        saved, parts = [part.state_dict() for part in parts], fresh()
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)
    model, criterion, optimizer = parts
    for inputs, targets, index in loader:
        criterion(model(inputs), targets, index=index).backward()
        criterion.step(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # where the loss is torch's cross-entropy, as in its eval mode
        z, clean = model(x[1200:]), y[1200:]
        print(f"epoch {epoch}: loss {criterion(z, clean):.3f}, accuracy {(z.argmax(1) == clean).float().mean():.3f}")
