"""Networks that predict noise, data or a velocity on one path are denoisers and velocities on any other."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from fewstep.flow.closed_form import GaussianData
from fewstep.flow.discrete_vp import DiscreteVP
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, VP, Linear, Path, Trig
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.preconditioning.prediction import Prediction, PredictionScaling
from fewstep.utils.errors import ConfigError

DATA = GaussianData(torch.tensor(0.3, dtype=torch.float64), 0.6)
STABLE_DIFFUSION = DiscreteVP("scaled-linear", 0.00085, 0.012)
OWN: dict[Prediction, Path] = {
    "epsilon": STABLE_DIFFUSION,
    "sample": DiscreteVP(),
    "v": DiscreteVP("cosine", zero_snr=True),
    "flow": Linear(),
    "score": EDM(0.01, 100.0),
}
PATHS: tuple[Path, ...] = (EDM(), Linear(), Trig(0.5), VP(), STABLE_DIFFUSION)


class Predictor(nn.Module):
    """What a network trained to perfection on that Gaussian predicts, in its own coordinates and time."""

    def __init__(self, prediction: Prediction, factor: float) -> None:
        super().__init__()
        self.prediction, self.path, self.factor = prediction, OWN[prediction], factor

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None) -> Tensor:
        time = t.double() / self.factor
        data = DATA.denoise(self.path, x, time)
        at = self.path.values(time).over(x)
        noise = (x - at.alpha * data) / at.sigma
        return {
            "epsilon": noise,
            "sample": data,
            "v": at.alpha * noise - at.sigma * data,
            "flow": noise - data,
            "score": -noise,
        }[self.prediction]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("prediction", OWN)
def test_a_predictor_is_the_denoiser_and_the_velocity_on_every_path(prediction: Prediction, path: Path) -> None:
    """D and v are the Gaussian's own wherever both paths have the level."""
    own = OWN[prediction]
    ends = torch.tensor([own.t_min, own.t_max], dtype=torch.float64)
    low, high = (float(tau) for tau in own.tau(ends))
    tau = torch.logspace(-1.3, 1.8, 40, dtype=torch.float64)
    t = path.time_from_tau(tau[(tau > low) & (tau < min(high, 70))])
    x = (
        torch.randn(len(t), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * path.values(t).sigma[:, None, None]
    )
    factor = 1000.0 if prediction == "flow" else 1.0
    network = Predictor(prediction, factor)
    denoiser = FlowMap(
        path, EulerPreconditioning(path), network, PredictionScaling(prediction, own, path, "denoiser", factor)
    )
    torch.testing.assert_close(denoiser.denoise(x, t), DATA.denoise(path, x, t), rtol=1e-7, atol=1e-9)
    velocity = FlowMap(
        path, LinearPreconditioning(), network, PredictionScaling(prediction, own, path, "velocity", factor)
    )
    expected = DATA.velocity(path, x, t)
    torch.testing.assert_close(velocity.velocity(x, t), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("prediction", "path"), list(itertools.product(OWN, PATHS)))
def test_both_ends_of_the_clock_are_finite(prediction: Prediction, path: Path) -> None:
    """Beyond the levels that the network knows, its coefficients are those of the nearest that it does."""
    scaling = PredictionScaling(prediction, OWN[prediction], path)
    ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    assert all(bool(value.isfinite().all()) for value in (*scaling.values(ends), scaling.c_noise(ends)))


def test_a_prediction_without_meaning_is_refused() -> None:
    """The five kinds are named."""
    with pytest.raises(ConfigError, match="epsilon, sample, v, flow, score"):
        PredictionScaling("energy", Linear(), Linear())  # type: ignore[arg-type]
