"""The weights beneath adapters, which lie where the teacher lies: read again, and checked to be the same."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fewstep.networks.base import NetworkConfig
from fewstep.teachers.diffusers import is_diffusers, read_model_weights
from fewstep.teachers.edm import is_edm, read_edm_weights
from fewstep.teachers.second_time import TwoTimesConfig, TwoTimesNetwork
from fewstep.utils.errors import BaseWeightsError, CheckpointError, HubError
from fewstep.utils.hub import local_copy
from fewstep.utils.weights import read_weights

_ADVICE = "bring it back there, or make a whole model with fewstep merge RUN --teacher PLACE --out FOLDER"
SAVED = "model.safetensors"
"""Of a saved model of fewstep."""


def on_base(config: NetworkConfig, place: str, teacher: object) -> NetworkConfig:
    """Settings whose adapters say where their base lies, and what it is; others as they are.

    place: of the teacher. teacher: its network.
    """
    if not isinstance(config, TwoTimesConfig) or config.adapters is None or not isinstance(teacher, TwoTimesNetwork):
        return config
    return replace(config, adapters=replace(config.adapters, base=place, digest=teacher.base_digest()))


def moved(config: NetworkConfig, place: str) -> NetworkConfig:
    """Settings whose adapters have their base in another place, if that is given."""
    if not place or not isinstance(config, TwoTimesConfig) or config.adapters is None or not config.adapters.base:
        return config
    return replace(config, adapters=replace(config.adapters, base=place))


def has_base(config: NetworkConfig) -> bool:
    """Whether adapters are stored without the weights beneath them."""
    return isinstance(config, TwoTimesConfig) and config.adapters is not None and bool(config.adapters.base)


def read_base(sketch: object) -> dict[str, Tensor]:
    """The weights beneath a network's adapters, by their foreign names; none where the network's files hold all.

    sketch: the network, with memory or without. Raises BaseWeightsError, in one line, where they are missing or do not
    fit.
    """
    if not isinstance(sketch, TwoTimesNetwork) or sketch.adapters is None or not sketch.adapters.base:
        return {}
    base = sketch.adapters.base
    try:
        weights = _read(local_copy(base), sketch)
        sketch.check_foreign(weights, base)
    except HubError:
        raise
    except CheckpointError as error:
        raise BaseWeightsError(f"the teacher beneath these adapters cannot be read: {error}; {_ADVICE}") from error
    return weights


def put_base(network: object, weights: dict[str, Tensor]) -> None:
    """Load what `read_base` read; raises BaseWeightsError for others than the adapters were trained on."""
    if not isinstance(network, TwoTimesNetwork) or network.adapters is None or not weights:
        return
    network.load_foreign(weights, network.adapters.base)
    if network.base_digest() != network.adapters.digest:
        raise BaseWeightsError(
            f"{network.adapters.base} has other weights than these adapters were trained on: {_ADVICE}"
        )


def _read(place: Path, network: TwoTimesNetwork) -> dict[str, Tensor]:
    """Weights by their foreign names, from any place that a teacher of such a network comes from."""
    if is_edm(place):
        return read_edm_weights(place)
    if place.is_dir() and is_diffusers(place):
        return read_model_weights(place)
    if not (place / SAVED).is_file():
        raise CheckpointError(f"{place}: no such model")
    named = ((network.foreign_name(key), value) for key, value in read_weights(place / SAVED).items())
    return {name: value for name, value in named if name is not None}
