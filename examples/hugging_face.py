"""The Trainer of Hugging Face, stopped and resumed from its checkpoint: python examples/hugging_face.py [POLICY]"""

import sys

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainerCallback, TrainingArguments

from palf_dist import AdaptiveLoss

policy = sys.argv[1] if len(sys.argv) > 1 else "default"
x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
x = x.float() / 16
rows = [{"input": x[i], "labels": torch.stack([y[i], torch.tensor(i)])} for i in range(1280)]


class Adaptive(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            criterion.load_state_dict(torch.load(f"{args.output_dir}/checkpoint-{state.global_step}/criterion.pt"))

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        criterion.step(model, optimizer)

    def on_save(self, args, state, control, **kwargs):
        torch.save(criterion.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/criterion.pt")


def loss(outputs, labels, num_items_in_batch):  # labels are all that gets here: so the row's number goes with each
    return criterion(outputs, labels[:, 0], index=labels[:, 1]) / (num_items_in_batch / 2)


setting = {"learning_rate": 0.01, "save_strategy": "epoch", "remove_unused_columns": False}
for epochs in (3, 6):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    criterion = AdaptiveLoss(policy, total_steps=6 * 160, reduction="sum")
    arguments = TrainingArguments("checkpoints", num_train_epochs=epochs, **setting)
    trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss, callbacks=[Adaptive()])
    trainer.train(resume_from_checkpoint=epochs > 3)
    print(f"epoch {epochs}: accuracy {(model(x[1280:]).argmax(1) == y[1280:]).float().mean():.3f}")
