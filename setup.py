"""Which folders become which packages: one import name, `vitpareto`, over the top-level folders.

Everything else is declared in pyproject.toml.
"""

from setuptools import find_packages, setup

FOLDERS = ("methods", "search", "clusters", "dashboards")

setup(
    package_dir={"vitpareto": "vitpareto", **{f"vitpareto.{name}": name for name in FOLDERS}},
    packages=[
        "vitpareto",
        *(f"vitpareto.{name}" for name in FOLDERS),
        *(f"vitpareto.{name}.{room}" for name in FOLDERS for room in find_packages(name)),
    ],
)
