"""Measurements, and what makes tables and figures of them. Not part of an installation; started from a checkout."""
