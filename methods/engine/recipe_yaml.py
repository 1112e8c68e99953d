"""How recipes and jobs are read from YAML."""

from __future__ import annotations

import re

import yaml

#: what `weights_digest` gives
DIGEST = re.compile(r"[0-9a-f]{16}\Z")


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 7e-5 as a number, as YAML 1.2 does (1.1 wants 7.0e-5), and a digest of
    16 digits as the text that it is, not as a number.
    """


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
for _digit in "0123456789":
    # first, before the resolvers of whole and real numbers: no parameter has 16 digits
    YamlLoader.yaml_implicit_resolvers[_digit].insert(0, ("tag:yaml.org,2002:str", DIGEST))
