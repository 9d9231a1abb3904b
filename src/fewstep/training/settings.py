"""What a run is given beside its recipe."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training.callbacks import Callback
from fewstep.utils.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb", "trackio"]
Watcher = Callable[[Pipeline, int], None]
"""Called with the averaged model and the step when samples are due; on the main process alone."""


@dataclass(frozen=True)
class Runtime:
    """Where the run happens; does not decide the weights, but for `micro_batch` with CTM's balance, taken a part."""

    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""
    micro_batch: int = 0
    """Largest batch a process takes at once; 0 takes its whole share. The global batch stays the recipe's."""
    shard: bool = False
    """Share weights, averages, optimizer and teacher out over the processes (FSDP2) in place of a copy in each."""
    averages_on_cpu: bool = False
    """Keep the averages of weights in the CPU's memory, where they are updated while a GPU goes on."""
    compile: bool = False
    """Compile the network and its derivatives before the first step (torch.compile), for quicker ones; on a CPU it
    needs a C++ compiler, such as g++."""
    gradient_checkpointing: bool = False
    """Keep no activations within the network's blocks: less memory, about a third more time, the same losses."""
    tf32: bool = False
    """Let a GPU round the factors of float32 products to TF32's 10 bits, which is several times as quick; finite
    differences stay exact. Without it float32 is exact."""
    attention_kernel: bool = True
    """On a GPU in bf16 take the derivative of attention by the kernel of jvp-flash-attention, where that is installed
    (extra [gpu]) and serves."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    workers: int = 0
    """Processes that fetch, decode and mirror batches ahead of the training, which is the same with any number; 0 does
    it between steps. Several help where images are decoded (--data.source.on-disk)."""
    peak_tflops: float = 0.0
    """What the device can do at most, in 10^12 FLOP/s: the log then has the share that training reaches. 0 takes it by
    the name of a GPU; where it is not known the log has FLOP/s alone."""
    profile: bool = False
    """Watch ten steps, after five to warm up: their trace in the run's profile.json, and what took longest; for short
    --profile."""
    track: tuple[TrackerName, ...] = ()
    """Also log to these experiment trackers, for short --track (extra [track]); wandb and trackio read their own
    settings from the environment, such as WANDB_MODE=offline."""
    quiet: bool = False
    """No progress bar."""
    from_step: int = 0
    """Go on from the checkpoint of this step, for short --from, and set newer ones aside; 0 for the newest."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(f"{self.threads} threads asked for: give at least 1, or 0 for torch's choice")
        if self.shard and self.averages_on_cpu:
            raise ConfigError("--runtime.shard shares averages out over the GPUs: leave out --runtime.averages-on-cpu")
        if not 0 <= self.peak_tflops < math.inf:
            raise ConfigError(f"peak_tflops is {self.peak_tflops}; give a number above 0, or 0 for that of the device")
        if self.workers < 0:
            raise ConfigError(f"{self.workers} workers asked for: give at least 1, or 0 to read data between steps")


@dataclass(frozen=True)
class Callbacks:
    """What the caller adds to a run without deciding where it happens.

    watch: called when samples are due. curve: called when a point of the learning curve is due. features: images to
    features with gradient, for objectives that compare them. also: told of events, in this order.
    """

    watch: Watcher | None = None
    curve: Watcher | None = None
    features: Callable[[Tensor], Tensor] | None = None
    also: tuple[Callback, ...] = ()

    def due(self, after: Callable[[int], bool], config: RunConfig) -> list[Watcher]:
        """Those that are due; after: whether so many images have gone by once more."""
        grids = [*([self.watch] if self.watch else []), *(each.sample for each in self.also if each.samples)]
        curves = [self.curve] if self.curve else []
        every = ((grids, config.training.sample_images), (curves, config.evaluation.curve_images))
        return [watch for watchers, images in every if after(images) for watch in watchers]
