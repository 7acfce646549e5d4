import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).with_name("guided_diffusion") / "__init__.py"

setup(
    name="elucd",
    version=re.search(r'__version__ = "(.*)"', INIT.read_text())[1],
    description="Off-the-shelf classifier guidance for diffusion models, with an honest account of how good the result is",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["guided_diffusion*", "classifiers*", "evaluation*"]),
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy",
        "scipy",
        "pillow>=10.1",
        "tqdm",
        "pytorch-fid",
        "safetensors",
    ],
    extras_require={
        "plot": ["matplotlib"],
        "test": ["pytest", "scikit-learn", "matplotlib"],
        "train": ["scikit-learn"],
        "dev": ["pytest", "scikit-learn", "matplotlib", "ruff==0.17.*", "mypy==2.*"],
    },
)
