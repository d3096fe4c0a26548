"""Lightning, stopped and resumed from its checkpoint: python examples/lightning_module.py [POLICY]"""

import sys

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Subset, TensorDataset

from palf_dist import AdaptiveLoss

policy = sys.argv[1] if len(sys.argv) > 1 else "default"
rows = TensorDataset(*map(torch.tensor, load_digits(return_X_y=True)), torch.arange(1797))  # each with its number
train, test = DataLoader(Subset(rows, range(1200)), 64, shuffle=True), DataLoader(Subset(rows, range(1200, 1797)), 597)


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        self.criterion = AdaptiveLoss(policy, total_steps=15 * len(train))  # as a part of it: in its checkpoints

    def training_step(self, batch, number):
        return self.criterion(self.model(batch[0].float() / 16), batch[1], index=batch[2])

    def on_before_optimizer_step(self, optimizer):  # after the backward pass, and before any clipping
        self.criterion.step(self, optimizer)

    def validation_step(self, batch, number):
        self.log("accuracy", (self.model(batch[0].float() / 16).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=0.01)


for epochs, checkpoint in ((8, None), (15, "lightning.ckpt")):
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Digits(), train, test, ckpt_path=checkpoint)
    trainer.save_checkpoint("lightning.ckpt")
    print(f"epoch {epochs}: step {trainer.global_step}, accuracy {trainer.callback_metrics['accuracy']:.3f}")
