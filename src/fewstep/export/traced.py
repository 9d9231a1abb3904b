"""Flow maps as plain modules of tensors, and those as ONNX files and programs of torch.export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.export.steps import Step, step_table
from fewstep.flow.flow_map import FlowMap
from fewstep.networks.condition import Condition
from fewstep.sampling.pipeline import Pipeline
from fewstep.utils.errors import ConfigError, MissingExtraError

Format = Literal["onnx", "torch"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}


class JumpModule(nn.Module):
    """X(x, t, s): x (B, *shape), t, s (B,) float32 in the path's clock, labels (B,) int64 where there are classes."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__()
        self.flow_map = flow_map

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.flow_map.jump(x, t, s, Condition(labels))


class SamplerModule(nn.Module):
    """Standard normal noise (B, *shape), and labels (B,) where there are classes, to samples: the steps unrolled."""

    def __init__(self, flow_map: FlowMap, prior: float, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.network, self.prior, self.steps = flow_map.network, prior, steps
        origin = flow_map.preconditioning.origin
        self.origin = nn.Buffer(torch.zeros(()) if origin is None else origin.float())

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.prior * noise
        for step in self.steps:
            t, s = (torch.full_like(x[:, 0].flatten(1)[:, 0], time) for time in (step.t, step.s))
            raw = self.network(step.c_in * x, t, s, Condition(labels))
            x = step.a * x + step.b * raw + step.origin * self.origin
        return x


def export_traced(pipeline: Pipeline, folder: Path, kind: Format, calls: tuple[int, ...] = (1, 2, 4)) -> list[Path]:
    """Write FOLDER/jump and FOLDER/sampler-K for each number of calls K, of any batch size; returns the files.

    Beside them: fewstep.json with the shape, classes, range, the clock's ends and the steps. Raises ConfigError for a
    folder that has something in it, a policy, and a network that cannot be traced; MissingExtraError without onnx.
    """
    flow_map = pipeline.flow_map.cpu().eval()
    if flow_map.config is not None and flow_map.config.observation:
        raise ConfigError("a policy's observations have no place in these files: export models of images")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} has something in it: give an empty folder, or one that is not there")
    write = _writer(kind)
    table = step_table(pipeline, calls)
    x, labels = torch.randn(2, *flow_map.sample_shape), torch.zeros(2, dtype=torch.long)
    times = torch.full((2,), flow_map.path.t_max), torch.full((2,), flow_map.path.t_min)
    classes = (labels,) if flow_map.num_classes else ()
    folder.mkdir(parents=True, exist_ok=True)
    modules: dict[str, tuple[nn.Module, tuple[Tensor, ...], list[str]]] = {
        "jump": (JumpModule(flow_map), (x, *times, *classes), ["x", "t", "s", "labels"])
    }
    for count, steps in table.steps.items():
        modules[f"sampler-{count}"] = SamplerModule(flow_map, table.prior, steps), (x, *classes), ["noise", "labels"]
    files = []
    for name, (module, inputs, names) in modules.items():
        file = folder / f"{name}{SUFFIX[kind]}"
        try:
            with torch.no_grad():
                write(module.eval(), inputs, names[: len(inputs)], file)
        except Exception as error:  # whatever a tracer meets in a network
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{type(flow_map.network).__name__} cannot be traced to {kind}: {reason}") from error
        files.append(file)
    record = {
        "shape": list(flow_map.sample_shape),
        "num_classes": flow_map.num_classes,
        "class_names": list(pipeline.config.class_names),
        "range": pipeline.config.data_range,
        "clock": [flow_map.path.t_min, flow_map.path.t_max],
        **json.loads(table.to_json()),
    }
    (folder / "fewstep.json").write_text(json.dumps(record, indent=1) + "\n")
    return files


Writer = Callable[[nn.Module, tuple[Tensor, ...], list[str], Path], None]


def _writer(kind: Format) -> Writer:
    return {"onnx": _write_onnx, "torch": _write_program}[kind]


def _dynamic(names: list[str]) -> dict[str, Any]:
    return {name: {0: torch.export.Dim.AUTO} for name in names}


def _write_program(module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], file: Path) -> None:
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=_dynamic(names)), file)


def _write_onnx(module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], file: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"ONNX needs onnx and onnxscript: pip install 'fewstep[onnx]' ({error})") from error
    torch.onnx.export(
        module, inputs, str(file), input_names=names, output_names=["samples"], dynamic_shapes=_dynamic(names),
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
