"""A perceptual distance: what the convolutions of a network answer to images, place by place."""

import math

import torch
from torch import Tensor, nn

_SMALLEST_SQUARE = 1e-4  # keeps the gradient of a unit vector bounded where no channel answers


def activations(layers: nn.Module, images: Tensor) -> Tensor:
    """The activations after every convolution (n, d), in the spirit of LPIPS (1801.03924).

    Each stage a (n, C, H, W) becomes a/sqrt(|a|^2 + eps) over the channels of a place, times sqrt(d/(H W)), so that the
    mean square of a difference is the sum over stages of the mean over places of |a - b|^2.
    """
    stages = []
    x = images
    for layer in layers.children():
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            length = torch.sqrt(x.square().sum(1, keepdim=True) + _SMALLEST_SQUARE)
            stages.append((x / length / math.sqrt(x.shape[2] * x.shape[3])).flatten(1))
    found = torch.cat(stages, 1)
    return found * math.sqrt(found.shape[1])
