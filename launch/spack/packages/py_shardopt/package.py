# Copyright shardopt developers. Apache-2.0.
"""The recipe of shardopt for Spack: spack repo add launch/spack && spack install py-shardopt."""

from pathlib import Path

from spack.package import depends_on, license, variant, version
from spack_repo.builtin.build_systems.python import PythonPackage


class PyShardopt(PythonPackage):
    """ZeRO optimizers for training under mpirun, for PyTorch, JAX and NumPy."""

    # The checkout that this recipe is in: nothing has been published yet.
    homepage = f"file://{Path(__file__).resolve().parents[4]}"
    git = homepage

    license("Apache-2.0")

    version("main", branch="main")

    variant("torch", default=False, description="Train models of PyTorch")
    variant("jax", default=False, description="Train models of JAX, and the optax transformation")
    variant("cli", default=True, description="Tables and progress bars of the command shardopt")

    depends_on("python@3.11:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("py-ml-dtypes@0.5:", type=("build", "run"))
    depends_on("py-mpi4py@4:", type=("build", "run"))
    depends_on("py-numba@0.61:", type=("build", "run"))
    depends_on("py-numpy@2:", type=("build", "run"))
    depends_on("py-xxhash@3:", type=("build", "run"))
    depends_on("py-torch@2.6:", type=("build", "run"), when="+torch")
    depends_on("py-jax@0.4.35:", type=("build", "run"), when="+jax")
    depends_on("py-optax@0.2:", type=("build", "run"), when="+jax")
    depends_on("py-rich@14.1:", type=("build", "run"), when="+cli")
