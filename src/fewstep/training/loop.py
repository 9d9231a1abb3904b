"""The training loop: devices, processes, accumulation, averages, logs, checkpoints, exact resume.

The only place that knows of them. Randomness is a function of (seed, step, index in the global batch), so a resumed
run equals an unbroken one, and several processes equal one.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self, cast

import torch
from accelerate import DistributedDataParallelKwargs
from torch import Tensor, nn

from fewstep.data.base import Dataset
from fewstep.networks.attention_kernel import tangent_kernel
from fewstep.objectives import Batch, Companions
from fewstep.recipes.config import RunConfig
from fewstep.training.batches import fetch_part, on_device
from fewstep.training.callbacks import Callback, TrainingResult, start_of
from fewstep.training.checkpoint import STATE_FILE, mark_shown
from fewstep.training.claim import begin, hold
from fewstep.training.clock import Clock
from fewstep.training.compiling import check_compiling, compile_steps
from fewstep.training.flops import StepCost
from fewstep.training.gan import GAN
from fewstep.training.gradient_stats import term_norms
from fewstep.training.learner import Learner
from fewstep.training.loader import Loader, Shares
from fewstep.training.log import StepValues, Window, diverged, last_good, progress_bar, show_progress
from fewstep.training.memory import memory_words, peak_memory
from fewstep.training.optimizers import never_risen, risen
from fewstep.training.parallel import Agreement, ProcessGroup, Replicated, join_processes, share_out, split_batch
from fewstep.training.peers import Peers
from fewstep.training.probe import differentiable
from fewstep.training.profiling import PROFILE, StepProfile
from fewstep.training.run_folder import RunFolder
from fewstep.training.settings import Callbacks, Runtime
from fewstep.training.setup import build, check_checkpoint, check_context, check_run, checkpoint_blocks, data_record
from fewstep.training.statistics import first_statistics
from fewstep.training.step import Gradients, TrainStep, seed_layers
from fewstep.training.stopping import StopSignals
from fewstep.training.teacher import SlowAverage, fingerprint, teacher_of
from fewstep.training.trackers import check_trackers, start_trackers
from fewstep.training.trajectories import run_measures
from fewstep.utils.errors import CheckpointError, ConfigError, DataError, FewstepWarning, TrainingDivergedError
from fewstep.utils.precision import float32_products
from fewstep.utils.serialization import JSON


def train_run(
    config: RunConfig,
    dataset: Dataset,
    run: RunFolder,
    runtime: Runtime = Runtime(),
    callbacks: Callbacks = Callbacks(),
) -> TrainingResult:
    """Train, or go on from the newest checkpoint, until the recipe's images are seen.

    Raises ConfigError for a batch that does not split over the processes, CheckpointError for a folder that holds
    another run, cannot be written or is being trained in by another process, TrainingDivergedError for a loss or
    gradient that is not finite, Stopped after a signal. Leaves torch's random numbers as they were.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    products, kernel = float32_products(runtime.tf32), tangent_kernel(runtime.attention_kernel)
    with products, kernel, Trainer(config, dataset, run, runtime, callbacks) as trainer:
        return trainer.run_to_end()


class Trainer:
    """One run in progress; `with Trainer(...) as trainer:` lets others train in its folder at the end, as `release`."""

    def __init__(
        self, config: RunConfig, dataset: Dataset, run: RunFolder, runtime: Runtime, callbacks: Callbacks
    ) -> None:
        self.config, self.dataset, self.run, self.runtime, self.callbacks = config, dataset, run, runtime, callbacks
        if dataset.doubt and not run.config_file.exists():
            raise DataError(dataset.doubt)
        check_trackers(runtime.track)
        self.accelerator = join_processes(
            runtime.cpu,
            [DistributedDataParallelKwargs(broadcast_buffers=False)],
            log_with=list(runtime.track) or None,
            project_dir=str(run.root / "tensorboard"),
        )
        self.group = ProcessGroup.of(self.accelerator)
        self.share, self.accumulation = split_batch(
            config.training.batch_size, self.accelerator.num_processes, runtime.micro_batch
        )
        self.agreement = Agreement(self.group.count)
        self.cost = StepCost(self.accelerator.device, 1e12 * runtime.peak_tflops, runtime.tf32)
        self.held = share_out(self.accelerator, config) if runtime.shard else Replicated(self.accelerator)
        self.device: torch.device = self.accelerator.device
        self.hidden = runtime.quiet or not self.accelerator.is_main_process
        self.clip = config.optimizer.clip or math.inf
        self.micro = self.share // self.accumulation
        check_run(config, dataset, self.micro)
        place = int(self.accelerator.process_index) * self.share, self.micro, self.accumulation
        self.loader = Loader(Shares(dataset.train, config.training, *place), self.device, runtime.workers)
        teacher = teacher_of(config, dataset)
        self.teacher = None if teacher is None else teacher.to(self.accelerator.device)
        identity = None if teacher is None else fingerprint(teacher)
        main = self.accelerator.is_main_process
        self.peers = Peers(run.way_on, self.group.index, self.group.count, self.agreement)
        self.lock = None
        try:
            self.lock = hold(run, config, data_record(dataset), identity) if main else None
            if runtime.from_step and main:
                run.go_back(runtime.from_step)
            self.accelerator.wait_for_everyone()
            self.prepare()
            if main:
                begin(run, config, data_record(dataset), identity)
            self.take_up()
            self.window = Window(self.clip)
            start_trackers(self.accelerator, config, run.root, self.clock.images)
        except BaseException as error:
            if self.lock is not None and not run.config_file.exists():
                self.lock.discard()  # a run that cannot begin leaves no folder
            self.__exit__(type(error), error, None)
            raise

    def prepare(self) -> None:
        """Make everything that steps need, as it is before the first."""
        config, dataset, device = self.config, self.dataset, self.accelerator.device
        if self.run.checkpoints():
            newest = self.run.last_checkpoint()
            with self.run.with_way_back(newest):
                check_checkpoint(config, dataset, newest)
            config = replace(config, initial="")  # a checkpoint has what has become of it
        statistics = first_statistics(config, dataset, self.run, self.teacher, device, self.group, self.hidden)
        measured = run_measures(config, dataset, self.run, self.teacher, self.group, self.hidden)
        pipeline = build(config, dataset, self.teacher, statistics, measured).to(device)
        if self.runtime.gradient_checkpointing:
            checkpoint_blocks(config, pipeline.flow_map)
        if self.runtime.compile:
            check_compiling(pipeline.flow_map.network, device)
        check_context(config, dataset, pipeline.flow_map, warn=self.accelerator.is_main_process)
        if config.objective.measures_features and self.callbacks.features is None:
            raise ConfigError("the objective compares features: give the training loop an extractor (Callbacks)")
        gan = None
        if config.objective.needs_discriminator:
            shape, classes, seed = dataset.shape, dataset.num_classes, config.training.seed
            gan = GAN(config.gan, shape, classes, seed, device, self.mean_over_processes)
        self.clock, self.pending = Clock(config.training), False
        loud, bf16 = self.accelerator.is_main_process, config.training.precision == "bf16"
        chosen = self.run.state()["derivative"] if self.run.checkpoints() else None
        objective, self.derivative = differentiable(
            config.objective, chosen, pipeline.flow_map, lambda: self.batch(0, 2), bf16, loud
        )
        decay = config.objective.target_decay
        target = None if decay is None else SlowAverage(pipeline.flow_map, decay)
        self.loss = TrainStep(pipeline.flow_map, objective, bf16)
        beside = [each.network for each in (self.teacher, None if target is None else target.flow_map) if each]
        self.module = self.held.wrap(self.loss, beside)
        self.learner = Learner(config, pipeline, statistics, gan, target, self.held, self.runtime.averages_on_cpu)
        self.stops = StopSignals(silent=not self.accelerator.is_main_process)
        self.stopping, self.late, self.saved = False, False, time.monotonic()
        if self.runtime.compile:
            compile_steps(self.loss, self.try_step, self.hidden)

    def try_step(self, step: int) -> None:
        """The losses of a step's batch and their gradients, which are not kept."""
        with self.held.gathered():
            for part in range(self.accumulation):
                first = int(self.accelerator.process_index) * self.share + part * self.micro
                last = part == self.accumulation - 1
                with self.held.accumulating(self.module, last), self.cost.counting():
                    self.accelerator.backward(self.module(self.batch(first, self.micro, step), self.companions())[0])
        self.learner.optimizers.zero_grad()
        self.cost.counted()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        lost = self.peers.explanation(error)
        self.release(error)
        if lost is not None:
            raise lost from error

    def take_up(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        self.accelerator.wait_for_everyone()
        if self.run.checkpoints():
            newest = self.run.last_checkpoint()
            with self.run.with_way_back(newest):
                state = self.learner.load(newest)
                if newest != self.run.checkpoint(state["step"]):
                    raise CheckpointError(f"{newest} says that it is of step {state['step']}")
            self.clock.take_up(state["step"], state["seconds"])
            self.pending = state["pending"]
        elif self.accelerator.is_main_process:
            self.run.warn_of_torn("the training begins anew")
        if self.accelerator.is_main_process:
            self.run.truncate_log(self.clock.step)

    def release(self, error: BaseException | None = None) -> None:
        """End the processes that read data, close the trackers, and let others train in the run's folder."""
        self.peers.close(error)
        self.loader.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()
        if self.lock is not None:
            self.lock.release()

    def companions(self) -> Companions:
        """What the objective may consult at this step."""
        begun = self.clock.images >= self.config.gan.start_images
        target, gan = self.learner.target, self.learner.gan
        return Companions(
            teacher=self.teacher,
            ema_target=None if target is None else target.flow_map,
            perceptual_features=self.callbacks.features,
            discriminator=gan.score if gan is not None and begun else None,
            average=self.mean_over_processes,
        )

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean of a tensor that every process has."""
        return cast(Tensor, self.accelerator.reduce(value, "mean"))

    def run_to_end(self) -> TrainingResult:
        """Take steps until finished; the last one is always saved."""
        settings, device, main = self.config.training, self.device, self.accelerator.is_main_process
        self.learner.flow_map.train()
        seeded = torch.random.fork_rng([device] if device.type == "cuda" else [])
        network, step, compiled = self.learner.flow_map.network, self.clock.step, self.runtime.compile
        begun = start_of(self.config, network, device, self.group.count, step, compiled)
        self.tell(lambda each: each.start(begun))
        profiled = StepProfile(self.run.root / PROFILE, device, self.runtime.profile and main)
        shown = progress_bar(self.clock, self.config.recipe, self.hidden, begun.unit)
        with profiled, seeded, shown as bar, self.stops, self.last_words():
            if self.pending:  # what an earlier start saved, and was stopped before it showed it
                self.show()
            while not self.clock.finished:
                start = time.perf_counter()
                self.take_step()
                spent = self.clock.seconds + time.perf_counter() - start
                self.clock.seconds = self.agreement.first(spent) if settings.seconds else spent  # all stop alike
                show_progress(
                    bar, self.clock, self.window.last_loss, self.loader.waited / self.window.seconds, self.cost
                )
                profiled.step()
                moment = self.clock.moment(self.window.latest)
                self.tell(lambda each, moment=moment: each.step(moment))  # type: ignore[misc]
                if self.window.full:
                    self.read()
                if self.clock.due(settings.log_images):
                    self.write_log()
                if self.clock.due(settings.checkpoint_images) or self.stopping or self.late:
                    self.save()
                if self.stopping:
                    raise self.stops.ending(self.clock.step, self.run.going_on)
                self.show()
            if self.stops.received is not None:  # while the last grid or point was made
                raise self.stops.ending(self.clock.step, self.run.going_on)
        if main and (share := risen(self.config.optimizer, self.clock.images, self.clock.progress)) < 1:
            warnings.warn(never_risen(share, self.config.optimizer), FewstepWarning, stacklevel=2)
        result = TrainingResult(self.clock.step, self.clock.images, self.clock.seconds, main, memory_words(device))
        self.tell(lambda each: each.end(result))
        return result

    def tell(self, event: Callable[[Callback], None]) -> None:
        """Call an event of the caller's callbacks, on the main process."""
        for each in self.callbacks.also if self.accelerator.is_main_process else ():
            event(each)

    def take_step(self) -> None:
        """One update from the global batch of this step; what it leaves waits on the device for `read`."""
        with self.held.gathered():
            found = self.accumulate()
        old = 0 < self.config.training.checkpoint_seconds < time.monotonic() - self.saved
        self.stopping, self.late = self.agreement.any(self.stops.received is not None, old)  # all after the same step
        loss = self.mean_over_processes(found.loss)
        norm, layers = self.held.clip(self.learner.flow_map.network, self.clip)
        discriminator_norm, gan = None, self.learner.gan
        if gan is not None and found.discriminator:
            found.discriminator = gan.averaged(found.discriminator, self.accumulation)
            discriminator_norm = nn.utils.get_total_norm(found.discriminator)
        self.clock.step += 1
        factor = self.learner.update(self.clock.step, self.clock.images, self.clock.progress, found.discriminator)
        lr = factor * self.config.optimizer.lr
        self.window.observe(StepValues(self.clock.step, loss, norm, lr, discriminator_norm, found.times, layers=layers))
        refresh = self.clock.due(self.config.statistics.refresh_images) and not self.clock.finished
        if self.config.model.preconditioning.needs_statistics and refresh:
            self.read()
            self.learner.refresh_statistics(self.dataset, self.config.statistics, self.group, self.clock.step)

    def read(self) -> None:
        """Look at what steps have left: once a line of the log, and before anything is saved, shown or measured.

        Raises TrainingDivergedError for the first that was not finite; the clock is set back to the one before it, and
        the weights in memory are of no use.
        """
        found = self.window.read()
        if found is not None:
            self.clock.step = found.step - 1
            raise diverged(self.run, found, self.window.recent, self.learner.flow_map.network)

    def accumulate(self) -> Gradients:
        """The gradients of this process's share of the batch, part by part; processes meet at the last."""
        self.learner.optimizers.zero_grad()
        companions = self.companions()
        # What layers draw by themselves (dropout): another for every step and process, the same on resume.
        index = int(self.accelerator.process_index)
        seed_layers(((self.config.training.seed << 44) + (self.clock.step << 12) + index) % 2**63, self.device)
        found = Gradients(torch.zeros((), device=self.accelerator.device))
        for part in range(self.accumulation):
            batch = self.loader.batch(self.clock.step, part)
            last = part == self.accumulation - 1
            with self.held.accumulating(self.module, last):
                with self.cost.counting():
                    loss, terms, times, logs, generated = self.module(batch, companions)
                if part == 0 and self.clock.ends_line:
                    self.window.term_norms = term_norms(terms, list(self.learner.flow_map.network.parameters()))
                with self.cost.counting():
                    self.accelerator.backward(loss / self.accumulation)
            gan = self.learner.gan
            if gan is not None and companions.discriminator is not None and generated is not None:
                logs["discriminator"] = gan.learn(found.discriminator, batch.x0, *generated)
            found.loss = found.loss + loss.detach() / self.accumulation
            found.times.append(times)
            self.window.add_terms(logs)
        self.cost.counted()
        return found

    def batch(self, first: int, count: int, step: int | None = None) -> Batch:
        """Samples first .. first + count - 1 of a step's global batch, this step's where none is given."""
        settings, step, part = self.config.training, self.clock.step if step is None else step, (first, count)
        return on_device(fetch_part(self.dataset.train, settings, step, part), settings, step, part, self.device)

    def write_log(self) -> None:
        """One line of log.jsonl: means over the steps since the last, if there were any."""
        self.read()
        if not self.window.steps:
            return
        waited = round(self.loader.wait_of(self.window.seconds), 3)
        record = self.window.flush(self.config.training.batch_size, self.clock) | {"data_wait": waited}
        record |= self.cost.at(record["images_per_second"] / self.config.training.batch_size)
        record["peak_memory_mib"] = round(peak_memory(self.accelerator.device), 1)
        record |= {"compiled": True} if self.runtime.compile else {}
        if self.accelerator.is_main_process:
            self.run.append_log(record)
        self.tell(lambda each: each.log(record))
        self.accelerator.log(record, step=self.clock.images)

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """A divergence within is the log's last line, after the one that had begun."""
        try:
            yield
        except TrainingDivergedError as error:
            self.write_log()
            if self.accelerator.is_main_process:
                seen = self.clock.seen | {"step": self.clock.step + 1, "seconds": round(self.clock.seconds, 3)}
                self.run.append_log(seen | {"diverged": str(error)})
            raise

    def save(self) -> None:
        """A checkpoint of this step; raises TrainingDivergedError for one that is not finite."""
        self.accelerator.wait_for_everyone()
        self.read()
        try:
            self.learner.check_finite()
        except CheckpointError as error:
            raise TrainingDivergedError(f"after step {self.clock.step}, {error}; {last_good(self.run)}") from error
        pending = bool(self.callbacks.due(self.clock.due, self.config))
        state: dict[str, JSON] = {**self.clock.seen, "pending": pending, "derivative": self.derivative}
        main = self.accelerator.is_main_process
        self.learner.save(self.run.checkpoint(self.clock.step), state, main)
        if main:
            self.run.keep_newest(self.config.training.keep)
        self.saved = time.monotonic()
        self.tell(lambda each: each.checkpoint(self.run.checkpoint(self.clock.step), self.clock.step))

    def show(self) -> None:
        """Hand the averaged model to the watchers that are due; a checkpoint of this step then has nothing pending."""
        if self.clock.due(self.config.training.sample_images) or self.clock.due(self.config.evaluation.curve_images):
            self.read()
        main, watchers = self.accelerator.is_main_process, self.callbacks.due(self.clock.due, self.config)
        if watchers:
            with self.learner.averaged() as model:
                for watch in watchers if main else ():
                    watch(model, self.clock.step)
        checkpoint = self.run.checkpoint(self.clock.step)
        if main and watchers and (checkpoint / STATE_FILE).is_file():
            mark_shown(checkpoint)
