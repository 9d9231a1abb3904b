"""Reporting: samples as pictures, figures of a run, and the page that holds them."""
