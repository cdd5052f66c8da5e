"""The build beyond pyproject.toml: one wheel for every Python of a platform, or without kernels one for everywhere.

``LLMSPARSE_PURE=1`` leaves the native kernels out: py3-none-any, whose products run in torch.
"""

import os
from typing import Any

from setuptools import Distribution, setup

PURE = os.environ.get("LLMSPARSE_PURE") == "1"


class Build(Distribution):
    def parse_config_files(self, *arguments: Any, **options: Any) -> None:
        super().parse_config_files(*arguments, **options)
        if PURE:
            self.ext_modules = []


setup(distclass=Build, options={} if PURE else {"bdist_wheel": {"py_limited_api": "cp310"}})
