"""What pyproject.toml cannot say: `configs/` stays at the top of the repository and is shipped as `retina/configs/`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["retina*"]), "retina.configs"],
    package_dir={"retina.configs": "configs"},
    package_data={"retina.configs": ["**/*.yaml"], "retina": ["weights/*/*"]},
)
