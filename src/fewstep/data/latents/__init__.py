"""Latents of images: the autoencoders that make them, the shards that hold them."""
