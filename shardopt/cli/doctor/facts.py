"""The facts about a job and the speeds of its parts: plain values, gathered on rank 0."""

from dataclasses import dataclass

from shardopt.backends.cuda.peers import Device, Peers
from shardopt.backends.cuda.software import Software


@dataclass(frozen=True, slots=True)
class Library:
    """The MPI library in this process.

    Attributes:
        name: For example ``Open MPI``.
        version: Its own version.
        standard: The version of the MPI standard that it implements.
        path: Its file, or None if the system does not report it.
        mpirun: The launcher that is installed with it, or None.
        mpi4py: The version of mpi4py.
        thread_level: The level that MPI was initialized with, or None if it was not.
        cuda_aware: Whether it accepts pointers to GPU memory; None if it does not report that.
    """

    name: str
    version: str
    standard: str
    path: str | None
    mpirun: str | None
    mpi4py: str
    thread_level: str | None
    cuda_aware: bool | None

    @property
    def family(self) -> str:
        """The library family whose launchers can start it."""
        if self.name in ("Open MPI", "IBM Spectrum MPI"):
            return "Open MPI"
        return "MPICH" if self.site or "MPICH" in self.name else self.name

    @property
    def site(self) -> str | None:
        """The vendor's name if it is an MPI that sites install for their network, else None."""
        vendors = {"CRAY": "Cray MPICH", "Intel": "Intel MPI", "MVAPICH": "MVAPICH"}
        return next((known for key, known in vendors.items() if key in self.name), None)


@dataclass(frozen=True, slots=True)
class Launcher:
    """The launcher that started this process, according to the environment.

    Attributes:
        name: Its name, for messages.
        family: The library family that it can start; None means any.
        num_processes: Number of processes that it started.
        rank: The number of this process among them.
    """

    name: str
    family: str | None
    num_processes: int
    rank: int


@dataclass(frozen=True, slots=True)
class Mpirun:
    """The ``mpirun`` that a shell finds on the PATH.

    Attributes:
        path: Its file.
        family: The library family that it can start, or None if its version does not show it.
    """

    path: str
    family: str | None


@dataclass(frozen=True, slots=True)
class RankGpu:
    """The GPUs of a node as one of its ranks finds them.

    Attributes:
        software: CuPy, the driver, and the GPUs that the rank sees.
        device: The GPU that it takes, or None if it cannot use any.
        pinned_nbytes: Bytes that it may lock in memory, or None if there is no limit.
        slurm_binding: A setting by which Slurm gives it a GPU that other tasks cannot reach.
    """

    software: Software
    device: Device | None
    pinned_nbytes: int | None
    slurm_binding: str | None


@dataclass(frozen=True, slots=True)
class Rank:
    """The resources of one rank.

    Attributes:
        rank: Its number.
        node: The number of its node.
        cores: The cores that it is bound to.
        num_cores: Its share of those and of its container's quota, in whole cores.
        omp_num_threads: OMP_NUM_THREADS, or None if it is not set.
        cuda_visible_devices: CUDA_VISIBLE_DEVICES, or None if it is not set.
        namespaces: The namespaces of its process IDs and of its mounts; empty if not known.
        gpu: What it can do with GPUs; None on a node without.
    """

    rank: int
    node: int
    cores: tuple[int, ...]
    num_cores: int
    omp_num_threads: str | None
    cuda_visible_devices: str | None
    namespaces: tuple[str, ...]
    gpu: RankGpu | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A node: ranks that share memory, and the resources that they share.

    Attributes:
        host: The name of its host.
        ranks: Its ranks.
        num_cores: Number of cores that a job may use here, whatever its ranks are bound to.
        free_nbytes: Memory that may still be used in bytes; 0 if it is not known.
        memory_limit: The file with the limit that bounds it, or None if the machine does.
        address_nbytes: Bytes that a process may still map, or None if there is no limit.
        promise_nbytes: Bytes that the kernel may still promise, or None if it does not count.
        shm_nbytes: Size of ``/dev/shm`` in bytes; 0 if there is none.
        mpi_shm_nbytes: Bytes of it that the MPI library fills; 0 if that is not known.
        tracking: The way to find weights that were written, or None if a wrong one is asked for.
        tracking_reason: Why no faster way is used, or None if there is none.
        num_gpus: Number of NVIDIA GPUs that this node shows.
        sharing_problem: Why its ranks cannot share memory, or None if they can.
        peers: How its ranks exchange what is on their GPUs; None if they cannot use any.
    """

    host: str
    ranks: tuple[int, ...]
    num_cores: int
    free_nbytes: int
    memory_limit: str | None
    address_nbytes: int | None
    promise_nbytes: int | None
    shm_nbytes: int
    mpi_shm_nbytes: int
    tracking: str | None
    tracking_reason: str | None
    num_gpus: int
    sharing_problem: str | None
    peers: Peers | None = None


@dataclass(frozen=True, slots=True)
class Slurm:
    """The way Slurm counts the memory of a job.

    Attributes:
        gather_type: JobAcctGatherType.
        gather_params: JobAcctGatherParams, or an empty string if it is not set.
    """

    gather_type: str
    gather_params: str


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was started.

    Attributes:
        library: The MPI library.
        launcher: The launcher that started it, or None.
        mpirun: The mpirun that a shell finds; looked for only if there was no launcher.
        world_size: Number of ranks that the library sees.
        ranks: All ranks, or none if launcher and library do not fit.
        nodes: All nodes, or none if launcher and library do not fit.
        slurm: The settings of the Slurm that runs it, or None.
        start_problem: Why MPI has not been started, or None.
        environment: Scheduler, container, conda and Spack of the process that reports.
        prefix: The folder of its Python.
    """

    library: Library
    launcher: Launcher | None
    mpirun: Mpirun | None
    world_size: int
    ranks: tuple[Rank, ...] = ()
    nodes: tuple[Node, ...] = ()
    slurm: Slurm | None = None
    start_problem: str | None = None
    environment: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def launcher_fits(self) -> bool:
        """True if launcher and library fit together."""
        if self.launcher is None:
            return True
        return starts(self.launcher, self.library) and self.launched in (1, self.world_size)

    @property
    def launched(self) -> int:
        """Number of processes that the launcher started."""
        return self.launcher.num_processes if self.launcher else 1

    @property
    def is_even(self) -> bool:
        """True if all nodes have the same number of ranks, so that shardopt shares their memory."""
        return len({len(node.ranks) for node in self.nodes}) == 1


@dataclass(frozen=True, slots=True)
class Link:
    """The measured speed of the link between two nodes while no other node used their ports.

    Attributes:
        nodes: The numbers of the two nodes.
        latency_s: Seconds for a message of 8 bytes, one way.
        nbytes_per_s: Bytes/s each way, in both directions at once.
    """

    nodes: tuple[int, int]
    latency_s: float
    nbytes_per_s: float


@dataclass(frozen=True, slots=True)
class Speeds:
    """The speeds of a job's parts.

    Attributes:
        memory: For each node, bytes/s of ``a += b`` on all its ranks at once.
        barrier_s: For each node, seconds of a barrier of its ranks; None for a single rank.
        links: The links between neighbouring nodes, the last and the first node included.
        exchange: For each node, bytes/s that it sends while all nodes send to all; empty for one.
        message_s: For each node, seconds of a rank for each message that it sends; likewise.
        updates: For each node, bytes/s that updates of all its ranks move; empty if not measured.
        disk: For each node, bytes/s that it writes while all nodes write; empty if not measured.
        disk_problem: Why it could not be measured, or None.
    """

    memory: tuple[float, ...]
    barrier_s: tuple[float | None, ...]
    links: tuple[Link, ...]
    exchange: tuple[float, ...]
    message_s: tuple[float, ...] = ()
    updates: tuple[float, ...] = ()
    disk: tuple[float, ...] = ()
    disk_problem: str | None = None


def starts(launcher: Launcher, library: Library) -> bool:
    """Return whether processes of this launcher can initialize this library at all.

    Any library but Open MPI aborts under Open MPI's mpirun. The other way round every process
    becomes a job of one rank, or it even works (Slurm's PMI-2); the number of ranks shows which.
    """
    return launcher.family != "Open MPI" or library.family == "Open MPI"
