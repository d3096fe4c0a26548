"""Ray Train, two workers, and on from the last epoch where one is lost: python examples/ray_train.py [POLICY]"""

import sys
import tempfile
from pathlib import Path

import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig, get_checkpoint, report
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from palf_dist import AdaptiveLoss


def work(policy):
    rows = TensorDataset(*map(torch.tensor, load_digits(return_X_y=True)), torch.arange(1797))  # each with its number
    loader, epochs = prepare_data_loader(DataLoader(rows, 32, shuffle=True)), 8
    model = prepare_model(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)))
    parts = model, AdaptiveLoss(policy, total_steps=epochs * len(loader)), torch.optim.AdamW(model.parameters(), 0.01)
    criterion, optimizer, done = *parts[1:], 0
    if checkpoint := get_checkpoint():
        *states, done = torch.load(Path(checkpoint.path) / "state.pt")
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    for epoch in range(done, epochs):
        loader.sampler.set_epoch(epoch)
        for inputs, targets, index in loader:
            (loss := criterion(model(inputs.float() / 16), targets, index=index)).backward()
            criterion.step(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        with tempfile.TemporaryDirectory() as folder:
            torch.save([*(part.state_dict() for part in parts), epoch + 1], Path(folder) / "state.pt")
            report({"epoch": epoch, "loss": loss.item()}, Checkpoint.from_directory(folder))


policy = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else "default"
run = RunConfig(failure_config=FailureConfig(max_failures=2))  # kept in ~/ray_results; several machines: storage_path=
print(TorchTrainer(work, train_loop_config=policy, scaling_config=ScalingConfig(num_workers=2), run_config=run).fit())
