"""A few-step sampler for diffusers: DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True).

Each step is x <- a x + b F(c_in x, t, s) + origin; the numbers are in fewstep/steps.json. F is the network of this
folder, whose embeddings of time also take s, the time where the step ends.
"""

import fnmatch
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear


class TwoTimeEmbedding(nn.Module):
    """An embedding of t, plus what the second time adds."""

    def __init__(self, embedding: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.embedding, self.weight, self.bias = embedding, weight, bias
        self.hidden = torch.zeros(1)

    def forward(self, *args: Any, **options: Any) -> Tensor:
        found: Tensor = self.embedding(*args, **options)
        return found + linear(self.hidden.to(found), self.weight.to(found), self.bias.to(found))


class FewStepPipeline(DiffusionPipeline):
    """Samples in a few network calls. unet or transformer: the network, whichever this folder has."""

    _optional_components = ("unet", "transformer")

    def __init__(self, unet: Any = None, transformer: Any = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, transformer=transformer)
        self.settings: dict[str, Any] = {}

    @property
    def network(self) -> Any:
        """The one network there is."""
        return self.transformer if self.unet is None else self.unet

    def prepare(self) -> None:
        """Read the sampler, and give the network its second time; done once."""
        if self.settings:
            return
        folder = Path(self.network.config._name_or_path).parent / "fewstep"
        self.settings = json.loads((folder / "config.json").read_text())
        self.table = json.loads((folder / "steps.json").read_text())
        origin = folder / "origin.safetensors"
        self.origin = load_file(origin)["origin"] if origin.is_file() else None
        weights = load_file(folder / "second_time.safetensors")
        self.second_time = weights["second_time.hidden.weight"], weights["second_time.hidden.bias"]
        self.embeddings = []
        places = [name for name, _ in self.network.named_modules() if fnmatch.fnmatch(name, self.settings["times"])]
        for place in places:
            owner, _, name = place.rpartition(".")
            own = [weights[f"network.{place}.project.{part}"] for part in ("weight", "bias")]
            wrapped = TwoTimeEmbedding(self.network.get_submodule(place), *own)
            setattr(self.network.get_submodule(owner), name, wrapped)
            self.embeddings.append(wrapped)

    def set_end(self, s: float) -> None:
        """Every embedding adds what belongs to the time s."""
        weight, bias = self.second_time
        half = weight.shape[1] // 2
        rates = torch.exp(-math.log(10_000.0) / half * torch.arange(half))
        angles = self.settings["time_factor"] * s * rates
        hidden = linear(torch.cat([angles.cos(), angles.sin()])[None], weight, bias)
        for embedding in self.embeddings:
            embedding.hidden = hidden * torch.sigmoid(hidden)

    def predict(self, x: Tensor, t: Tensor, labels: Tensor | None, conditions: dict[str, Any]) -> Tensor:
        """F(x, t, s), without a learned variance."""
        if labels is not None:
            conditions = {"class_labels": labels, **conditions}
        if self.settings["packed"]:
            return self.predict_packed(x, t, conditions)
        found: Tensor = self.network(x, timestep=t, **conditions).sample
        return found[:, : x.shape[1]]

    def predict_packed(self, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The same for a network of tokens, each a block of 2 x 2 with its row and column."""
        batch, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(rows, device=x.device)[:, None]
        places[..., 2] = torch.arange(columns, device=x.device)
        text = torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, device=x.device, dtype=x.dtype)
        found = self.network(tokens, timestep=t, img_ids=places.reshape(-1, 3), txt_ids=text, **conditions).sample
        return found.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 2,
        class_labels: Any = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        **conditions: Any,
    ) -> Any:
        """batch_size samples in num_inference_steps network calls.

        class_labels: whole numbers, one a sample. latents: standard normal noise (batch, ...) to start from, in place
        of the generator's. conditions: what else the network takes, such as encoder_hidden_states. output_type: pil,
        np, or pt for tensors in the units of training.
        """
        self.prepare()
        steps = self.table["steps"].get(str(num_inference_steps))
        if steps is None:
            known = ", ".join(self.table["steps"])
            raise ValueError(f"num_inference_steps is {num_inference_steps}; this folder has {known}")
        device, dtype = self._execution_device, self.network.dtype
        if latents is None:
            shape = (batch_size, *self.settings["shape"])
            latents = torch.randn(shape, generator=generator, dtype=torch.float32)
        x = self.table["prior"] * latents.to(device, dtype)
        if class_labels is None and self.settings["num_classes"]:
            class_labels = torch.arange(len(x)) % self.settings["num_classes"]
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=device)
        for step in self.progress_bar(steps):
            self.set_end(step["s"])
            t = torch.full((len(x),), step["t"], device=device, dtype=dtype)
            x = step["a"] * x + step["b"] * self.predict(step["c_in"] * x, t, labels, conditions)
            if step["origin"]:
                x = x + step["origin"] * self.origin.to(x)
        return ImagePipelineOutput(images=self.shown(x, output_type))

    def shown(self, x: Tensor, output_type: str) -> Any:
        """Samples as they are asked for."""
        if output_type == "pt":
            return x
        low, high = self.settings["range"] or (float(x.min()), float(x.max()))
        images = ((x.float() - low) / (high - low)).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return images
        if images.shape[-1] not in (1, 3):
            raise ValueError(f"samples of {images.shape[-1]} channels are no pictures: take output_type 'pt'")
        return self.numpy_to_pil(images)
