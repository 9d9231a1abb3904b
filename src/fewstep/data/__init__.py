"""Data: sources, what is measured of them, the order of training, augmentation."""
