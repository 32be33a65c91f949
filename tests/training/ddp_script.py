"""Run by test_ddp.py on every rank: trains and writes what must agree between ranks."""

import sys
from pathlib import Path

import torch

from tests.training.test_trainer import trainer


def main(folder):
    ours = trainer(folder / "run", save_strategy="steps", save_steps=6, per_device_train_batch_size=4)
    ours.train()
    state = {f"model.{name}": tensor for name, tensor in ours.model.state_dict().items()}
    state |= {f"stored.{name}": tensor for name, tensor in ours.pruner.stored.items()}
    state |= {f"head.{name}": tensor for name, tensor in ours.heads["target"].tensors().items()}
    state |= {f"attackers.{name}": tensor for name, tensor in ours._pool.tensors().items()}
    torch.save((state, ours.state.log_history[:-1]), folder / f"rank{ours.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
