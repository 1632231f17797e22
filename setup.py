"""Metadata is in pyproject.toml; this file is where the compiled kernels of csrc/ will be built from."""

from setuptools import setup

setup()
