"""Tools that know nothing of models: errors, files, serialization, tensors, random numbers, forward-mode AD."""
