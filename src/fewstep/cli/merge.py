"""`fewstep merge RUN`: a model with adapters as a whole one, or its adapters alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Merge adapters into the teacher's weights: a saved model that needs no teacher."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a saved model with adapters."""
    out: Path
    """Folder to write, empty or not there."""
    teacher: str = ""
    """Where the teacher lies now; where it lay in training when not given."""
    weights: str = ""
    """Which of the run's weights: the name of an average, such as power-0.1, or last; the first average otherwise."""
    adapters: bool = False
    """Write the adapters instead, as pytorch_lora_weights.safetensors in PEFT's names, the second time beside them."""


def run(options: Options) -> None:
    """Write the folder; raises ConfigError for a model without adapters, and for a folder that has something in it."""
    from fewstep.teachers.second_time import TwoTimesNetwork, save_adapters
    from fewstep.training import load
    from fewstep.utils.errors import ConfigError
    from fewstep.utils.files import guarded

    pipeline = load(options.run, options.weights, options.teacher)
    network, out = pipeline.flow_map.network, options.out
    if not isinstance(network, TwoTimesNetwork) or network.adapters is None:
        raise ConfigError(f"{options.run} has no adapters: it is whole as it is")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} has something in it: give an empty folder, or one that is not there")
    with guarded(out):
        if options.adapters:
            print(f"{out}: {' and '.join(save_adapters(network, out))}")
            return
        pipeline.merged().save(out)
    print(f"{out}: a saved model, as fewstep sample, evaluate and export take")
