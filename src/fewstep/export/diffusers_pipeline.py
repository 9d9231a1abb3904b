"""A few-step sampler for diffusers: DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True).

Each step is x <- a x + b F(c_in x, t, s) + origin; the numbers are in fewstep/steps.json. F is the network of this
folder, whose embeddings of time also take s, the time where the step ends. Where there is a scheduler, F is a velocity
and the scheduler takes the step, in any number of them.
"""

import fnmatch
import inspect
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

NETWORKS = ("unet", "transformer")
ENCODERS = tuple(f"{part}{number}" for number in ("", "_2", "_3") for part in ("text_encoder", "tokenizer"))
COMPONENTS = (*NETWORKS, "vae", "scheduler", *ENCODERS, "fewstep")
"""fewstep is a folder of files; the Hub gives no folder that the index does not name."""
TEXT = {"prompt_embeds": "text", "prompt_attention_mask": "mask", "pooled_prompt_embeds": "pooled"}
TOLD = {"prompt", "class_labels", "negative_prompt", *TEXT, *(f"negative_{name}" for name in TEXT)}


class FewStepPipeline(diffusers.DiffusionPipeline):
    """Samples in a few network calls."""

    _optional_components: ClassVar[list[str]] = list(COMPONENTS)

    def __init__(self, **components: Any) -> None:
        super().__init__()
        self.register_modules(**{name: components.get(name) for name in COMPONENTS})
        self.settings: dict[str, Any] = {}
        self.encoder: Any = None

    # diffusers reads a pipeline's components from its signature
    __init__.__signature__ = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in COMPONENTS]
    )

    @property
    def network(self) -> Any:
        """The one network there is."""
        return self.transformer if self.unet is None else self.unet

    def prepare(self) -> None:
        """Read the sampler, and give the network its second time; done once."""
        if self.settings:
            return
        self.folder = Path(self.network.config._name_or_path).parent
        own = self.folder / "fewstep"
        self.settings = json.loads((own / "config.json").read_text())
        self.table = json.loads((own / "steps.json").read_text())
        origin = own / "origin.safetensors"
        self.origin = load_file(origin)["origin"] if origin.is_file() else None
        self.weights = load_file(own / "second_time.safetensors")
        self.added: dict[str, Tensor] = {}
        pattern = self.settings["times"]
        self.places = [name for name, _ in self.network.named_modules() if fnmatch.fnmatch(name, pattern)]
        for name in self.places:
            self.network.get_submodule(name).register_forward_hook(self.adding(name))
        if isinstance(getattr(self.network, "class_embedding", None), nn.Embedding):
            self.network.class_embedding.register_forward_hook(self.masking)
        self.labelled: Any = None
        self.strength: float | None = None

    def adding(self, name: str) -> Any:
        """A hook on an embedding of t: adds what belongs to s."""
        return lambda module, inputs, found: found + self.added[name].to(found)

    def masking(self, module: Any, inputs: Any, found: Tensor) -> Tensor:
        """A hook on an embedding of classes that has no row for "no class": zeros there."""
        return found * self.labelled[:, None].to(found)

    def set_end(self, s: float, strength: float) -> None:
        """Every embedding adds what belongs to the time s and, of students that take it beside s, to the guidance."""
        weight, bias = (self.weights[f"second_time.hidden.{part}"] for part in ("weight", "bias"))
        half = weight.shape[1] // 2
        rates = torch.exp(-math.log(10_000.0) / half * torch.arange(half))
        angles = self.settings["time_factor"] * s * rates
        hidden = linear(torch.cat([angles.cos(), angles.sin()])[None], weight, bias)
        hidden = hidden * torch.sigmoid(hidden)
        if self.settings["guided"] == "beside":
            row = torch.tensor([[math.log(strength), 0.0, 1.0]])
            added = linear(row, self.weights["guidance.weight"], self.weights["guidance.bias"])
            hidden = hidden + added * torch.sigmoid(added)
        for name in self.places:
            own = (self.weights[f"network.{name}.project.{part}"] for part in ("weight", "bias"))
            self.added[name] = linear(hidden, *own)

    def encode(self, prompts: list[str], device: Any, negative: bool = False) -> dict[str, Tensor]:
        """Embeddings of prompts, by the text encoders of the teacher's own pipeline: text, mask, pooled.

        negative: whether to push away from them; else they follow the instruction that such a pipeline puts before.
        """
        made = self.settings["encoder"]
        if made is None:
            raise ValueError("there are no text encoders here: give prompt_embeds")
        kind = getattr(diffusers, made["pipeline"])
        if self.encoder is None:
            signature = inspect.signature(kind.__init__).parameters
            needed = [name for name, each in signature.items() if each.default is inspect.Parameter.empty]
            parts = {name: getattr(self, name, None) for name in signature if name in (*needed[1:], *COMPONENTS)}
            for tokenizer in filter(None, (self.tokenizer, self.tokenizer_2) if made["clip_tokens"] else ()):
                tokenizer.model_max_length = min(tokenizer.model_max_length, made["clip_tokens"])
            self.encoder = kind(**{**parts, "scheduler": None, **made["options"]})
        wanted = {"prompt": prompts, "prompt_2": None, "prompt_3": None, "device": device}
        wanted |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, **made["call"]}
        told = inspect.signature(kind.__call__).parameters.get("complex_human_instruction")
        if told is not None and made["instructed"] and not negative:
            wanted["complex_human_instruction"] = told.default
        takes = inspect.signature(kind.encode_prompt).parameters
        found = self.encoder.encode_prompt(**{name: value for name, value in wanted.items() if name in takes})
        return {name: value for name, value in zip(made["returns"], found, strict=False) if name and value is not None}

    def predict(self, x: Tensor, t: Tensor, words: dict[str, Any]) -> Tensor:
        """F(x, t, s), without a learned variance; words: text, mask, pooled, labels, and the network's own."""
        words = {name: self.cast(value) for name, value in words.items()}
        text, mask, pooled, labels = (words.pop(name, None) for name in ("text", "mask", "pooled", "labels"))
        given: dict[str, Any] = {}
        if labels is not None:
            self.labelled = labels >= 0
            null = self.settings["null_label"]
            given["class_labels"] = torch.where(self.labelled, labels, 0 if null is None else null)
        if text is not None:
            given["encoder_hidden_states"] = text
        if mask is not None:
            given["encoder_attention_mask"] = mask
        given |= self.extras(x, pooled)
        given |= words
        if self.settings["packed"]:
            return self.predict_packed(x, t, given)
        found: Tensor = self.network(x, timestep=t * self.settings["time_scale"], **given).sample
        return found[:, : x.shape[1]]

    def cast(self, value: Any) -> Any:
        """Numbers as the network takes them."""
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.network.dtype) if floats else value

    def extras(self, x: Tensor, pooled: Tensor | None) -> dict[str, Any]:
        """What networks take besides: a prompt's one embedding, sizes, and the guidance that some were trained with."""
        config, more = self.network.config, {}
        height, width = (side * 8 for side in x.shape[-2:])
        if config.get("addition_embed_type") == "text_time":
            sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), 6)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        elif pooled is not None:
            more["pooled_projections"] = pooled
        if "use_additional_conditions" in config:
            sizes = {"resolution": None, "aspect_ratio": None}
            if self.network.use_additional_conditions:
                sizes = {"resolution": x.new_tensor([[height, width]]).expand(len(x), 2)}
                sizes["aspect_ratio"] = x.new_full((len(x), 1), height / width)
            more["added_cond_kwargs"] = sizes
        if self.strength is not None:
            more["guidance"] = x.new_full((len(x),), self.strength)
        return more

    def predict_packed(self, x: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
        """The same for a network of tokens, each a block of 2 x 2 with its row and column."""
        batch, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(rows, device=x.device)[:, None]
        places[..., 2] = torch.arange(columns, device=x.device)
        text = torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=x.device, dtype=x.dtype)
        found = self.network(tokens, timestep=t, img_ids=places.reshape(-1, 3), txt_ids=text, **given).sample
        return found.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        num_inference_steps: int = 2,
        guidance_scale: float = 1.0,
        class_labels: Any = None,
        batch_size: int | None = None,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        **conditions: Any,
    ) -> Any:
        """Samples in num_inference_steps network calls; twice as many with a guidance_scale other than 1, unless the
        student takes it as an input.

        prompt: one, for batch_size samples, or one a sample. class_labels: numbers or names of classes, one a sample.
        latents: standard normal noise (batch, ...) to start from, in place of the generator's. output_type: pil, np, pt
        for values in [0, 1], or latent for samples as the network gives them.
        conditions: negative_prompt; prompt_embeds, prompt_attention_mask, pooled_prompt_embeds and the same with
        negative_ before them, in place of prompts; and what else the network takes, such as its own guidance.
        """
        self.prepare()
        steps, device = self.steps(num_inference_steps), self._execution_device
        told = {"prompt": prompt, "class_labels": class_labels, **conditions}
        count = batch_size or self.count(latents, *(told.get(name) for name in ("prompt", "class_labels", *TEXT)))
        words = self.words(told, count, device)
        guided, self.strength = self.settings["guided"], self.settings["guidance_input"]
        if guided == "own":
            self.strength = guidance_scale * self.settings["guidance_unit"]
        null = None if guided or guidance_scale == 1.0 else self.null(told, words, count, device)
        if latents is None:
            latents = randn_tensor((count, *self.settings["shape"]), generator, device, torch.float32)
        x, dtype = self.table["prior"] * latents.to(device, torch.float32), self.network.dtype
        for step in self.progress_bar(steps):
            self.set_end(step["s"], guidance_scale)
            t = torch.full((count,), step["t"], device=device, dtype=torch.float32)
            inputs = (step.get("c_in", 1.0) * x).to(dtype)
            found = self.predict(inputs, t, words).float()
            if null is not None:
                nothing = self.predict(inputs, t, null).float()
                found = nothing + guidance_scale * (found - nothing)
            x = self.advance(x, found, step)
        self.maybe_free_model_hooks()
        return diffusers.ImagePipelineOutput(images=self.shown(x, output_type))

    def steps(self, count: int) -> list[dict[str, float]]:
        """The steps of so many calls: as they were tuned or, where a scheduler takes them, evenly spaced."""
        known = self.table["steps"].get(str(count))
        if self.scheduler is None:
            if known is None:
                raise ValueError(f"num_inference_steps is {count}; this folder has {', '.join(self.table['steps'])}")
            return known
        unit = self.settings["noise_time"]
        sigmas = None if known is None else [step["t"] / unit for step in known]
        self.scheduler.set_timesteps(count, sigmas=sigmas)
        times = [unit * sigma for sigma in self.scheduler.sigmas.tolist()]
        return [{"t": t, "s": s} for t, s in itertools.pairwise(times)]

    def advance(self, x: Tensor, found: Tensor, step: dict[str, float]) -> Tensor:
        """x where the step ends."""
        if self.scheduler is not None:
            unit = self.scheduler.config.num_train_timesteps / self.settings["noise_time"]
            start, end = (torch.tensor(unit * step[name], dtype=torch.float64) for name in "ts")
            return self.scheduler.step(found, start, x, end).prev_sample
        x = step["a"] * x + step["b"] * found
        return x + step["origin"] * self.origin.to(x) if step["origin"] else x

    @staticmethod
    def count(*given: Any) -> int:
        """How many samples are meant: as many as the first of these that there is has; one for a single prompt."""
        return next((1 if isinstance(each, str) else len(each) for each in given if each is not None), 1)

    def words(self, told: dict[str, Any], count: int, device: Any) -> dict[str, Any]:
        """What the network is told: of prompts and classes, and what else it takes."""
        own = {name: value for name, value in told.items() if name not in TOLD}
        labels, prompt = told["class_labels"], told["prompt"]
        words = {TEXT[name]: told[name].to(device) for name in TEXT if told.get(name) is not None}
        if prompt is not None:
            words = self.encode([prompt] * count if isinstance(prompt, str) else list(prompt), device)
        width, pooled = self.settings["prompt_widths"]
        if width and "text" not in words and "encoder_hidden_states" not in own:  # one token of zeros is no prompt
            words["text"] = torch.zeros(count, 1, width, device=device)
            words |= {"pooled": torch.zeros(count, pooled, device=device)} if pooled else {}
        if labels is None and self.settings["num_classes"]:
            labels = torch.arange(count) % self.settings["num_classes"]
        if labels is not None:
            names = {name: number for number, name in enumerate(self.settings["classes"])}
            unknown = [each for each in labels if isinstance(each, str) and each not in names]
            if unknown:
                raise ValueError(f"no class {unknown[0]!r}; classes are {', '.join(names)}")
            numbers = [names[each] if isinstance(each, str) else int(each) for each in labels]
            words["labels"] = torch.tensor(numbers, device=device)
        return words | own

    def null(self, told: dict[str, Any], words: dict[str, Any], count: int, device: Any) -> dict[str, Any]:
        """What guidance pushes away from: no class, and the negative or the empty prompt; zeros without encoders."""
        null = dict(words)
        if "labels" in words:
            null["labels"] = torch.full_like(words["labels"], -1)
        given = {TEXT[name]: told[f"negative_{name}"] for name in TEXT if told.get(f"negative_{name}") is not None}
        encoder = self.settings["encoder"]
        zeros = encoder is None or (encoder["zeros"] and told.get("negative_prompt") is None)
        if not given and "text" in words and not zeros:
            negative = told.get("negative_prompt") or ""
            given = self.encode([negative] * count if isinstance(negative, str) else list(negative), device, True)
        elif not given:
            given = {name: torch.zeros_like(words[name]) for name in ("text", "pooled") if name in words}
            given |= {"mask": torch.ones_like(words["mask"])} if "mask" in words else {}
        return null | {name: value.to(device) for name, value in given.items()}

    def shown(self, x: Tensor, output_type: str) -> Any:
        """Samples as they are asked for; those of an autoencoder decoded."""
        if output_type == "latent":
            return x
        low, high = self.settings["range"] or (float(x.min()), float(x.max()))
        latents = self.settings["latents"]
        if latents is not None and self.vae is not None:
            mean, std = (torch.tensor(latents[name]).to(x).reshape(-1, *[1] * (x.ndim - 2)) for name in ("mean", "std"))
            x = self.vae.decode((mean + std * x).to(self.vae.dtype)).sample
            low, high = -1.0, 1.0
        images = ((x.float() - low) / (high - low)).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().movedim(1, -1).numpy()
        if output_type == "np":
            return array
        if array.shape[-1] not in (1, 3):
            raise ValueError(f"samples of {array.shape[-1]} channels are no pictures: take output_type 'latent'")
        return [self.numpy_to_pil(video) for video in array] if array.ndim == 5 else self.numpy_to_pil(array)

    def save_config(self, save_directory: Any, **options: Any) -> None:
        """What this folder has besides components: its index, this file, the sampler."""
        self.prepare()
        for name in ("model_index.json", "pipeline.py", "README.md"):
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(save_directory) / name)
        shutil.copytree(self.folder / "fewstep", Path(save_directory) / "fewstep", dirs_exist_ok=True)
