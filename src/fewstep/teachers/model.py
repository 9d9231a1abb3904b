"""What a teacher of the user's own must say: its path, its samples' shape and classes, and its denoiser."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.networks.base import Network
from fewstep.networks.condition import Condition
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.parts import made, outside_function, stored_class, stored_name, subclasses


class TeacherModel(Network):
    """A model to distil: D(x, t) = E[x0 | x_t] on a path. `--teacher FILE.py:CLASS` makes it without arguments.

    path: the path that its times and noise are of. shape: of a sample, without the batch. num_classes: of its labels,
    0 for none. Its parameters and buffers tell it from others when a run is resumed.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], num_classes: int = 0) -> None:
        super().__init__(shape, num_classes, guided=False)
        self.path = path
        self.device_marker = nn.Parameter(torch.empty(0), requires_grad=False)  # tells where one without weights lies

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """D(x, t), (B, ...); x (B, ...) noised, t (B,) in the path's clock and the dtype of x.

        cond.labels: (B,) int64, or None; NULL_LABEL where a sample has no label.
        """

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """The denoiser, whatever s; raises ShapeError where it gives no tensor of the shape of x."""
        denoised = self.denoise(x, t, Condition() if cond is None else cond)
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            given = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise ShapeError(
                f"{stored_name(type(self))}.denoise gives {given} for samples of shape {tuple(x.shape)}: give one "
                "tensor of their shape"
            )
        return denoised

    def flow_map(self) -> FlowMap:
        """The teacher as a flow map whose jumps are DDIM's steps."""
        return FlowMap(self.path, EulerPreconditioning(self.path), self).eval()


def own_teacher(name: str) -> FlowMap:
    """The teacher that FILE.py:NAME of an imported file is: a `TeacherModel`, or a function without arguments that
    returns one, or a flow map.

    Raises ConfigError when no imported file has the name, or what it has is neither, or fails.
    """
    make = outside_function(name)
    found = made(name, stored_class(subclasses(TeacherModel), name) if make is None else make, "teacher")
    flow_map = found.flow_map() if isinstance(found, TeacherModel) else found
    if not isinstance(flow_map, FlowMap):
        raise ConfigError(f"{name} returns no TeacherModel and no flow map")
    return flow_map.eval()
