"""Networks F(x, t, s, cond), and the settings that build them."""

# Stored settings name a class among those defined: whoever reads them has imported all there are.
from fewstep.networks import dit as dit
from fewstep.networks import mlp as mlp
from fewstep.networks import unet as unet
from fewstep.networks import unet1d as unet1d
