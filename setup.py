"""The packages, found: pyproject.toml has all else. `modeling/` is installed as samlight_hf.modeling."""

from setuptools import find_packages, setup


setup(packages=[*find_packages(include=["samlight_hf", "samlight_hf.*"]), "samlight_hf.modeling"])
