"""What a job is and how fast its parts are: plain values, all of them on rank 0."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Library:
    """The MPI library in this process.

    Attributes:
        name: For example ``Open MPI``.
        version: Its own.
        standard: The version of the MPI standard.
        path: Its file, or None where the system does not tell.
        mpirun: The launcher that is installed with it, or None.
        mpi4py: The version of mpi4py.
        thread_level: What MPI was started with, or None where it was not started.
        cuda_aware: Whether it takes pointers to a GPU's memory; None where it does not say.
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
        """The library whose launchers start it."""
        if self.name in ("Open MPI", "IBM Spectrum MPI"):
            return "Open MPI"
        mpich = ("MPICH", "MVAPICH", "Intel", "CRAY")
        return "MPICH" if any(name in self.name for name in mpich) else self.name


@dataclass(frozen=True, slots=True)
class Launcher:
    """What started this process, as its environment tells.

    Attributes:
        name: For messages.
        family: The libraries that it starts; None means any.
        num_processes: How many it started.
        rank: This one's number among them.
    """

    name: str
    family: str | None
    num_processes: int
    rank: int


@dataclass(frozen=True, slots=True)
class Mpirun:
    """The ``mpirun`` that the shell would find.

    Attributes:
        path: Its file.
        family: The libraries that it starts, or None where it does not say.
    """

    path: str
    family: str | None


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank has.

    Attributes:
        rank: Its number.
        node: The number of its node.
        cores: The cores it is bound to.
        num_cores: Its share of those, and of its container's quota, in whole cores.
        omp_num_threads: OMP_NUM_THREADS, or None where it is not set.
        cuda_visible_devices: CUDA_VISIBLE_DEVICES, likewise.
    """

    rank: int
    node: int
    cores: tuple[int, ...]
    num_cores: int
    omp_num_threads: str | None
    cuda_visible_devices: str | None


@dataclass(frozen=True, slots=True)
class Node:
    """Ranks that share memory, and what they share.

    Attributes:
        host: Its name.
        ranks: Those on it.
        num_cores: Cores that a job may use here, whatever its ranks are bound to.
        free_nbytes: Memory that is free.
        shm_nbytes: Size of the file system for shared memory, or None where there is none.
        shm_free_nbytes: What is free of it, likewise.
        num_gpus: NVIDIA GPUs that this node shows.
        window_problem: Why its ranks cannot share a window, or None where they can.
    """

    host: str
    ranks: tuple[int, ...]
    num_cores: int
    free_nbytes: int
    shm_nbytes: int | None
    shm_free_nbytes: int | None
    num_gpus: int
    window_problem: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """What was started.

    Attributes:
        library: The MPI library.
        launcher: What started it, or None.
        mpirun: What the shell would find; asked for only where there was no launcher.
        world_size: Ranks that the library sees.
        ranks: All of them, or none where launcher and library do not fit.
        nodes: Likewise.
    """

    library: Library
    launcher: Launcher | None
    mpirun: Mpirun | None
    world_size: int
    ranks: tuple[Rank, ...] = ()
    nodes: tuple[Node, ...] = ()

    @property
    def launcher_fits(self) -> bool:
        """Whether launcher and library belong together."""
        if self.launcher is None:
            return True
        return starts(self.launcher, self.library) and self.launched in (1, self.world_size)

    @property
    def launched(self) -> int:
        """Processes that the launcher started."""
        return self.launcher.num_processes if self.launcher else 1

    @property
    def is_even(self) -> bool:
        """Whether all nodes have as many ranks, so that shardopt shares memory within them."""
        return len({len(node.ranks) for node in self.nodes}) == 1


@dataclass(frozen=True, slots=True)
class Link:
    """What two nodes were measured to send each other, while no other nodes used their ports.

    Attributes:
        nodes: Their numbers.
        latency_s: Of a message of 8 bytes, one way.
        nbytes_per_s: Each way, in both directions at once.
    """

    nodes: tuple[int, int]
    latency_s: float
    nbytes_per_s: float

    def better_of(self, other: "Link") -> "Link":
        """The shorter latency and the higher rate of two measurements."""
        rate = max(self.nbytes_per_s, other.nbytes_per_s)
        return Link(self.nodes, min(self.latency_s, other.latency_s), rate)


@dataclass(frozen=True, slots=True)
class Speeds:
    """How fast a job's parts are.

    Attributes:
        memory: For each node, bytes/s of ``a += b``, all ranks at once.
        barrier_s: For each node, a barrier of its ranks; None where there is one rank.
        links: Of neighbouring nodes, the last and the first included; none with one node.
        exchange: For each node, bytes/s it sends while all send to all.
    """

    memory: tuple[float, ...]
    barrier_s: tuple[float | None, ...]
    links: tuple[Link, ...]
    exchange: tuple[float, ...]


def starts(launcher: Launcher, library: Library) -> bool:
    """Whether processes of this launcher may initialise this library at all.

    Other libraries than Open MPI's own abort under its mpirun. The reverse is a job of one for
    each process, or even works, with Slurm's PMI-2; numbers of ranks tell.
    """
    return launcher.family != "Open MPI" or library.family == "Open MPI"
