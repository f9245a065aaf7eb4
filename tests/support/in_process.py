"""Several nodes within one process: their memory, and a network whose messages obey the test."""

import random
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np

from shardopt.backends.cpu.backend import CpuBackend
from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.partition import ParamSpec, plan_partition
from shardopt.layout.traffic import Traffic
from shardopt.store.buffers import RegionArrays, ShardArrays, ShardBuffers
from shardopt.transport.reduce_scatter import ReduceScatter


class Broken(Exception):
    """A connection broke."""


class Network:
    """Delivers the messages of one lane; safe to use from several threads.

    Messages from one node to another with one tag arrive in order, as MPI promises; all others in
    any order, each after a few looks at it.

    Args:
        seed: Of the order and the delays.
    """

    def __init__(self, seed=0):
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._mail = defaultdict(deque)  # arrays in transit by (source, target, tag)
        self._waiting = defaultdict(deque)  # receives by the same
        self._held = set()
        self._broken = set()

    def hold(self, source, target):
        """Deliver nothing from one node to another until ``release``."""
        self._held.add((source, target))

    def release(self):
        """Deliver everything again."""
        self._held.clear()

    def cut(self, node):
        """Let every look at a message of ``node``, or to it, fail from now on."""
        self._broken.add(node)

    def post(self, key, array):
        with self._lock:
            self._mail[key].append(array.tobytes())

    def expect(self, key, message):
        with self._lock:
            self._waiting[key].append(message)

    def look(self, message):
        """Make progress with a message; whether it is done."""
        with self._lock:
            if self._broken.intersection(message.key[:2]):
                raise Broken(f"node {message.key}")
            if message.done or message.key[:2] in self._held or self._random.random() < 0.5:
                return message.done
            if message.array is None:  # a send: its array was copied
                message.done = True
                return True
            waiting, mail = self._waiting[message.key], self._mail[message.key]
            while waiting and mail:
                first = waiting.popleft()
                first.array.view(np.uint8)[:] = np.frombuffer(mail.popleft(), np.uint8)
                first.done = True
            return message.done


@dataclass
class InProcessMessage:
    """See ``transport.base.Message``."""

    network: Network
    key: tuple
    array: np.ndarray | None
    done: bool = False

    def is_done(self):
        return self.network.look(self)


@dataclass
class InProcessTransport:
    """See ``transport.base.Transport``."""

    network: Network
    node: int
    num_nodes: int
    sent: Traffic = field(default_factory=lambda: Traffic(0, 0))

    @property
    def ranks(self):
        return list(range(self.num_nodes))

    @property
    def others(self):
        return [(self.node + i) % self.num_nodes for i in range(1, self.num_nodes)]

    def reset(self):
        self.sent = Traffic(0, 0)

    def post_send(self, array, node, tag):
        assert array.size
        self.sent = Traffic(self.sent.nbytes + array.nbytes, self.sent.messages + 1)
        key = self.node, node, tag
        self.network.post(key, array)
        return InProcessMessage(self.network, key, None)

    def post_receive(self, array, node, tag):
        assert array.size
        message = InProcessMessage(self.network, (node, self.node, tag), array)
        self.network.expect(message.key, message)
        return message

    def close(self):
        pass


class Lagging:
    """An event that is done at the third look; only then is the work before it carried out."""

    def __init__(self, backend):
        self._backend, self._position, self._looks = backend, backend.num_asked, 0

    def is_done(self):
        self._looks += 1
        if self._looks > 2:
            self._backend.run(self._position)
        return self._backend.num_done >= self._position


class LaggingBackend(CpuBackend):
    """A backend that computes on its own: later than asked for, and in order."""

    def __init__(self):
        super().__init__(1)
        self.num_asked = self.num_done = 0
        self._work = deque()
        self._reduce, self.kernel.reduce = self.kernel.reduce, self._put_reduce

    def put(self, work):
        """Carry out a function once its turn comes."""
        self._work.append(work)
        self.num_asked += 1

    def run(self, stop):
        while self.num_done < stop:
            self._work.popleft()()
            self.num_done += 1

    def event(self):
        return Lagging(self)

    def wait(self):
        self.run(self.num_asked)

    def copy(self, target, source):
        self.put(lambda: np.copyto(target, source))

    def _put_reduce(self, *args):
        self.put(lambda: self._reduce(*args))


@dataclass
class Place:
    """The place of one rank among nodes, as ``comm.topology.Topology`` has it."""

    node: int
    node_rank: int
    num_nodes: int
    node_size: int


@dataclass
class Rank:
    """One rank: its memory, and its reduce-scatter."""

    place: Place
    buffers: list
    transport: InProcessTransport
    backend: CpuBackend
    reduction: ReduceScatter


@dataclass
class Cluster:
    """Ranks on several nodes in one process, that hold ``numels`` parameters of one dtype."""

    num_nodes: int
    node_size: int
    numels: list
    dtype: str = "float32"
    wire_dtype: str | None = None
    bucket_nbytes: int = 1
    seed: int = 0
    lags: bool = False
    trained: int | None = -1  # bit mask of the parameters that have gradients
    networks: list = field(init=False)
    ranks: list = field(init=False)

    def __post_init__(self):
        specs = [ParamSpec(f"w{i}", (n,), self.dtype, 0) for i, n in enumerate(self.numels)]
        world = self.num_nodes, self.node_size, self.bucket_nbytes
        self.partition = plan_partition(specs, *world)
        self.networks = [Network(self.seed + lane) for lane in range(self.node_size)]
        self.backend = CpuBackend(1)
        self.ranks = []
        for node in range(self.num_nodes):
            arrays = self._make_arrays(node)
            for node_rank in range(self.node_size):
                self.ranks.append(self._make_rank(Place(node, node_rank, *world[:2]), arrays))

    def _make_arrays(self, node):
        """Return the memory of a node, where all its ranks live in this process."""
        numel, dtype = self.partition.regions[0].numel, self.dtype
        params = np.zeros(numel, dtype)
        grads = [np.zeros(numel, dtype) for _ in range(self.node_size)]
        sums = {"sum": np.zeros(self.partition.node_numel(node, 0), compute_dtype(dtype))}
        return params, grads, ShardArrays(sums, None)

    def _make_rank(self, place, memory):
        params, grads, sums = memory
        own = grads[place.node_rank]
        arrays = RegionArrays(params, params, own, grads, [params], sums)
        buffers = [ShardBuffers(self.partition, 0, (place.node, place.node_rank), arrays)]
        transport = InProcessTransport(self.networks[place.node_rank], place.node, self.num_nodes)
        where = place.node, place.node_rank
        backend = LaggingBackend() if self.lags else self.backend
        reduction = ReduceScatter(transport, backend, where, self.wire_dtype)
        reduction.extend(self.partition, buffers)
        if self.trained is not None:
            reduction.activate(self.trained)
            reduction.reset()
        return Rank(place, buffers, transport, backend, reduction)

    def fill_grads(self, seed=0):
        """Draw gradients; the padding stays zero. Returns them by rank, [region_numel] each."""
        rng = np.random.default_rng(seed)
        for rank in self.ranks:
            grads = rank.buffers[0].grads
            for param in self.partition.params:
                part = rank.buffers[0].local(param).slice
                grads[part] = rng.standard_normal(param.numel).astype(grads.dtype)
        return [rank.buffers[0].grads.copy() for rank in self.ranks]
