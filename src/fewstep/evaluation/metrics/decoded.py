"""Features of the images that latents stand for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.data.latents.autoencoders import Decoder
from fewstep.evaluation.metrics.features import Extractor
from fewstep.utils.errors import UnsupportedError

_DECODED_AT_ONCE = 64


class DecodedExtractor(Extractor):
    """Latents, decoded, as another extractor sees images; it keeps that one's name, for the features are its own.

    Where an Extractor speaks of images, this one takes samples (n, c, h, w) of latents. They are decoded a few at a
    time, so that the images never lie in memory together.
    """

    def __init__(self, extractor: Extractor, decoder: Decoder) -> None:
        self.name = extractor.name
        self._extractor, self._decoder = extractor, decoder

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self._extractor.features(part) for part in self._decoded(images)])

    def classify(self, images: Tensor) -> Tensor:
        return torch.cat([self._extractor.classify(part) for part in self._decoded(images)])

    def perceive(self, images: Tensor) -> Tensor:
        raise UnsupportedError("decoding passes no gradient: compare latents as they are")

    def _decoded(self, samples: Tensor) -> Iterator[Tensor]:
        for part in torch.split(samples, _DECODED_AT_ONCE):
            yield self._decoder.images(part)
