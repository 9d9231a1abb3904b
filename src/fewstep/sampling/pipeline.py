"""Pipeline: a flow map, and what its samples are; what is sampled from, saved and loaded.

FOLDER/config.json        {"format", "flow_map": FlowMapConfig, "pipeline": PipelineConfig}
FOLDER/model.safetensors  the network's weights
FOLDER/prompts.safetensors  some embedded prompts and the empty one, of a model of text
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from torch import Tensor

from fewstep.data.demonstrations.normaliser import PolicySpec
from fewstep.data.latents.autoencoders import LatentSpec, load_decoder
from fewstep.data.latents.prompts import encode_prompts, read_prompts, save_prompts
from fewstep.flow.flow_map import FlowMap, FlowMapConfig
from fewstep.networks.base import MOST_TENSORS, Network, at_most, fit_stored, stored_state
from fewstep.networks.condition import Prompts
from fewstep.sampling.card import Card, Provenance
from fewstep.sampling.decode import Viewer
from fewstep.sampling.generate import Generated, Labels, PromptSource, SamplingSettings, generate
from fewstep.sampling.images import to_uint8
from fewstep.sampling.step_times import StepTimes
from fewstep.teachers.base_weights import has_base, moved, put_base, read_base
from fewstep.teachers.second_time import merged_flow_map
from fewstep.teachers.text import TextSpec
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepWarning, MissingExtraError
from fewstep.utils.files import read_record, reading
from fewstep.utils.hub import HUB, cached_copy, fetching
from fewstep.utils.serialization import FORMAT, JSON, from_json, in_this_format, later, to_json
from fewstep.utils.text import by
from fewstep.utils.weights import check_shapes, read_shapes, read_weights, save_weights, shapes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PROMPTS_FILE = "prompts.safetensors"
_ADVICE = "bring back a copy of it"
_DRAWING = "\nsamples = pipeline.generate(4, steps=2).samples"


@dataclass(frozen=True)
class PipelineConfig:
    """What the samples of a flow map are.

    class_names: of the labels. data_range: the values that samples are clipped to when shown, None when the data has no
    such range (latents). step_times: where they are best drawn at, found for these weights (`fewstep tune-steps`).
    latents: how they become images, where they are latents. policy: how they are acted on, where they are chunks of
    actions. text: which encoders embed their prompts. captions: of the prompts that are kept with the model.
    """

    class_names: tuple[str, ...] = ()
    data_range: tuple[float, float] | None = None
    step_times: tuple[StepTimes, ...] = later(tuple)
    latents: LatentSpec | None = later(lambda: None)
    policy: PolicySpec | None = later(lambda: None)
    text: TextSpec | None = later(lambda: None)
    captions: tuple[str, ...] = later(tuple)

    def __post_init__(self) -> None:
        """Raise ConfigError for a range whose ends do not rise."""
        if self.data_range is not None and not -math.inf < self.data_range[0] < self.data_range[1] < math.inf:
            raise ConfigError(f"data_range is {self.data_range}: black must be below white, both finite")


class Pipeline(ModelHubMixin, library_name="fewstep", tags=["flow-map", "few-step-generation"]):
    """A flow map with what its samples are: draws them, makes images of them, is saved and loaded.

    `from_pretrained` and `push_to_hub` are huggingface_hub's; robots act by `fewstep.Policy(pipeline)`.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        config: PipelineConfig = PipelineConfig(),
        provenance: Callable[[], Provenance] | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        """provenance: reads where the weights come from, when a card is written. prompts: what is drawn if not told."""
        self.flow_map, self.config, self._provenance, self.prompts = flow_map, config, provenance, prompts

    def __repr__(self) -> str:
        flow_map = self.flow_map
        parts = type(flow_map.network).__name__, f"samples of {by(flow_map.sample_shape)}"
        return f"Pipeline({', '.join(parts)}, {flow_map.num_classes} classes)"

    @property
    def step_times(self) -> tuple[StepTimes, ...]:
        """The step times found for these weights."""
        return self.config.step_times

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels."""
        return self.config.class_names

    @property
    def data_range(self) -> tuple[float, float] | None:
        """The values that samples are cut to, None where the data have no such range."""
        return self.config.data_range

    @property
    def provenance(self) -> Provenance | None:
        """Where the weights come from; None where nothing is known, and for a run whose record cannot be read."""
        try:
            return None if self._provenance is None else self._provenance()
        except CheckpointError:
            return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.flow_map.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """This pipeline, its weights moved."""
        self.flow_map.to(device)
        return self

    def with_step_times(self, step_times: tuple[StepTimes, ...]) -> "Pipeline":
        """The same flow map, sampled at other times."""
        config = replace(self.config, step_times=step_times)
        return Pipeline(self.flow_map, config, self._provenance, self.prompts)

    def of(self, flow_map: FlowMap) -> "Pipeline":
        """The same of other weights."""
        return Pipeline(flow_map, self.config, self._provenance, self.prompts)

    def from_run(self, provenance: Callable[[], Provenance]) -> "Pipeline":
        """The same, knowing where it comes from."""
        return Pipeline(self.flow_map, self.config, provenance, self.prompts)

    def encode_prompts(self, prompts: Sequence[str], teacher: Path | None = None) -> Prompts:
        """Embed prompts by the text encoders that the model's data were embedded by; each stays in memory meanwhile.

        teacher: where their pipeline lies now, if it was moved. Raises ConfigError for a model of no prompts,
        CheckpointError for text encoders that are missing, damaged or others.
        """
        if self.config.text is None:
            raise ConfigError("this model was not trained with prompts: leave them out")
        return encode_prompts(self.config.text, prompts, teacher, self.device)

    def generate(
        self,
        count: int,
        settings: SamplingSettings = SamplingSettings(),
        labels: Labels | None = None,
        first: int = 0,
        prompts: Sequence[str] | PromptSource | None = None,
        **changes: Any,
    ) -> Generated:
        """`count` samples, as `fewstep.generate` draws them; changes: to the settings, such as steps=1.

        prompts: in words, as `encode_prompts` embeds them, or embedded; in turn.
        """
        embedded = self.encode_prompts(prompts) if isinstance(prompts, Sequence) else prompts
        return generate(self, count, settings, labels, first, embedded, **changes)

    def strays(self, samples: Tensor, than_noise: bool = False) -> str:
        """What no trained model gives, in words: values that are not finite, or far from the data's; else nothing.

        Far: a sample's root mean square is above four times the data's range or, about the mean of all samples, above
        ten standard deviations of data without one. than_noise: and above four times that of the noise it began as,
        which an untrained model may leave as it is, but no sound one enlarges.
        """
        values, bounds, config = samples.flatten(1).double(), self.config.data_range, self.flow_map.config
        if bounds is None:
            largest, where = 10 * config.sigma_data if config else math.inf, "the data are much closer together"
            sizes = (values - values[values.isfinite()].mean()).square().mean(1).sqrt()
        else:
            largest, where = 4 * max(map(abs, bounds)), f"the data lie in [{bounds[0]:g}, {bounds[1]:g}]"
            sizes = values.square().mean(1).sqrt()
        if than_noise:
            largest = max(largest, 4 * float(self.flow_map.path.prior(torch.ones(1))))
        count, finite = int((~(sizes <= largest)).sum()), bool(values.isfinite().all())
        reach = f"up to {float(values.abs().max()):.3g}, while {where}" if finite else "that are not finite"
        return f"values {reach}, in {count} of {len(samples)} samples" if count else ""

    def viewer(self, autoencoder: Path | None = None) -> Viewer:
        """How samples are viewed, on this device; autoencoder: where it lies now, if it was moved.

        Raises CheckpointError for an autoencoder that is missing or another than the latents were encoded with,
        MissingExtraError without diffusers, ConfigError for an autoencoder of samples that are no latents.
        """
        if self.config.latents is not None:
            return Viewer(load_decoder(self.config.latents, autoencoder, self.device), (-1.0, 1.0))
        if autoencoder is not None:
            raise ConfigError("this model's samples are no latents: leave out --autoencoder")
        return Viewer(None, self.config.data_range)

    def preview(self) -> Viewer:
        """The same where nothing hangs on it: without their decoder, latents are shown as they are, with a warning."""
        try:
            return self.viewer()
        except (CheckpointError, MissingExtraError) as error:
            warnings.warn(f"samples are shown as latents: {error}", FewstepWarning, stacklevel=2)
            return Viewer(None, None)

    def images(self, samples: Tensor, autoencoder: Path | None = None) -> Tensor:
        """Samples (n, ...) as images (n, C, H, W), in `viewer().data_range`; raises what `viewer` raises."""
        return self.viewer(autoencoder).images(samples)

    def pixels(self, samples: Tensor) -> Tensor:
        """Samples (n, ...) as bytes (n, C, H, W), decoded where they are latents; raises what `viewer` raises."""
        viewer = self.viewer()
        return to_uint8(viewer.images(samples), viewer.data_range)

    def save(self, folder: Path | str, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors; `weights` replaces the network's own (an EMA's, say).

        Of a network with adapters, the weights beneath them stay where the teacher lies: `merged` is whole. Raises
        CheckpointError when the map was not built from a FlowMapConfig.
        """
        folder, flow_map = Path(folder), self.flow_map
        if flow_map.config is None:
            raise CheckpointError("this flow map was made by hand; build it with FlowMapConfig(...).build() to save it")
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(stored_state(flow_map.network) if weights is None else weights, folder / WEIGHTS_FILE)
        record: dict[str, JSON] = {"format": FORMAT}
        record |= {"flow_map": to_json(flow_map.config), "pipeline": to_json(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")
        if self.prompts is not None:
            save_prompts(self.prompts, folder / PROMPTS_FILE)

    def merged(self) -> "Pipeline":
        """The same model whole, its adapters merged into the weights beneath them; itself where it has none."""
        return Pipeline(merged_flow_map(self.flow_map), self.config, self._provenance, self.prompts)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.merged().save(save_directory)

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        """Upload to OWNER/NAME of the Hugging Face Hub, with a card; options: huggingface_hub's."""
        named = {"repo_id": repo_id, **(model_card_kwargs or {})}
        address: str = super().push_to_hub(repo_id, model_card_kwargs=named, **options)
        return address

    def generate_model_card(self, *args: Any, repo_id: str = "", **options: Any) -> ModelCard:
        """The card that is saved beside the weights. repo_id: OWNER/NAME, where it is pushed to the Hub."""
        place = f"{HUB}{repo_id}" if repo_id else "."
        code = f'import fewstep\n\npipeline = fewstep.load("{place}")' + ("" if repo_id else "  # this folder")
        code += "\npolicy = fewstep.Policy(pipeline)" if self.config.policy else _DRAWING
        provenance = self.provenance
        teacher = None if provenance is None else cached_copy(provenance.teacher)
        return ModelCard(Card(self.words(), code, "fewstep", self.task).text(provenance, teacher))

    @property
    def task(self) -> str:
        """What the Hub calls the model's task; "" for none."""
        if self.config.policy is not None:
            return "robotics"
        network, shape = self.flow_map.network, self.flow_map.sample_shape
        prompts = isinstance(network, Network) and network.prompt_widths != (0, 0)
        if len(shape) == 4:
            return "text-to-video" if prompts else ""
        images = len(shape) == 3
        return ("text-to-image" if prompts else "unconditional-image-generation") if images else ""

    def words(self) -> str:
        """What the model is, for a card."""
        flow_map, shape = self.flow_map, " x ".join(map(str, self.flow_map.sample_shape))
        kind = "latents" if self.config.latents is not None else "samples"
        of = f" of {flow_map.num_classes} classes" if flow_map.num_classes else ""
        count = sum(parameter.numel() for parameter in flow_map.network.parameters())
        return (
            f"A flow map of fewstep: it draws {kind} of shape {shape}{of} in one to a few network calls. Its network, "
            f"{type(flow_map.network).__name__}, has {count:,} weights."
        )

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "Pipeline":
        folder = Path(model_id)
        if folder.is_dir():
            return load_pipeline(folder)
        keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        return from_hub(model_id, **{key: options[key] for key in keys if key in options})


def from_hub(repository: str, **options: Any) -> Pipeline:
    """The pipeline that OWNER/NAME holds on the Hugging Face Hub; options: of `hf_hub_download`.

    Raises CheckpointError where the Hub does not give it, or gives something else.
    """
    with fetching(repository):
        files = [Path(hf_hub_download(repository, name, **options)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        if _read_config(files[0])[1].text is not None:
            files.append(Path(hf_hub_download(repository, PROMPTS_FILE, **options)))
    return _load(files[0], files[1], files[-1])


def load_pipeline(folder: Path | str, base: str = "") -> Pipeline:
    """Read what `Pipeline.save` wrote; raises CheckpointError when files are missing, truncated or do not fit.

    base: where the teacher beneath adapters lies now, if it was moved.
    """
    folder = Path(folder)
    return _load(folder / CONFIG_FILE, folder / WEIGHTS_FILE, folder / PROMPTS_FILE, base)


def read_flow_map_config(folder: Path | str) -> FlowMapConfig:
    """The flow map's configuration of a saved pipeline; raises CheckpointError when it is missing or is none."""
    return _read_config(Path(folder) / CONFIG_FILE)[0]


def _read_config(file: Path) -> tuple[FlowMapConfig, PipelineConfig]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; is {file.parent} a saved model?")
    record = in_this_format(read_record(file, _ADVICE), str(file))
    if "flow_map" not in record:
        raise CheckpointError(f"{file} is not a fewstep model configuration: it lacks 'flow_map'")
    pipeline = from_json(PipelineConfig, record.get("pipeline", {}), f"{file}: pipeline")
    return from_json(FlowMapConfig, record["flow_map"], str(file)), pipeline


def _load(config_file: Path, weights_file: Path, prompts_file: Path, base: str = "") -> Pipeline:
    config, pipeline = _read_config(config_file)
    if config.num_classes and pipeline.class_names and len(pipeline.class_names) != config.num_classes:
        reason = f"{len(pipeline.class_names)} names of {config.num_classes} classes"
        raise CheckpointError(f"{config_file} is damaged ({reason}): {_ADVICE}")
    stored = read_shapes(weights_file)
    config = replace(config, network=moved(config.network, base))
    most = MOST_TENSORS if has_base(config.network) else len(stored)
    with reading(config_file, _ADVICE):  # compared before there is time or memory for it
        given = (config.shape, config.num_classes, config.guided, config.observation)
        network = config.network.without_memory(*given, tensors=most)
        if network is not None:
            check_shapes(shapes(stored_state(network)), stored, str(weights_file))
    beneath = read_base(network)
    with reading(config_file, _ADVICE), torch.random.fork_rng([]), at_most(most):  # what it draws is then replaced
        flow_map = config.build()
    put_base(flow_map.network, beneath)
    fit_stored(flow_map.network, read_weights(weights_file), str(weights_file))
    prompts = None if pipeline.text is None else read_prompts(prompts_file)
    return Pipeline(flow_map.eval(), pipeline, prompts=prompts)
