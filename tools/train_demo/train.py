"""Train the demo model against the clock and export it as a Hugging Face checkpoint.

Usage: python train.py RUN_DIR --deadline 2026-11-23T22:12:00+00:00
RUN_DIR/data comes from prepare.py. The run writes RUN_DIR/{pid,train.log,state.pt} and exports to
RUN_DIR/hf. Started again with the same arguments it resumes from state.pt.

Two single-threaded workers share each batch and average their gradients once per step. On a machine
that others use too this is far better than two threads, which would wait for each other at every
operator.

The learning rate follows warmup-stable-decay by wall clock: the decay to zero fills the last
``--decay`` share of the time to the deadline, however fast or slow the machine turns out to be.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from chat import render
from checkpoint import export
from data import DECAY_MIXTURE, STABLE_MIXTURE, Mixture
from model import GatedDeltaNet, ModelConfig, Qwen35Moe
from optim import build_optimizers
from tokenizers import Tokenizer
from torch import Tensor

WARMUP_STEPS = 40
LOG_EVERY_STEPS = 20
CHECKPOINT_SECONDS = 300
EVALUATE_SECONDS = 600
QUICK_EVAL_ROWS = 24
RENDEZVOUS = "tcp://127.0.0.1:29511"


@dataclass(frozen=True)
class Schedule:
    """Warmup-stable-decay in wall-clock time (Unix seconds)."""

    start: float
    deadline: float
    decay_share: float

    @property
    def decay_start(self) -> float:
        return self.deadline - self.decay_share * (self.deadline - self.start)

    def scale(self, step: int, now: float) -> float:
        remaining = (self.deadline - now) / (self.deadline - self.decay_start)
        return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, remaining))


def cross_entropy(model: Qwen35Moe, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token loss in nats, and the auxiliary router loss."""
    logits, aux_loss = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()), aux_loss


class HeldOut:
    """Held-out text and chat as token rows; every token is predicted once."""

    def __init__(self, data: Path, length: int) -> None:
        tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
        text = (data / "heldout.txt").read_text(encoding="utf-8")
        lines = (data / "heldout_chat.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        chat = "".join(render([(pair["question"], pair["answer"])]) for pair in pairs)
        self.rows, self.bytes_per_token = {}, {}
        for name, content in (("text", text), ("chat", chat)):
            ids = torch.tensor(tokenizer.encode(content).ids)
            self.bytes_per_token[name] = len(content.encode()) / len(ids)
            self.rows[name] = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)

    @torch.no_grad()
    def evaluate(self, model: Qwen35Moe, limit: int | None, batch_rows: int) -> dict[str, float]:
        """Loss in nats per token and bits per byte, for text and chat."""
        result = {}
        for name, rows in self.rows.items():
            count = min(len(rows), limit or len(rows)) // batch_rows * batch_rows
            batches = rows[:count].split(batch_rows)
            loss = sum(float(cross_entropy(model, batch)[0]) for batch in batches) / len(batches)
            result[f"{name}_loss"] = round(loss, 4)
            bits_per_byte = loss / np.log(2) / self.bytes_per_token[name]
            result[f"{name}_bits_per_byte"] = round(float(bits_per_byte), 4)
        return result


@dataclass(frozen=True)
class StepPlan:
    """What all workers do in the next step; rank 0 decides, because clocks and pauses differ."""

    go_on: bool
    lr: float
    decaying: bool

    @classmethod
    def agree(cls, own: StepPlan) -> StepPlan:
        values = torch.tensor([own.go_on, own.lr, own.decaying], dtype=torch.float64)
        dist.broadcast(values, src=0)
        return cls(bool(values[0]), float(values[1]), bool(values[2]))


def average_gradients(model: Qwen35Moe) -> None:
    """All-reduce every gradient in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(part.view_as(gradient))


class Run:
    """Model, optimisers, data position and counters of one training run.

    Every worker holds the same state; each trains on its own rows of the common batch.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.args = args
        self.model = Qwen35Moe(ModelConfig(chunk_size=32))
        self.optimizers = build_optimizers(self.model, args.lr, args.weight_decay)
        self.data = Mixture(folder / "data", seed=args.seed)
        self.step, self.tokens, self.active_seconds = 0, 0, 0.0
        self.start = time.time()
        if (folder / "state.pt").exists():
            self.restore(torch.load(folder / "state.pt", weights_only=False))
        deadline = datetime.fromisoformat(args.deadline).timestamp()
        self.schedule = Schedule(self.start, deadline, args.decay)

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.data.restore(state["data"])
        self.step, self.tokens, self.active_seconds, self.start = state["counters"]

    def save(self) -> None:
        temporary = self.folder / "state.pt.tmp"
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "data": self.data.state(),
            "counters": (self.step, self.tokens, self.active_seconds, self.start),
        }
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "state.pt")
        export(self.model, self.folder / "data" / "tokenizer", self.folder / "hf")

    def log(self, **values: Any) -> None:
        values = {"step": self.step, "tokens": self.tokens, **values}
        with (self.folder / "train.log").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def plan(self) -> StepPlan:
        now = time.time()
        lr = self.args.lr * self.schedule.scale(self.step, now)
        go_on = now < self.schedule.deadline and self.step < self.args.max_steps
        return StepPlan.agree(StepPlan(go_on, lr, now >= self.schedule.decay_start))

    def train_step(self, plan: StepPlan) -> tuple[float, float]:
        """One optimiser step; returns this worker's loss and auxiliary loss."""
        shares = DECAY_MIXTURE if plan.decaying else STABLE_MIXTURE
        world, rank = dist.get_world_size(), dist.get_rank()
        batch = self.data.batch(self.args.rows * world, self.args.length, shares)
        loss, aux_loss = cross_entropy(self.model, batch[rank::world])
        (loss + aux_loss).backward()
        average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += self.args.rows * world * self.args.length
        return float(loss.detach()), float(aux_loss.detach())


def train(run: Run, is_main: bool) -> None:
    """Train until the deadline; the main worker logs, evaluates and saves."""
    args = run.args
    held_out = HeldOut(run.folder / "data", args.length)
    last_checkpoint = last_evaluation = time.time()
    window: list[tuple[float, float]] = []
    window_start, window_tokens = time.time(), run.tokens
    while (plan := run.plan()).go_on:
        step_cpu = time.process_time()
        window.append(run.train_step(plan))
        # CPU time of a single thread: wall time without pauses and without other processes.
        run.active_seconds += time.process_time() - step_cpu
        now = time.time()
        if not is_main:
            continue
        if run.step % LOG_EVERY_STEPS == 0:
            loss, aux_loss = np.mean(window, axis=0)
            run.log(
                loss=round(float(loss), 4),
                aux=round(float(aux_loss), 4),
                lr=round(plan.lr, 6),
                tokens_per_second=round((run.tokens - window_tokens) / (now - window_start)),
                minutes=round((now - run.start) / 60, 1),
            )
            window, window_start, window_tokens = [], now, run.tokens
        if now - last_evaluation > EVALUATE_SECONDS:
            run.log(held_out=held_out.evaluate(run.model, QUICK_EVAL_ROWS, args.rows))
            last_evaluation = time.time()
        if now - last_checkpoint > CHECKPOINT_SECONDS:
            run.save()
            last_checkpoint = time.time()
    if is_main:
        run.save()
        minutes = {
            "wall_minutes": round((time.time() - run.start) / 60, 1),
            "active_minutes": round(run.active_seconds / 60, 1),
        }
        run.log(final_held_out=held_out.evaluate(run.model, None, args.rows), **minutes)


def worker(rank: int, args: argparse.Namespace) -> None:
    """Body of one training process."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    dist.init_process_group("gloo", init_method=RENDEZVOUS, rank=rank, world_size=args.workers)
    # Fuses the element-wise work of the delta net: 1.5 times the tokens per second.
    GatedDeltaNet.forward = torch.compile(GatedDeltaNet.forward, dynamic=False)  # type: ignore
    if rank == 0:
        # Stopping this process pauses the run: the others wait for its next message.
        (args.run_dir / "pid").write_text(f"{os.getpid()}\n")
    train(Run(args.run_dir, args), is_main=rank == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--deadline", required=True, help="ISO time with offset: decay is complete")
    parser.add_argument("--decay", type=float, default=0.25, help="share of the time for LR decay")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--rows", type=int, default=6, help="rows per worker and step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.multiprocessing.spawn(worker, (args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
