"""For whom latents are encoded: a pipeline of diffusers, whose units they are read in and whose prompts come along."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.data.latents.prompts import CaptionEncoder
from fewstep.data.pictures import Pictures
from fewstep.teachers.text import has_text_encoders, load_text_encoders
from fewstep.utils.errors import ConfigError
from fewstep.utils.hub import local_copy


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher that latents are encoded for, and where the captions are that it is to learn from."""

    teacher: str = ""
    """Folder of a pipeline, or OWNER/NAME of one on the Hugging Face Hub: latents are read in its units, captions are
    embedded by its text encoders; its folder vae is the autoencoder where none is named."""
    captions: Path | None = None
    """JSONL with file_name and text in each line. Not given: metadata.jsonl or captions.jsonl in FOLDER, else NAME.txt
    beside each image."""
    tokens: int = 0
    """Longest prompt, in tokens, of a pipeline's longest text encoder; 0 for its own."""

    def autoencoder(self, named: Path | None) -> Path:
        """The folder of the autoencoder; raises ConfigError where nothing says it."""
        if named is not None:
            return named
        if not self.teacher:
            raise ConfigError("name what encodes the images: --teacher PIPELINE, or --autoencoder FOLDER")
        return local_copy(self.teacher) / "vae"

    def caption_encoder(self, pictures: Pictures, dtype: torch.dtype, device: torch.device) -> CaptionEncoder | None:
        """What embeds the captions of the images; None for a teacher without text encoders.

        Raises what `Pictures.captions` and `load_text_encoders` raise, ConfigError for captions that nothing embeds.
        """
        folder = local_copy(self.teacher) if self.teacher else None
        if folder is None or not has_text_encoders(folder):
            if self.captions is not None or self.tokens:
                raise ConfigError(
                    "captions and tokens are for text encoders, and there are none: name a pipeline that has them with "
                    "--teacher"
                )
            return None
        captions = pictures.captions(self.captions)
        return CaptionEncoder(load_text_encoders(folder, device, self.tokens), captions, dtype)
