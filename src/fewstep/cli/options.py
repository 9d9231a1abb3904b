"""The options of every command, as typed values that the command line fills in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.data.latents.shards import EncodingSettings, Posterior, StoredType
from fewstep.recipes.config import RunConfig
from fewstep.sampling.generate import Spacing
from fewstep.sampling.step_times import SamplerName
from fewstep.training.settings import Runtime


@dataclass(frozen=True)
class QuickstartOptions:
    """Train iSD-T and flow matching on real digits for the same seconds, print their figures, write a report."""

    out: Path = Path("runs/quickstart")
    """Folder of the run; started again on it, the command goes on where it stopped."""
    seconds: float = 85.0
    """Longest training time of each of the two methods."""
    runtime: Runtime = field(default_factory=Runtime)


@dataclass(frozen=True)
class PolicyQuickstartOptions:
    """Record demonstrations of a maze with two ways, train iSD, flow matching and regression, let them act, report."""

    out: Path = Path("runs/policy-quickstart")
    """Folder of the run; started again on it, the command goes on where it stopped."""
    seconds: float = 100.0
    """Longest training time of each of the three methods."""
    runtime: Runtime = field(default_factory=Runtime)


@dataclass(frozen=True)
class TrainOptions:
    """Train a recipe, or go on where it stopped."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; runs/RECIPE when not given."""
    runtime: Runtime = field(default_factory=Runtime)


_ENCODING = EncodingSettings()


@dataclass(frozen=True)
class EncodeOptions:
    """Encode a folder of images into latents, in shards, or go on where it was stopped: the same files come out.

    Repeat the same command to go on; batch size, device and where the autoencoder lies may change.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of PNG, JPEG or WebP images; its first-level subfolders, if it has any, are the classes."""
    autoencoder: Path
    """Folder of a diffusers AutoencoderKL (config.json and safetensors); nothing is downloaded."""
    out: Path
    """Folder for the latents, which `fewstep train RECIPE --data.source latents --data.root OUT` reads."""
    image_size: int = _ENCODING.image_size
    """Side of the square that images are resized and cut to."""
    flip: bool = _ENCODING.flip
    """Store the latent of every mirrored image too, for training with flips: latents cannot be mirrored exactly."""
    posterior: Posterior = _ENCODING.posterior
    """sample: one draw from each image's posterior, decided by the seed and the image's number; mean: its mean."""
    dtype: StoredType = _ENCODING.dtype
    """Number format of the stored latents."""
    shard_size: int = _ENCODING.shard_size
    """Images in a shard: what is lost at most when the command is stopped."""
    heldout: float = _ENCODING.heldout
    """Fraction held out of training, evenly over classes."""
    seed: int = _ENCODING.seed
    """Of the posterior's draws and of the split."""
    std: float = 1.0
    """Standard deviation that each channel is given when it is read; may be changed later by the same command."""
    batch_size: int = 16
    """Images that pass the autoencoder at once."""
    skip_unreadable: bool = False
    """Warn about unreadable images instead of failing."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True)
class SampleOptions:
    """Draw images from a run. The same seed gives the same noise to sample k, whatever the number of images."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a saved model."""
    out: Path | None = None
    """FILE.png for a grid, FILE.npz for arrays, or a folder for single PNGs; when not given samples-SEED.png in RUN, or
    samples-SEED-WEIGHTS.png."""
    count: int = 64
    """Number of images."""
    weights: str = ""
    """Which of the run's weights: the name of an EMA, such as power-0.1, or last, those of the last step; the first EMA
    when not given. A name that the run does not have shows those it has."""
    steps: int = 2
    """Steps; the map sampler makes one network call each."""
    sampler: SamplerName | None = None
    """map: jumps; gamma: CTM's gamma-sampling; euler, heun: the ODE itself. Not given: the one that the run is measured
    by; the map for a saved model."""
    spacing: Spacing = "auto"
    """auto: the times that `fewstep tune-steps` found for this model, sampler, guidance and number of steps; without
    any, as for these two: uniform on the path's clock, or on the EDM path edm, EDM's noise levels (rho = 7)."""
    gamma: float | None = None
    """For the gamma sampler: 0 is deterministic, 1 re-noises fully. Not given: the run's own, or 0.5."""
    times: tuple[float, ...] = ()
    """The times to walk through in the path's clock, falling; overrides steps and spacing."""
    label: tuple[int, ...] = ()
    """Class of each image, repeated as needed, -1 for none; all classes in turn when not given."""
    omega: float | None = None
    """Guidance strength: a model trained with drawn guidance takes it as an input, any other pays a second call. Not
    given: the one that the run is measured by; for a saved model the one that all its tuned times are for, else 1."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Where guidance acts, as fractions of the path's range."""
    seed: int = 0
    """Decides the noise that samples start from."""
    columns: int = 8
    """Images per row of a grid."""
    batch_size: int = 512
    """Images drawn at once."""
    latents: bool = False
    """Leave latents as they are: FILE.npz then holds `latents` in the autoencoder's own units instead of images."""
    autoencoder: Path | None = None
    """Where the autoencoder that decodes latents lies now; where it lay when they were encoded when not given."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""


@dataclass(frozen=True)
class DemosOptions:
    """Record demonstrations of a task's expert, or import them: episodes of observations and actions in one file.

    The same command records the same demonstrations. Starts from 100000 on are kept for `fewstep rollout`.
    """

    task: Annotated[str, tyro.conf.Positional] = ""
    """Task to record; a name of your own when importing."""
    count: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """Demonstrations to keep, 100 when not given; episodes that miss the goal are dropped and counted."""
    out: Path | None = None
    """FILE.safetensors or FILE.npz; demos/TASK.safetensors when not given."""
    first_seed: int | None = None
    """Start of the first episode; 0 when not given."""
    from_minari: Path | None = None
    """Folder or HDF5 file of a Minari data set to import."""
    from_robomimic: Path | None = None
    """HDF5 file of robomimic to import."""
    keys: tuple[str, ...] = ()
    """Which observations to take of an imported file, in this order, where it has several."""
    split: str = ""
    """Which episodes to take of a robomimic file: the name of a list that it holds, such as train. Not given: all."""
    quiet: bool = False
    """No progress line."""


@dataclass(frozen=True)
class RolloutOptions:
    """Let a policy act in its task: success with its Wilson interval, mean length, time per decision.

    Simulations go in lockstep, one batched network call a chunk. No demonstration had the usual starts, from 100000 on.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a saved model."""
    episodes: int = 50
    """Number of episodes to act in."""
    steps: tuple[int, ...] = ()
    """Network calls a decision; several are measured in turn. Not given: the recipe's."""
    task: str = ""
    """Task to act in; the one that the demonstrations are of when not given."""
    seed: int = 0
    """Of the policy's noise."""
    first_seed: int = FIRST_TEST_SEED
    """Start of the first episode; the others follow. Those below 100000 are what demonstrations start from."""
    expert: bool = False
    """Also measure the task's expert at the same starts."""
    film: bool = False
    """Also draw the first episode, with the first step count: film.gif and filmstrip.png in the run's folder."""
    at_once: int = 25
    """Simulations held at the same time."""
    threads: int = 1
    """CPU threads of the network; one is the fastest for a policy's small one."""
    quiet: bool = False
    """No progress line."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run's samples against held-out data: Frechet and kernel distance, precision, recall, accuracy."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    samples: int | None = None
    """Generated samples per measurement; like the options below, the recipe's own when not given."""
    steps: tuple[int, ...] = ()
    """Step counts of the run's own sampler."""
    weights: str = ""
    """Which of the run's weights: the name of an EMA, such as power-0.1, or last, those of the last step; the first EMA
    when not given. A name that the run does not have shows those it has."""
    omega: float | None = None
    """Guidance strength when sampling: choose it by the Frechet distance."""
    seed: int | None = None
    """Decides the noise that samples start from."""
    inception: Path | None = None
    """Weights of the Inception network (extra [eval]); without them the data set's own classifier is trained once."""
    teacher: Path | None = None
    """Where the teacher of a distilled run lies now; where it lay in training when not given."""
    autoencoder: Path | None = None
    """Where the autoencoder that decodes latents lies now; where it lay when they were encoded when not given."""


@dataclass(frozen=True)
class TuneStepsOptions:
    """Search the times at which a run's sampler takes few steps; `fewstep sample` uses them from then on.

    One half of the held-out data chooses them by the Frechet distance, the other half says what they gain: they are
    kept only if they win there by more than the gain's standard error. RUN/step_times.json has the figures.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    steps: tuple[int, ...] = (2, 4)
    """Step counts of the run's own sampler, each tuned apart."""
    samples: int | None = None
    """Samples drawn for every placement tried; as many as the recipe measures with when not given."""
    evaluations: int = 80
    """Placements tried at most for each step count."""
    omega: float | None = None
    """Guidance strength to tune for; the recipe's own when not given."""
    seed: int = 2000
    """Of the noise that the search draws from; the check draws from that of the next seed, evaluation from neither."""
    inception: Path | None = None
    """Weights of the Inception network (extra [eval]), as for `fewstep evaluate`."""
    autoencoder: Path | None = None
    """Where the autoencoder of latents lies now, as for `fewstep evaluate`."""


@dataclass(frozen=True)
class ReportOptions:
    """Write RUN/report.html: samples from the same noise, curves, quality against network calls, cost, settings."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    autoencoder: Path | None = None
    """Where the autoencoder that decodes latents lies now; where it lay when they were encoded when not given."""


@dataclass(frozen=True)
class StatisticsOptions:
    """Estimate the statistics of a teacher's trajectories, keep them in its folder and draw them; time a student.

    Points, samples, probes and the seed are the student's recipe's when not given, so that its training finds them.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the teacher's run."""
    points: int | None = None
    """Noise levels, uniform in lambda."""
    samples: int | None = None
    """Samples at each level."""
    probes: int | None = None
    """Rademacher probes of the trace; 0 uses Stein's identity; -1 is exact up to 64 dimensions, else one probe."""
    centred: bool = True
    """About the data's mean; otherwise about zero, as published."""
    shrink: bool = True
    """Draw uncertain estimates at high noise to their limit."""
    seed: int | None = None
    """Decides which samples are drawn, their noise and the probes."""
    student: str = ""
    """Recipe whose training the cost is compared with; the CTM recipe of this teacher's when not given."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""


@dataclass(frozen=True)
class CompareOptions:
    """Compare runs of one study by their learning curves (train them with --evaluation.curve-images).

    The first run's method is the baseline; runs that differ in the seed alone are replicates.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of at least two runs on the same data."""
    out: Path = Path("comparison")
    """Folder for comparison.html, comparison.png and comparison.json."""


@dataclass(frozen=True)
class ObjectivesOptions:
    """What every training objective compares, trusts and costs."""

    markdown: bool = False
    """Print the table of docs/reference/objectives.md."""
