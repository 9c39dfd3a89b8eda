"""Measurements: of files before they are loaded, of this machine, of speed and identity."""
