"""Flow maps as plain modules of tensors, and those as ONNX files and programs of torch.export."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.export.cards import traced_card, write_card
from fewstep.export.steps import Step, prior_of, sampling_times, step_table
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.skip import SkipPreconditioning
from fewstep.networks.base import Network
from fewstep.networks.condition import Condition, Prompts
from fewstep.sampling.pipeline import Pipeline
from fewstep.utils.errors import ConfigError, MissingExtraError
from fewstep.utils.extras import installing
from fewstep.utils.files import new_folder

Format = Literal["onnx", "torch"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 18
_ONNX_ERROR = 1e-3  # of the largest value, where both work in float32
_TOKENS = 8  # of the prompts that are traced; those that are given may have any number


def condition_of(given: dict[str, Tensor]) -> Condition:
    """labels (B,) int64, guidance_scale (B,), text (B, L, D), text_mask (B, L) bool, pooled (B, P), as far as given."""
    guidance, scale = None, given.get("guidance_scale")
    if scale is not None:
        guidance = torch.stack([scale.log(), torch.zeros_like(scale), torch.ones_like(scale)], 1)
    prompts = Prompts(given["text"], given.get("text_mask"), given.get("pooled")) if "text" in given else None
    return Condition(given.get("labels"), guidance, prompts=prompts)


class JumpModule(nn.Module):
    """X(x, t, s, *given): x (B, *shape), t, s (B,) float32 in the path's clock; given by `names` to `condition_of`."""

    def __init__(self, flow_map: FlowMap, names: tuple[str, ...]) -> None:
        super().__init__()
        self.flow_map, self.names = flow_map, names

    def forward(self, x: Tensor, t: Tensor, s: Tensor, *given: Tensor) -> Tensor:
        return self.flow_map.jump(x, t, s, condition_of(dict(zip(self.names, given, strict=True))))


class SamplerModule(nn.Module):
    """Standard normal noise (B, *shape), and what is given by `names`, to samples: the steps unrolled."""

    def __init__(self, flow_map: FlowMap, names: tuple[str, ...], prior: float, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.network, self.names, self.prior, self.steps = flow_map.network, names, prior, steps
        origin = flow_map.preconditioning.origin
        self.origin = nn.Buffer(torch.zeros(()) if origin is None else origin.float())

    def forward(self, noise: Tensor, *given: Tensor) -> Tensor:
        x, cond = self.prior * noise, condition_of(dict(zip(self.names, given, strict=True)))
        for step in self.steps:
            t, s = (torch.full_like(x[:, 0].flatten(1)[:, 0], time) for time in (step.t, step.s))
            raw = self.network(step.c_in * x, t, s, cond)
            x = step.a * x + step.b * raw + step.origin * self.origin
        return x


class SkipSamplerModule(nn.Module):
    """The same for a model with a skip, whose steps scale every direction of the data apart; times (n + 1,) falling."""

    def __init__(self, flow_map: FlowMap, names: tuple[str, ...], prior: float, times: Tensor) -> None:
        super().__init__()
        skip, scaling = flow_map.preconditioning, flow_map.scaling
        assert isinstance(skip, SkipPreconditioning)
        self.network, self.names, self.prior, self.covariance = flow_map.network, names, prior, skip.covariance
        self.sees = isinstance(self.network, Network) and self.network.sees_skip
        times = flow_map.path.clock(times)
        self.steps = [skip.at_times(t, s) for t, s in zip(times[:-1].split(1), times[1:].split(1), strict=True)]
        numbers = torch.stack([*scaling.values(times[:-1]), scaling.c_noise(times[:-1]), scaling.c_noise(times[1:])], 1)
        self.numbers: list[list[float]] = numbers.tolist()

    def forward(self, noise: Tensor, *given: Tensor) -> Tensor:
        x, cond = self.prior * noise, condition_of(dict(zip(self.names, given, strict=True)))
        covariance = self.covariance.of(cond.labels)
        mean = covariance.mean.to(x)
        for step, (c_skip, c_out, c_in, clock_t, clock_s) in zip(self.steps, self.numbers, strict=True):
            t, s = (torch.full_like(x[:, 0].flatten(1)[:, 0], time) for time in (clock_t, clock_s))
            centred = x - step.alpha * mean
            own = cond
            if self.sees:
                own = replace(cond, seen=covariance.scaled(centred, _always(step.seen)) / covariance.deviation)
            output = c_skip * x + c_out * self.network(c_in * x, t, s, own)
            x = covariance.scaled(centred, _always(step.gains)) + step.weight * mean + step.g * output
        return x


def _always(gains: Tensor) -> Callable[[Tensor], Tensor]:
    """Gains that are known, whatever the variances."""
    return lambda variances: gains


def conditions(flow_map: FlowMap) -> dict[str, Tensor]:
    """What the network takes besides x and times: an example of each, of a batch of two."""
    network = flow_map.network
    found = {"labels": torch.zeros(2, dtype=torch.long)} if flow_map.num_classes else {}
    found |= {"guidance_scale": torch.ones(2)} if flow_map.guided else {}
    assert isinstance(network, Network)
    text, pooled = network.prompt_widths
    if text:
        found["text"] = torch.randn(2, _TOKENS, text)
    if text and network.masks_prompts:
        found["text_mask"] = torch.ones(2, _TOKENS, dtype=torch.bool)
    return found | ({"pooled": torch.randn(2, pooled)} if pooled else {})


def export_traced(
    pipeline: Pipeline, folder: Path, kind: Format, calls: tuple[int, ...] = (1, 2, 4), teacher: Path | None = None
) -> list[Path]:
    """Write FOLDER/jump and FOLDER/sampler-K for each number of calls K, of any batch size; returns the files.

    Beside them: fewstep.json with the shape, inputs, classes, range, the clock's ends and the steps; the card, with the
    licence in the folder of its `teacher`. Raises ConfigError for a folder that has something in it, a policy, and a
    network that cannot be traced, MissingExtraError without onnx; nothing is written then.
    """
    flow_map = pipeline.flow_map.cpu().eval()
    if flow_map.config is not None and flow_map.config.observation:
        raise ConfigError("a policy's observations have no place in these files: export models of images")
    write, given = writer_of(kind), conditions(flow_map)
    x, names = torch.randn(2, *flow_map.sample_shape), tuple(given)
    times = {"t": torch.full((2,), flow_map.path.t_max), "s": torch.full((2,), flow_map.path.t_min)}
    modules: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {"jump": (JumpModule(flow_map, names), {"x": x, **times})}
    with torch.no_grad():  # numbers that are computed once are there before anything is traced
        modules["jump"][0](x, *times.values(), *given.values())
    samplers, numbers = _samplers(pipeline, names, calls)
    modules |= {f"sampler-{count}": (module, {"noise": x}) for count, module in samplers.items()}
    with new_folder(folder) as aside:
        for name, (module, inputs) in modules.items():
            try:
                with torch.no_grad():
                    write(module.eval(), inputs, given, aside / f"{name}{SUFFIX[kind]}")
            except MissingExtraError:
                raise
            except Exception as error:  # whatever a tracer meets in a network
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(f"{type(flow_map.network).__name__} cannot be traced to {kind}: {reason}") from error
        record = {
            "shape": list(flow_map.sample_shape),
            "inputs": {name: list(value.shape[1:]) for name, value in given.items()},
            "num_classes": flow_map.num_classes,
            "class_names": list(pipeline.config.class_names),
            "range": pipeline.config.data_range,
            "clock": [flow_map.path.t_min, flow_map.path.t_max],
            **numbers,
        }
        (aside / "fewstep.json").write_text(json.dumps(record, indent=1) + "\n")
        words = {name: _expression(kind, value) for name, value in {"noise": x, **given}.items()}
        write_card(pipeline, traced_card(pipeline, kind, words, min(samplers)), aside, teacher)
    return [folder / f"{name}{SUFFIX[kind]}" for name in modules]


def _samplers(
    pipeline: Pipeline, names: tuple[str, ...], calls: tuple[int, ...]
) -> tuple[dict[int, nn.Module], dict[str, Any]]:
    """The sampler in each number of calls, and its numbers: steps, or times alone for a model with a skip."""
    flow_map = pipeline.flow_map
    if isinstance(flow_map.preconditioning, SkipPreconditioning):
        prior, times = prior_of(pipeline), sampling_times(pipeline, calls)
        numbers = {"prior": prior, "times": {str(count): own.tolist() for count, own in times.items()}}
        return {count: SkipSamplerModule(flow_map, names, prior, own) for count, own in times.items()}, numbers
    table = step_table(pipeline, calls)
    made: dict[int, nn.Module] = {
        count: SamplerModule(flow_map, names, table.prior, steps) for count, steps in table.steps.items()
    }
    of_table: dict[str, Any] = json.loads(table.to_json())
    return made, of_table


def _expression(kind: Format, value: Tensor) -> str:
    """Python for four of an input: an array of NumPy or a tensor."""
    shape = (4, *value.shape[1:])
    if value.is_floating_point():
        return f"torch.randn{shape}" if kind == "torch" else f'np.random.standard_normal({shape}).astype("float32")'
    word, kinds = ("torch", ("bool", "int64")) if kind == "torch" else ("np", ("bool_", "int64"))
    return f"{word}.ones({shape}, dtype={word}.{kinds[value.dtype != torch.bool]})"


Writer = Callable[[nn.Module, dict[str, Tensor], dict[str, Tensor], Path], None]


def writer_of(kind: Format) -> Writer:
    """What writes a module in a format; raises MissingExtraError when it is called without that format's packages."""
    return {"onnx": _write_onnx, "torch": _write_program}[kind]


def _dynamic(inputs: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Any]:
    """Any batch size, and prompts of any length; torch has no argument `given` where nothing is."""
    auto = torch.export.Dim.AUTO
    free = tuple({0: auto, 1: auto} if name in ("text", "text_mask") else {0: auto} for name in given)
    return {name: {0: auto} for name in inputs} | ({"given": free} if free else {})


def _traced(module: nn.Module, inputs: dict[str, Tensor], given: dict[str, Tensor]) -> Any:
    everything = (*inputs.values(), *given.values())
    return torch.export.export(module, everything, dynamic_shapes=_dynamic(inputs, given))


def _write_program(module: nn.Module, inputs: dict[str, Tensor], given: dict[str, Tensor], file: Path) -> None:
    program = _traced(module, inputs, given)
    with warnings.catch_warnings():  # tables that are views of one another: kept whole, and here on the CPU
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, file)


def _write_onnx(module: nn.Module, inputs: dict[str, Tensor], given: dict[str, Tensor], file: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"ONNX needs onnx and onnxscript: {installing('onnx')} ({error})") from error
    program = _without_idle_squeezes(_traced(module, inputs, given))
    # Traced already: the exporter's own tracing takes batches of the inputs for different ones. Not optimised: that
    # breaks some networks, and onnxruntime does it as it loads.
    with _without_remarks():
        torch.onnx.export(
            program, (), str(file), input_names=[*inputs, *given], output_names=["samples"], opset_version=OPSET,
            dynamo=True, optimize=False, external_data=False, verbose=False,
        )  # fmt: skip
    _check_onnx(module, {**inputs, **given}, file)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Inside, the exporter is silent about packages that it could use and names of its own that it will change."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _without_idle_squeezes(program: Any) -> Any:
    """Without those of an axis longer than one, which do nothing in torch and fail in ONNX."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim and node.args[0].meta["val"].shape[node.args[1]] != 1:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _check_onnx(module: nn.Module, inputs: dict[str, Tensor], file: Path) -> None:
    """Raise ConfigError where onnxruntime, if it is there, gives other values for a batch of another size."""
    try:
        import onnxruntime
    except ImportError:
        return
    three = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in three.items()})
    own = module(*three.values())
    error, size = float((torch.from_numpy(found) - own).abs().max()), float(own.abs().max())
    if not error <= _ONNX_ERROR * size:
        raise ConfigError(f"onnxruntime's values are {error:.2g} away from torch's, which are up to {size:.2g}")
