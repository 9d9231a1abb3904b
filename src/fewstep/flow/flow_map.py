"""FlowMap = path + preconditioning + inner scaling + network (math.md §2)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.data.demonstrations.normaliser import Control
from fewstep.data.latents.autoencoders import Decoding
from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.base import Preconditioning, origin_weight
from fewstep.flow.preconditioning.network_scaling import IdentityScaling, Scaling
from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.condition import Condition
from fewstep.sampling.step_times import StepTimes, decode_step_times
from fewstep.utils.errors import CheckpointError, ConfigError, ShapeError
from fewstep.utils.files import read_record, reading
from fewstep.utils.serialization import FORMAT, JSON, differences, from_json, in_this_format, later, to_json
from fewstep.utils.tensors import check_batch, expand

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class FlowMapConfig:
    """All that is needed to rebuild a flow map but its weights.

    data_range: the values that samples are clipped to when shown, None when the data has no such range (latents).
    observation: shape (To, Do) of what a policy sees; () for anything else.
    Raises ConfigError for sizes below 1.
    """

    path: Path
    preconditioning: Preconditioning
    scaling: Scaling
    network: NetworkConfig
    shape: tuple[int, ...]
    num_classes: int = 0
    guided: bool = False
    sigma_data: float = 1.0
    class_names: tuple[str, ...] = ()
    data_range: tuple[float, float] | None = None
    observation: tuple[int, ...] = later(tuple)

    def __post_init__(self) -> None:
        if min(self.shape, default=0) < 1 or min(self.observation, default=1) < 1 or self.num_classes < 0:
            raise ConfigError(
                f"samples of shape {self.shape}, observations of shape {self.observation} and {self.num_classes} "
                "classes: sizes must be at least 1, and the number of classes at least 0"
            )

    def build(self) -> FlowMap:
        """A flow map with freshly initialised weights."""
        network = self.network.build(self.shape, self.num_classes, self.guided, self.observation)
        return FlowMap(self.path, self.preconditioning, network, self.scaling, self)


class FlowMap(nn.Module, PyTorchModelHubMixin, library_name="fewstep", tags=["flow-map", "few-step-generation"]):
    """X(x, t, s) = f(t, s) x + g(t, s) N(x, t, s): the solution at time s of the PF-ODE through x at time t.

    A preconditioning with an origin m adds (alpha_s - alpha_t f - g) m, which vanishes on the diagonal (math.md §3.6).

    Times are per sample, (B,), in the path's clock, t_min <= s <= t <= t_max; samples are (B, ...). Coefficients are
    computed in the dtype of the times and applied in that of the samples.
    step_times: where its samples are best drawn at, found for these weights (`fewstep tune-steps`) and saved with them.
    decoding: how its samples become images, where they are latents; control: how they are acted on, where they are
    chunks of actions; saved with the weights too.
    """

    def __init__(
        self,
        path: Path,
        preconditioning: Preconditioning,
        network: nn.Module,
        scaling: Scaling | None = None,
        config: FlowMapConfig | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.preconditioning = preconditioning
        self.scaling = IdentityScaling() if scaling is None else scaling
        self.network = network
        self.config = config
        self.step_times: tuple[StepTimes, ...] = ()
        self.decoding: Decoding | None = None
        self.control: Control | None = None

    def output(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """N(x, t, s): the network with its inner scaling."""
        c_skip, c_out, c_in = (expand(value, x).to(x.dtype) for value in self.scaling.values(t))
        clock_t, clock_s = (self.scaling.c_noise(time).to(x.dtype) for time in (t, s))
        raw: Tensor = self.network(c_in * x, clock_t, clock_s, cond)
        return c_skip * x + c_out * raw

    def apply_jump(self, x: Tensor, output: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """f x + g N for an output N already computed at (x, t, s), about the preconditioning's origin if it has one."""
        f, g = self.preconditioning.coefficients(t, s)
        jumped = expand(f, x).to(x.dtype) * x + expand(g, x).to(x.dtype) * output
        origin = self.preconditioning.origin
        if origin is None:
            return jumped
        return jumped + expand(origin_weight(self.path, f, g, t, s), x).to(x.dtype) * origin.to(x)

    def velocity_from_output(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """v = f_s x + g_s N for an output N already computed on the diagonal (x, t, t)."""
        f_s, g_s = (expand(value, x).to(x.dtype) for value in self.preconditioning.diagonal(t))
        return f_s * x + g_s * output

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """X(x, t, s); raises ShapeError unless x is (B, ...) and t, s are (B,)."""
        check_batch(x, t, s)
        return self.apply_jump(x, self.output(x, t, s, cond), t, s)

    def velocity(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """PF-ODE velocity v(x, t) read off the diagonal; with Euler's and computed preconditioning not at sigma = 0."""
        check_batch(x, t)
        return self.velocity_from_output(x, self.output(x, t, t, cond), t)

    def denoise(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Denoiser D(x, t) = E[x0 | x_t]: N itself where the preconditioning says so, else from the velocity."""
        if self.preconditioning.denoises:
            check_batch(x, t)
            return self.output(x, t, t, cond)
        return self.path.denoised_from_velocity(x, self.velocity(x, t, cond), t)

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, cond: Condition | None = None) -> Tensor:
        """The jump; without s the denoiser, so that a flow map serves wherever a callable (x, t) -> D is asked for."""
        return self.denoise(x, t, cond) if s is None else self.jump(x, t, s, cond)

    @property
    def num_classes(self) -> int:
        """Number of class labels the network takes; 0 for none."""
        return self.network.num_classes if isinstance(self.network, Network) else 0

    @property
    def guided(self) -> bool:
        """Whether the guidance strength and interval are inputs of the network."""
        return isinstance(self.network, Network) and self.network.guided

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample; raises ShapeError when the network does not say."""
        if not isinstance(self.network, Network):
            raise ShapeError("this flow map's network does not carry a sample shape; give the noise yourself")
        return self.network.shape

    def _save_pretrained(self, save_directory: FilePath) -> None:
        save_flow_map(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> FlowMap:
        folder = FilePath(model_id)
        if folder.is_dir():
            return load_flow_map(folder)
        keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        known = {key: options[key] for key in keys if key in options}
        files = [FilePath(hf_hub_download(repo_id=model_id, filename=f, **known)) for f in (CONFIG_FILE, WEIGHTS_FILE)]
        return _load(files[0], files[1])


def save_flow_map(flow_map: FlowMap, folder: FilePath, weights: dict[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors; `weights` replaces the network's own (an EMA's, say).

    Raises CheckpointError when the map was not built from a FlowMapConfig.
    """
    if flow_map.config is None:
        raise CheckpointError("this flow map was made by hand; build it with FlowMapConfig(...).build() to save it")
    folder.mkdir(parents=True, exist_ok=True)
    state = flow_map.network.state_dict() if weights is None else weights
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / WEIGHTS_FILE)
    record: dict[str, JSON] = {"format": FORMAT, "flow_map": to_json(flow_map.config)}
    if flow_map.step_times:
        record["step_times"] = to_json(flow_map.step_times)
    if flow_map.decoding is not None:
        record["decoding"] = to_json(flow_map.decoding)
    if flow_map.control is not None:
        record["control"] = to_json(flow_map.control)
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")


def load_flow_map(folder: FilePath | str) -> FlowMap:
    """Read what `save_flow_map` wrote; raises CheckpointError when files are missing, truncated or do not fit."""
    folder = FilePath(folder)
    return _load(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def read_weights(file: FilePath) -> dict[str, Tensor]:
    """Tensors of a safetensors file; raises CheckpointError when it is missing, truncated or not one."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error})") from error


def fit_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights strictly; raises CheckpointError naming the first tensors that differ in name or shape."""
    own = {key: list(value.shape) for key, value in module.state_dict().items()}
    given = {key: list(value.shape) for key, value in weights.items()}
    lines = differences(own, given)  # type: ignore[arg-type]  # lists of ints are JSON values
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise CheckpointError(
            f"{source} is of another architecture: {'; '.join(lines[:3])}{more} (shape in this model -> in the file)"
        )
    module.load_state_dict(weights)


def read_config(folder: FilePath | str) -> FlowMapConfig:
    """The configuration of a saved flow map; raises CheckpointError when it is missing or is none."""
    return _read_config(FilePath(folder) / CONFIG_FILE).flow_map


class _Stored(NamedTuple):
    flow_map: FlowMapConfig
    step_times: tuple[StepTimes, ...]
    decoding: Decoding | None
    control: Control | None


def _read_config(file: FilePath) -> _Stored:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; is {file.parent} a saved flow map?")
    record = read_record(file, "bring back a copy of it")
    record = in_this_format(record, str(file))
    if "flow_map" not in record:
        raise CheckpointError(f"{file} is not a fewstep model configuration: it lacks 'flow_map'")
    stored, tuned = record["flow_map"], record.get("step_times", [])
    decoding, control = record.get("decoding"), record.get("control")
    return _Stored(
        from_json(FlowMapConfig, stored, str(file)),
        decode_step_times(tuned, str(file)),
        None if decoding is None else from_json(Decoding, decoding, f"{file}: decoding"),
        None if control is None else from_json(Control, control, f"{file}: control"),
    )


def _load(config_file: FilePath, weights_file: FilePath) -> FlowMap:
    stored = _read_config(config_file)
    with reading(config_file, "bring back a copy of it"):
        flow_map = stored.flow_map.build()
    flow_map.step_times, flow_map.decoding, flow_map.control = stored.step_times, stored.decoding, stored.control
    fit_weights(flow_map.network, read_weights(weights_file), str(weights_file))
    return flow_map.eval()


def at(time: float, x: Tensor) -> Tensor:
    """The same time for every sample of x: (B,), float64."""
    return torch.full(x.shape[:1], time, dtype=torch.float64, device=x.device)
