"""Robot policies: observations in, chunks of actions out, on the same flow maps as images."""
