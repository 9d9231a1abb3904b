"""Evaluation: features of images, distances between sets of them, alignment with a teacher, figures of one run."""
