"""What the MuJoCo tasks share: packages loaded only when a task is made, pictures, and experts that are not perfect."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.policies.simulation import Expert, Picture, Simulation, Vector
from fewstep.utils.errors import MissingExtraError, UnsupportedError
from fewstep.utils.extras import installing

HEIGHT, WIDTH = 256, 320
EXPERT_NOISE = 0.1
"""Standard deviation of what is added to each number of an expert's action, bounds being -1 and 1."""

_DRAWING_HINT = "set MUJOCO_GL to what is installed: osmesa (Debian's libosmesa6) or egl draw without a screen"


def _reason(error: Exception) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def packages_of(task: str, package: str) -> Iterator[None]:
    """Around the imports that a task needs.

    Raises MissingExtraError where one is absent, UnsupportedError where MuJoCo cannot load the drawing library that
    the environment variable MUJOCO_GL asks for.
    """
    try:
        with redirect_stderr(io.StringIO()):  # gymnasium-robotics prints news of environments that are not used here
            yield
    except ImportError as error:
        raise MissingExtraError(f"task {task} needs {package}: {installing('policy')} ({_reason(error)})") from error
    except (AttributeError, RuntimeError) as error:  # what MuJoCo raises on import for a GL library that is not there
        raise UnsupportedError(f"task {task} cannot load {package} ({_reason(error)}); {_DRAWING_HINT}") from error


@dataclass(frozen=True)
class View:
    """Where a scene is seen from: the point looked at (m), the distance to it (m), and two angles (degrees)."""

    lookat: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float


class Camera:
    """Draws a MuJoCo scene without changing its state; the drawing library is loaded for the first picture."""

    def __init__(self, model: Any, data: Any, view: View) -> None:
        import mujoco

        self._model, self._data = model, data
        self._options, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self._scene, self._frame = mujoco.MjvScene(model, maxgeom=1000), mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        self._camera.lookat[:], self._camera.distance = view.lookat, view.distance
        self._camera.azimuth, self._camera.elevation = view.azimuth, view.elevation
        # The body that pulls the hand along is no part of the scene, though some models give it a colour.
        model.geom_rgba[model.body_mocapid[model.geom_bodyid] >= 0, 3] = 0.0
        self._window: Any = None
        self._context: Any = None

    def picture(self) -> Picture:
        """The scene now, (HEIGHT, WIDTH, 3) uint8; raises UnsupportedError where nothing here can draw."""
        import mujoco

        if self._context is None:
            self._open()
        self._window.make_current()
        every = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, self._data, self._options, None, self._camera, every, self._scene)
        mujoco.mjr_render(self._frame, self._scene, self._context)
        pixels = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._frame, self._context)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Release what the drawing library holds."""
        if self._context is not None:
            self._context.free()
            self._window.free()
            self._window, self._context = None, None

    def _open(self) -> None:
        import mujoco

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # without a screen the default library warns
                window = mujoco.gl_context.GLContext(WIDTH, HEIGHT)
                if not window._context:  # MuJoCo would go on without, and the second time end the process
                    raise RuntimeError("there is no screen")
                window.make_current()
                context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        except Exception as error:  # every library fails in a way of its own
            raise UnsupportedError(f"no picture can be drawn here ({_reason(error)}); {_DRAWING_HINT}") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, context)
        self._window, self._context = window, context


class ArmSimulation(Simulation):
    """A package's environment of a robot arm, with a camera where pictures are wanted."""

    def __init__(self, environment: Any, view: View, render: bool) -> None:
        self._environment = environment
        self._camera = Camera(environment.model, environment.data, view) if render else None

    def render(self) -> Picture:
        """The table; raises UnsupportedError where the simulation was made without a camera, and as `Camera` does."""
        if self._camera is None:
            raise UnsupportedError("this simulation draws no pictures: make it with render=True")
        return self._camera.picture()

    def close(self) -> None:
        """Release the camera."""
        if self._camera is not None:
            self._camera.close()
        self._environment.close()


class NoisyExpert(Expert):
    """A rule's action, plus noise: clip(clip(rule(o)) + EXPERT_NOISE z), z ~ N(0, I), both clips to [-1, 1].

    What the noise disturbs the rule puts right, so demonstrations show the way back too. The rule sees the observation
    alone; the seed gives z.
    """

    def __init__(self, rule: Callable[[Vector], Vector]) -> None:
        self._rule = rule
        self._random = np.random.default_rng()

    def begin(self, seed: int) -> None:
        """Noise from the start, of its own stream: the seed's own draws place the objects."""
        self._random = np.random.default_rng((seed, 1))

    def act(self, observation: Vector) -> Vector:
        """The action (4,) for an observation."""
        action = np.clip(self._rule(observation), -1, 1)
        noisy = action + EXPERT_NOISE * self._random.standard_normal(len(action))
        return np.clip(noisy, -1, 1).astype(np.float32)
