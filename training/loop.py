"""The training loop of one stage, on one worker or as one of many. No Ray in here.

A step draws its micro-batches from the plan, sums their gradients, looks at their norm, updates the weights and their average.
All that a step depends on is in the checkpoint or follows from (seed, epoch, sample): a run that was killed and goes on from its
last checkpoint has the losses of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from training.checkpoint import Checkpoints, Progress
from training.conditioning import Conditioner, Example, generator_of
from training.curves import draw_curve
from training.data.epochs import Draw, Step
from training.data.plan import Plan
from training.ema import Ema
from training.export import Facts, export, record_of, warm_start
from training.group import Worker
from training.held_out import held_out_losses
from training.job import Job
from training.measures import Measures
from training.parallel.apply import parallelise
from training.parallel.compiling import warm_up_report
from training.parallel.fsdp import reduce_over_replicas
from training.parallel.mesh import plan_mesh
from training.previews import Previews
from training.recipe import Recipe
from training.spikes import SpikeGuard
from training.trackers import trackers
from training.trainee import Trainee, model_config
from training.watch import Stragglers, Tell, Watchdog
from waver_core.errors import UserError

Report = Callable[[dict[str, Any]], None]


def train(job: Job, worker: Worker, report: Report) -> dict[str, Any]:
    """Run a stage to its end and export its averaged weights; returns a summary.

    `report` is told of every logged step: {step, total, loss, ...}. Raises `RunFailed` on NaN or repeated spikes, `UserError`
    on what a person can mend. On several workers torch.distributed must be initialised and all of them call it.
    """

    def tell(text: str) -> None:
        report({"warning": text})

    with Watchdog(job.recipe.workers.hang_after_s, tell, worker=worker, folder=job.folder / "hangs") as watchdog:
        run = _Run(job, worker, watchdog, tell)
        try:
            return run.to_the_end(report)
        finally:
            run.close()


class _Run:
    """A stage under way."""

    def __init__(self, job: Job, worker: Worker, watchdog: Watchdog, tell: Tell) -> None:
        recipe = job.recipe
        self.job, self.recipe, self.watchdog = job, recipe, watchdog
        self.tell, self.stragglers = tell, Stragglers(worker, tell)
        self.source, facts = job.open_samples()
        self.plan = Plan(self.source.table, recipe, facts.dropped)
        self.ids = self.source.table["sample_id"].to_pylist()
        self.conditioner = Conditioner(recipe, self.source.constants)
        config = model_config(recipe, facts.text_dims)
        self.mesh = plan_mesh(worker.world, config.heads, recipe.parallel.shard, recipe.parallel.sequence)
        self.worker = worker = replace(worker, sequence=self.mesh.sequence)
        with torch.device("meta"):  # no worker ever holds the whole model: memory comes with the shards
            self.trainee = Trainee(config, recipe, facts.feature_dim)
        self.dtype = getattr(torch, recipe.workers.dtype)
        self.spread = parallelise(self.trainee, recipe, self.mesh, worker.device)
        watchdog.beat("its model")
        self.graphs = 0
        if worker.leads and (worker.world > 1 or self.spread.gives_up):
            tell(f"{self.mesh}; {self.spread}")
        lineage: tuple[Any, ...] = ()
        if job.parent is not None:
            parent = warm_start(self.trainee.dit, job.parent, recipe.after, stage=recipe.stage, encoders=facts.shared_encoders)
            lineage = parent.lineage
        self.facts = Facts(self.trainee.dit.config.to_dict(), facts.encoders, weights="ema", lineage=lineage)
        self.ema = Ema(self.trainee, recipe.optimizer.ema_decay)
        self.optimizer = _adamw(self.trainee, recipe)
        self.guard = SpikeGuard(recipe.optimizer.spike_ratio, recipe.optimizer.max_spikes, recipe.optimizer.max_grad_norm)
        self.measures = Measures()
        self.checkpoints = Checkpoints(
            str(job.folder / "checkpoints"),
            keep=recipe.schedule.keep_checkpoints,
            every=recipe.schedule.checkpoint_every_steps,
            record=record_of(recipe, self.facts),
        )
        self.progress = self.checkpoints.restore(self.trainee, self.ema, self.optimizer) or Progress(0)
        watchdog.beat("its checkpoint")
        self.sample_digest = facts.digest
        if self.progress.scalars.get("sample_digest", facts.digest) != facts.digest:
            raise UserError(
                f"the samples have changed since step {self.progress.step} of {recipe.stage}, so the order of its data cannot go "
                f"on: train into another --output, or delete {job.folder / 'checkpoints'} to begin anew"
            )
        if self.progress.spike_guard:
            self.guard.load_state_dict(self.progress.spike_guard)
        if "measures" in self.progress.scalars:
            self.measures.load(self.progress.scalars["measures"], worker)
        self.trained_s = float(self.progress.scalars.get("trained_s", 0.0))
        self.samples_seen, self.tokens_seen = self.progress.samples_seen, self.progress.tokens_seen
        self.trackers = trackers(recipe, job.folder, self.progress.step) if worker.leads else []
        wanted = recipe.sampling.every_steps and (recipe.sampling.prompts or recipe.task == "refine")
        self.previews = Previews(recipe, self.trainee.dit, job.folder / "samples") if wanted else None

    def to_the_end(self, report: Report) -> dict[str, Any]:
        """All steps that are left, then the export."""
        total, schedule = self.plan.total_steps(), self.recipe.schedule
        step = done = self.progress.step
        self.trainee.train()
        for step, drawn, batches in self._prefetched(done, done if self._out_of_time() else total):
            self.watchdog.beat(f"step {step}: examples")
            started = time.monotonic()
            numbers = self._step(step, total, drawn, batches)
            self.trained_s += self._agreed(time.monotonic() - started)
            last = step == total or self._out_of_time()
            if step % schedule.log_every_steps == 0 or last:
                numbers |= self.measures.report(self.worker) | self.stragglers.report() | self._compiled()
                fraction = self._fraction(step, total)
                report({"step": step, "total": total, "fraction": fraction, "seconds": self.trained_s, **numbers})
            self._log(step, numbers)
            if last or (schedule.validate_every_steps and step % schedule.validate_every_steps == 0):
                self._validate(step, report)
            if self.previews is not None and (last or step % self.recipe.sampling.every_steps == 0):
                self._preview(step)
            if self.worker.leads and (last or (schedule.validate_every_steps and step % schedule.validate_every_steps == 0)):
                draw_curve(self.job.folder, self.recipe.stage)
            if self.checkpoints.due(step) or last:
                self.checkpoints.save(self._progress_at(step), self.trainee, self.ema, self.optimizer)
                self.watchdog.beat(f"step {step}: checkpoint")
            if last:
                break
        with self.watchdog.paused("export"):
            digest = self._export(step)
        return {"stage": self.recipe.stage, "steps": step, "digest": digest, "skipped": self.guard.skipped}

    def _export(self, step: int) -> str:
        """Averaged weights, once the last checkpoint is written."""
        self.checkpoints.finish()
        with self.ema.swapped(self.trainee):
            facts = Facts(self.facts.model, self.facts.encoders, step, "ema", self.facts.lineage)
            weights = get_model_state_dict(self.trainee.dit)
            return export(str(self.job.export_folder), weights, self.recipe, facts, replace=True)

    def close(self) -> None:
        """Let go of trackers."""
        for tracker in self.trackers:
            tracker.close()

    def _step(self, step: int, total: int, drawn: Step, batches: Sequence[Sequence[Example]]) -> dict[str, Any]:
        """One update of the weights, number `step` (from 1)."""
        samples = sum(len(batch) for batch in drawn.micro_batches)
        own = len(drawn.share(self.worker.data_rank, self.worker.data_workers))
        loss = torch.zeros((), dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches):
            examples = [example.to(self.worker.device) for example in batch]
            self.spread.prepare(sum(example.tokens for example in batch) // self.worker.sequence)
            with self._autocast():
                losses = self.trainee(examples)
            # Workers average their gradients, so each multiplies by their number: the mean is over the samples of the step.
            # Those of a sequence group have the same loss, and theirs count once.
            weight = self.worker.data_workers / samples if number < own else 0.0
            reduce_over_replicas(self.trainee, number == len(batches) - 1)
            (losses.total.sum() * weight).backward()
            self.watchdog.beat(f"step {step}: micro-batch {number + 1} of {len(batches)}")
            if number < own and self.worker.counts:
                loss += losses.total.detach().double().sum().cpu() / samples
                self.measures.add(batch, losses)
        loss = self.worker.sum(loss)
        rate = self.recipe.optimizer.lr * self._rate_factor(step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm_value = self._clip()
        self.samples_seen += samples
        self.tokens_seen += self.plan.tokens(drawn)
        accepted = self.guard.accepts(step, float(loss), norm_value)
        if accepted:
            self.optimizer.step()
            self.ema.update(self.trainee, step)
        numbers = {"loss": float(loss), "grad_norm": norm_value, "lr": rate, "samples": samples, "bucket": drawn.bucket}
        return numbers if accepted else {**numbers, "skipped": 1}

    def _clip(self) -> float:
        """Clip the gradients; returns their norm before. Replicas sum it up each by themselves, and must not differ in a bit."""
        parameters = [p for p in self.trainee.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if self.mesh.replicate > 1:
            value = self.worker.most(value if math.isfinite(value) else math.inf)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.optimizer.max_grad_norm, torch.tensor(value))
        return value

    def _compiled(self) -> dict[str, float]:
        """What compiling has taken so far; said aloud where it has grown."""
        if not self.recipe.parallel.compile:
            return {}
        found = warm_up_report()
        if found["graphs"] > self.graphs and self.worker.leads:
            self.tell(f"blocks are compiled: {found['graphs']} graphs so far, {found['seconds']:.0f} s")
        self.graphs = found["graphs"]
        return {"compiled/graphs": found["graphs"], "compiled/seconds": found["seconds"]}

    def _prefetched(self, start: int, total: int) -> Iterator[tuple[int, Step, list[list[Example]]]]:
        """Steps after `start`, numbered from 1; the next one's examples are made while the last one is computed."""
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self._examples, start) if start < total else None
            for index in range(start, total):
                assert waiting is not None
                started = time.monotonic()
                drawn, batches = waiting.result()
                self.stragglers.add("data", time.monotonic() - started)
                waiting = pool.submit(self._examples, index + 1) if index + 1 < total else None
                yield index + 1, drawn, batches

    def _examples(self, index: int) -> tuple[Step, list[list[Example]]]:
        """The step's micro-batches of this worker. All workers get equally many, as sharded weights ask for: one with less work
        computes the step's cheapest micro-batch again, with weight 0."""
        epoch, within = self.plan.locate(index)
        drawn = self.plan.steps(epoch)[within]
        share = list(drawn.share(self.worker.data_rank, self.worker.data_workers))
        most = -(-len(drawn.micro_batches) // self.worker.data_workers)
        share += [drawn.cheapest] * (most - len(share))
        return drawn, [[self._example(draw) for draw in batch] for batch in share]

    def _example(self, draw: Draw) -> Example:
        seed = (self.recipe.data.seed, self.recipe.stage, draw.epoch, self.ids[draw.row], draw.repeat)
        return self.conditioner.example(self.source[draw.row], generator_of(*seed))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32 or self.worker.world > 1:  # sharded weights are cast by FSDP
            return nullcontext()
        return torch.autocast(self.worker.device.split(":")[0], dtype=self.dtype)

    def _fraction(self, step: int, total: int) -> float:
        """How much of the stage is done: by steps, or by time where `max_minutes` will end it sooner."""
        minutes = self.recipe.schedule.max_minutes
        return min(1.0, max(step / total, 0.0 if minutes is None else self.trained_s / (60 * minutes)))

    def _out_of_time(self) -> bool:
        minutes = self.recipe.schedule.max_minutes
        return minutes is not None and self.trained_s >= 60 * minutes

    def _rate_factor(self, step: int, total: int) -> float:
        optimizer = self.recipe.optimizer
        warm = min(1.0, step / max(1, optimizer.warmup_steps))
        if not optimizer.cooldown_share:
            return warm
        return min(warm, max(0.0, (1 - self._fraction(step - 1, total)) / optimizer.cooldown_share))

    def _agreed(self, seconds: float) -> float:
        """Workers must not differ on when time is up; without a limit nobody need ask."""
        return seconds if self.recipe.schedule.max_minutes is None else self.worker.most(seconds)

    def _validate(self, step: int, report: Report) -> None:
        self.trainee.eval()
        with self.watchdog.paused(f"step {step}: held-out loss"), self.ema.swapped(self.trainee), self._autocast():
            held_out = self.plan.held_out()
            found = held_out_losses(self.trainee, held_out, self.source, self.conditioner, self.worker)
        self.trainee.train()
        if found:  # a small collection may have no source to spare
            self._log(step, found)
            report({"step": step, **found})

    def _preview(self, step: int) -> None:
        assert self.previews is not None
        self.trainee.eval()
        with self.watchdog.paused(f"step {step}: samples"), self.ema.swapped(self.trainee), self._autocast():
            if self.recipe.task == "refine":
                rows = [draw.row for batch in self.plan.held_out() for draw in batch] or list(range(len(self.ids)))
                self.previews.refine(step, [self.source[row] for row in rows[:4]], write=self.worker.leads)
            else:
                self.previews.make(step, write=self.worker.leads)
        self.trainee.train()

    def _log(self, step: int, numbers: dict[str, Any]) -> None:
        """The first tracker (the file) takes every step, the others what was reported."""
        for number, tracker in enumerate(self.trackers):
            if number == 0:
                tracker.log(step, numbers)
            elif step % self.recipe.schedule.log_every_steps == 0 or "held_out/loss" in numbers:
                tracker.log(step, {k: v for k, v in numbers.items() if isinstance(v, int | float)})

    def _progress_at(self, step: int) -> Progress:
        epoch, within = self.plan.locate(step - 1)
        state = {"measures": self.measures.state(self.worker), "trained_s": self.trained_s, "sample_digest": self.sample_digest}
        seen = (self.samples_seen, self.tokens_seen)
        return Progress(step, epoch, within + 1, *seen, scalars=state, spike_guard=self.guard.state_dict())


def _adamw(trainee: Trainee, recipe: Recipe) -> torch.optim.AdamW:
    """Weight decay for matrices only: biases, norms and position vectors are left alone."""
    named = [(name, p) for name, p in trainee.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim > 1 and ".positions." not in name]
    others = [p for name, p in named if p.ndim <= 1 or ".positions." in name]
    groups = [{"params": matrices, "weight_decay": recipe.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = next(trainee.parameters()).is_cuda  # one kernel, and no copy of a shard beside it
    return torch.optim.AdamW(groups, fused=fused, lr=recipe.optimizer.lr, betas=recipe.optimizer.betas, eps=recipe.optimizer.eps)
