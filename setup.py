"""The package: five top-level rooms beside the library, and what they need.

`prompts`, `pretrain`, `finetune`, `eval` and `launch` are packages of their own, so that a folder's
path is its import path. `ds_configs/` stays a plain folder of the source tree, because the user
writes its path on the command line; a wheel carries a copy of it under
`<sys.prefix>/share/mm-moe/ds_configs`.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
ROOMS = ("mm_moe", "prompts", "pretrain", "finetune", "eval", "launch")

# Data that modules open next to themselves: embedded data and weights with their notices,
# tokenizers, recipes, page templates.
PACKAGE_DATA = (
    *("*.parquet", "*.safetensors", "*.json", "*.txt", "*.md", "*.yaml", "*.jinja"),
    *("NOTICE*", "LICENSE*", "*.sbatch"),
)

# Lower bounds are the oldest releases that were tried with tests. No upper bounds: pip then
# takes the newest torch and the torchvision built for it. Holding torch back pairs it with a
# torchvision of another release, whose import fails (`torchvision::nms does not exist`).
REQUIREMENTS = [
    "torch>=2.11",
    "torchvision>=0.26",
    "deepspeed>=0.19",
    "transformers>=5.4",  # configurations became dataclasses
    "open-clip-torch>=3",
    "datasets>=5.2",
    "accelerate>=1.10",
    "peft>=0.18",
    "sentencepiece>=0.2",
    "protobuf>=5",  # transformers reads sentencepiece models with it
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "huggingface-hub>=1.31",
    "numpy>=2.1",
    "pyarrow>=21",
    "fsspec>=2025.3",
    "pillow>=11",
    "pyyaml>=6.0.2",
    "ninja>=1.11",  # DeepSpeed compiles its operators with it
    "scikit-learn>=1.7",
    "scipy>=1.13",
    "matplotlib>=3.10",
    "jinja2>=3.1.4",
    "tqdm>=4.67",
    "psutil>=6",
]
TEST_REQUIREMENTS = [
    "pytest>=9",
    "pytest-xdist>=3.8",
    "torchmetrics>=1.8",  # an independent peer of the scores
    "h5py>=3.13",  # features of IEMOCAP
    "nibabel>=5.3",  # volumes of ADNI
    "scikit-survival>=0.24",  # the concordance index
    "anndata>=0.12",  # matrices of genes and cells
    "tensorboard>=2.20",  # reports of runs
    "ruff>=0.17",
    "mypy>=2",
    "types-PyYAML",
    "pre-commit>=4",
    "setuptools>=77",  # the wheel test builds without isolation
    "wheel",
]

setup(
    name="mm-moe",
    version="0.1.0",
    description="Sparse, expert-parallel multimodal models for data with missing modalities",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(HERE, include=[p for room in ROOMS for p in (room, f"{room}.*")]),
    package_data={"": [p for name in PACKAGE_DATA for p in (name, f"**/{name}")]},
    data_files=[
        (
            "share/mm-moe/ds_configs",
            sorted(str(p.relative_to(HERE)) for p in (HERE / "ds_configs").iterdir()),
        )
    ],
    install_requires=REQUIREMENTS,
    extras_require={
        "test": TEST_REQUIREMENTS,
        "iemocap": ["h5py>=3.13"],
        "fastmri": ["h5py>=3.13"],
        "clinical": ["scikit-survival>=0.24", "nibabel>=5.3", "anndata>=0.12"],
        "single_cell": ["anndata>=0.12", "scanpy>=1.11", "scib-metrics>=0.5.6"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
