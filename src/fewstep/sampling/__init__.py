"""From a flow map to samples: samplers, step times, decoding, pictures."""
