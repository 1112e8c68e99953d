"""The YAML dialect of recipes and jobs.

The only module of `vitpareto.methods` that imports PyYAML. `Recipe.from_yaml` and `Recipe.to_yaml`
import it when they are called, so that pruning works where torch and timm alone are installed.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.recipe_fields import DIGEST


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 7e-5 as a number, as YAML 1.2 does (YAML 1.1 requires 7.0e-5), and a
    digest of 16 decimal digits as text.
    """


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
for _digit in "0123456789":
    # before the resolvers of numbers; no parameter has 16 digits
    YamlLoader.yaml_implicit_resolvers[_digit].insert(0, ("tag:yaml.org,2002:str", DIGEST))


def parse_yaml(text: str) -> Any:
    """The value of YAML text. Raises BadInput if it is not YAML."""
    try:
        return yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise BadInput(
            f"recipe must be YAML ({error})", Code.UNREADABLE, name="recipe", reason=str(error)
        ) from None


def format_yaml(value: Any) -> str:
    """A plain value as YAML text, with short lists on one line."""
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=100)
