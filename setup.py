import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).with_name("guided_diffusion") / "__init__.py"

setup(
    name="elucd",
    version=re.search(r'__version__ = "(.*)"', INIT.read_text())[1],
    description="Off-the-shelf classifier guidance for diffusion models, "
    "with an honest account of how good the result is",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["guided_diffusion*", "classifiers*", "evaluation*"]),
        # Data only, beside the packages as in a checkout: the table of files and the small networks.
        "pretrained_models",
        "pretrained_models.cifar10",
        "pretrained_models.digits",
        "pretrained_models.digits_dit",
        "pretrained_models.digits_dit.vae",
        "pretrained_models.digits_dit.tiny",
    ],
    package_data={
        "pretrained_models": ["files.json", "README.md"],
        "pretrained_models.digits": ["*.safetensors", "*.npz", "*.json"],
        "pretrained_models.cifar10": ["*.safetensors", "*.npz", "*.json"],
        **{
            f"pretrained_models.digits_dit{part}": ["*.safetensors", "*.json"]
            for part in ("", ".vae", ".tiny")
        },
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy",
        "scipy",
        "pillow>=10.1",
        "tqdm",
        "pytorch-fid",
        "safetensors",
        "filelock",
    ],
    extras_require={
        "plot": ["matplotlib"],
        "test": ["pytest", "pytest-xdist", "setuptools>=70.1", "scikit-learn", "matplotlib"],
        "train": ["scikit-learn"],
        "dit": ["diffusers"],
        "diffusers": ["diffusers", "transformers"],
        "zoo": ["timm", "transformers"],
        "dev": ["ruff==0.17.*", "mypy==2.*", "diffusers", "timm", "transformers"],
    },
)
