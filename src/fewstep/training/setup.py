"""What a run is made of before its first step: the flow map and the record of its data; and whether it fits."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from fewstep.data.base import Dataset
from fewstep.data.draws import even_draw
from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.jumps import EulerPreconditioningConfig
from fewstep.flow.preconditioning.regression import Measured
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.networks.base import MOST_TENSORS, Network
from fewstep.networks.condition import Prompts
from fewstep.networks.discriminator import Discriminator
from fewstep.recipes.config import RunConfig, flow_map_config
from fewstep.sampling.pipeline import Pipeline, PipelineConfig
from fewstep.teachers.base_weights import on_base
from fewstep.teachers.second_time import TwoTimesNetwork
from fewstep.teachers.text import check_prompt_widths
from fewstep.training.checkpoint import DISCRIMINATOR_FILE, LAST_FILE
from fewstep.training.covariance import kept_measure
from fewstep.training.gan import WEIGHTS
from fewstep.training.teacher import start_from, teacher_place
from fewstep.utils.errors import ConfigError, FewstepWarning
from fewstep.utils.random import seeded
from fewstep.utils.serialization import JSON
from fewstep.utils.tensors import check_memory
from fewstep.utils.text import listed, quoted
from fewstep.utils.weights import check_shapes, read_shapes, shapes

_COPIES = 4
_EXAMPLES = 8
_PROMPT_ARRAYS = {f"array {name}" for name in ("text", "prompts", "captions", "prompt_embeds", "text_mask", "pooled")}


def data_record(dataset: Dataset) -> dict[str, JSON]:
    """What the data measured, stored with the run; a resume on other data is refused by it."""
    prompts: dict[str, JSON] = {} if dataset.text is None else {"prompts": dataset.text.pipeline}
    return prompts | {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "shape": list(dataset.shape),
        # Rounded: the last bits depend on the number of threads that summed.
        "sigma_data": float(f"{dataset.sigma_data:.9g}"),
        "classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "train": len(dataset.train),
        "heldout": len(dataset.heldout),
    }


def build(
    config: RunConfig,
    dataset: Dataset,
    teacher: FlowMap | None = None,
    statistics: TrajectoryStatistics | None = None,
    measured: Measured | None = None,
) -> Pipeline:
    """The run's model with the weights that its seed, or the model it starts from, gives.

    measured: what its skip is made of; not given, the data's covariance, measured here or found in the cache.
    Leaves torch's global generator as it was. Raises ConfigError for flips of data that hold no mirror images.
    """
    if config.training.flip and dataset.policy is not None:
        raise ConfigError("chunks of actions have no mirror images: train with --training.no-flip")
    if config.training.flip and not dataset.train.has_mirrors:
        raise ConfigError(
            f"the latents of {dataset.name} were encoded without mirrored images: encode with --flip, or train with "
            "--training.no-flip"
        )
    skip = config.model.preconditioning
    if measured is None and skip.covariance is not None and skip.regression is None:
        measured = Measured(kept_measure(dataset, skip.covariance, config.training.flip))
    policy, seen = dataset.policy, _observation(dataset)
    own = None if teacher is None else teacher.config
    settings = flow_map_config(
        config, dataset.shape, dataset.sigma_data, dataset.num_classes, statistics, seen, own, measured
    )
    settings = replace(settings, guided=config.objective.guided and dataset.conditional)
    if teacher is not None:
        settings = replace(settings, network=on_base(settings.network, teacher_place(config.teacher), teacher.network))
    with seeded(config.training.seed):
        flow_map = settings.build()
    if teacher is not None and isinstance(flow_map.network, TwoTimesNetwork) and flow_map.network.adapters is not None:
        flow_map.network.share_base(cast(TwoTimesNetwork, teacher.network))
    if config.objective.on_diagonal and isinstance(flow_map.network, Network):
        flow_map.network.freeze_second_time()
    if config.model.preconditioning.covariance is None and isinstance(flow_map.network, Network):
        flow_map.network.freeze_sight()
    start_from(config, flow_map, teacher)
    policy = None if policy is None else replace(policy, sampler=config.objective.acting)
    _check_prompts(flow_map, dataset)
    captions, prompts = _examples(dataset)
    samples = PipelineConfig(
        dataset.class_names, dataset.data_range, (), dataset.latents, policy, dataset.text, tuple(captions)
    )
    return Pipeline(flow_map, samples, prompts=prompts)


def untrained(config: RunConfig, dataset: Dataset, teacher: FlowMap | None) -> FlowMap:
    """The run's model as `build` makes it, with Euler's preconditioning in place of one that is measured first.

    So what does not fit is refused before minutes go into the measure. Raises what `build` raises.
    """
    model = replace(config.model, preconditioning=EulerPreconditioningConfig())
    return build(replace(config, model=model), dataset, teacher).flow_map


def _check_prompts(flow_map: FlowMap, dataset: Dataset) -> None:
    """Raise ConfigError where the network does not take the prompts that the data come with."""
    widths = flow_map.network.prompt_widths if isinstance(flow_map.network, Network) else (0, 0)
    if dataset.text is not None and widths == (0, 0):
        raise ConfigError(f"{dataset.name} has prompts, which this network does not take: add --data.no-prompts")
    if dataset.text is not None:
        check_prompt_widths(dataset.text, widths, "this network")


def _examples(dataset: Dataset) -> tuple[list[str], Prompts | None]:
    """Captions of some held-out samples, and their prompts: what the model is asked for where nobody says."""
    rows = even_draw(dataset.heldout, _EXAMPLES, seed=0)
    return dataset.heldout.captions(rows), dataset.heldout.context(rows).prompts


def checkpoint_blocks(config: RunConfig, flow_map: FlowMap) -> None:
    """Keep no activations within the network's blocks for the backward pass.

    Raises ConfigError for a network that cannot, and for an objective whose exact derivative passes through them.
    """
    network, derivative = cast(Network, flow_map.network), getattr(config.objective, "derivative", None)
    exact = isinstance(derivative, Derivative) and derivative.kind == "exact"
    if exact and isinstance(network, Network) and not network.recomputes_tangents:
        raise ConfigError(
            f"gradient checkpointing saves nothing where {type(config.objective).__name__} takes its exact derivative "
            f"of {type(network).__name__}: set --objective.derivative.kind finite-difference, or leave it out"
        )
    network.checkpoint_blocks()


def check_context(config: RunConfig, dataset: Dataset, flow_map: FlowMap, warn: bool = True) -> None:
    """A FewstepWarning for a network of text on data without prompts, which are then nothing to it; else for training
    guidance on data without classes or prompts, where it has no effect.

    Raises ConfigError where such a run would be measured with guidance, which it could not be, and where a network of
    text would leave prompts beside its data unread.
    """
    if config.evaluation.guidance_scale != 1.0 and not dataset.conditional:
        raise ConfigError(
            f"{dataset.name} has no classes or prompts to guide samples to: leave --evaluation.guidance-scale at 1 (it "
            f"is {config.evaluation.guidance_scale:g})"
        )
    if unread := _unread_prompts(config, dataset, flow_map):
        raise ConfigError(
            f"{dataset.name} has {unread}, but does not say which text encoders made it: encode images with captions "
            "(fewstep encode), or train without prompts (--data.no-prompts)"
        )
    line = _without_prompts(config, dataset, flow_map) or _without_guidance(config, dataset)
    if warn and line:
        warnings.warn(line, FewstepWarning, stacklevel=5)


def _unread_prompts(config: RunConfig, dataset: Dataset, flow_map: FlowMap) -> str:
    """What of a data set seems to be prompts for a network of text and is left out; empty where nothing is."""
    if not config.data.prompts or not _takes_prompts(flow_map) or dataset.text is not None:
        return ""
    return listed([name for name in dataset.left_out if name in _PROMPT_ARRAYS])


def _takes_prompts(flow_map: FlowMap) -> bool:
    return isinstance(flow_map.network, Network) and flow_map.network.prompt_widths != (0, 0)


def _without_prompts(config: RunConfig, dataset: Dataset, flow_map: FlowMap) -> str:
    """What is wrong with data without prompts for a network of text, in a line; empty where nothing is."""
    if not _takes_prompts(flow_map) or dataset.text is not None:
        return ""
    if dataset.latents is not None and not config.data.prompts:
        return (
            f"{dataset.name} is read without prompts, and this network of text sees none: the student will not hear "
            "any; leave out --data.no-prompts"
        )
    return (
        f"{dataset.name} has no prompts, and this network of text is trained without: the student will not hear any; "
        "encode images with captions, of a folder or a Hugging Face dataset (fewstep encode FOLDER --teacher "
        f"{quoted(config.teacher or 'PIPELINE')})"
    )


def _without_guidance(config: RunConfig, dataset: Dataset) -> str:
    """That training guidance has no effect, in a line; empty where it has."""
    guidance = config.objective.guidance
    if not guidance.active or dataset.conditional:
        return ""
    off = f" ({guidance.turned_off_by} turns it off)" if guidance.turned_off_by else ""
    return f"{dataset.name} has no classes or prompts to guide to: training guidance{off} has no effect"


def check_run(config: RunConfig, dataset: Dataset, share: int) -> None:
    """Raise ConfigError where the network, or the `share` samples that a process takes at once, cannot fit into memory.

    The network counts four times: weights, gradients and the two moments of the optimiser, in float32.
    """
    network = _without_memory(config, dataset)
    parameters = 0 if network is None else sum(parameter.numel() for parameter in network.parameters())
    if config.objective.needs_discriminator:
        parameters += sum(parameter.numel() for parameter in _discriminator(config, dataset).parameters())
    check_memory(4 * _COPIES * parameters, f"a network of {parameters:.3g} parameters", "take a smaller network")
    advice = "take smaller batches, or --runtime.micro-batch"
    check_memory(4 * share * math.prod(dataset.shape), f"a batch of {share} samples", advice)


def check_checkpoint(config: RunConfig, dataset: Dataset, folder: Path) -> None:
    """Raise CheckpointError where a checkpoint has the weights of another network, or of another discriminator."""
    check_weights(config, dataset, folder / LAST_FILE)
    check_discriminator(config, dataset, folder / DISCRIMINATOR_FILE)


def check_weights(config: RunConfig, dataset: Dataset, file: Path) -> None:
    """Raise CheckpointError where a file has the weights of another network; nothing takes memory for it."""
    stored = read_shapes(file)
    network = _without_memory(config, dataset, len(stored))
    if network is not None:
        check_shapes(shapes(network.state_dict()), stored, str(file))


def check_discriminator(config: RunConfig, dataset: Dataset, file: Path) -> None:
    """The same for the run's discriminator, if it has one and the file is there."""
    if config.objective.needs_discriminator and file.is_file():
        sketch = _discriminator(config, dataset).state_dict()
        own = {WEIGHTS + name: value.shape for name, value in sketch.items()}
        given = {name: shape for name, shape in read_shapes(file).items() if name.startswith(WEIGHTS)}
        check_shapes(own, given, str(file))


def _discriminator(config: RunConfig, dataset: Dataset) -> Discriminator:
    settings = config.gan.discriminator
    try:
        with torch.device("meta"):
            return settings.build(dataset.shape, dataset.num_classes)
    except (RuntimeError, TypeError, OverflowError) as error:  # products that are no numbers of 64 bits
        raise ConfigError(f"out of memory (a discriminator of width {settings.width}): take a smaller one") from error


def _without_memory(config: RunConfig, dataset: Dataset, tensors: int = MOST_TENSORS) -> Network | None:
    classes = dataset.num_classes
    guided = config.objective.guided and dataset.conditional
    return config.network.without_memory(dataset.shape, classes, guided, _observation(dataset), tensors)


def _observation(dataset: Dataset) -> tuple[int, ...]:
    """The shape of what a policy sees; empty for samples that are no actions."""
    policy = dataset.policy
    return () if policy is None else (policy.chunks.n_obs_steps, len(policy.observations.low))
