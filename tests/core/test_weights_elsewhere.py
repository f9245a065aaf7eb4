"""Weights after the end, in threads and in child processes; jobs of their own, as these end MPI."""

import textwrap
from importlib.util import find_spec

import pytest

from shardopt.comm.node_memory import writes
from tests.conftest import TESTS

HEAD = """
import atexit, os, sys, threading
import multiprocessing
import numpy as np
from mpi4py import MPI
from shardopt import NAdam, Parameter, ShardPolicy

comm = MPI.COMM_WORLD


def build():
    params = [Parameter(np.full(n, 2.0, np.float32), f"p{n}") for n in (3, 5000)]
    return params, NAdam(params, lr=0.5, comm=comm, policy=ShardPolicy(timeout_s=20))


def take_step(params, opt):
    opt.zero_grad()
    for param in params:
        param.grad += 1
    opt.step()


def require(condition, what):  # python -O leaves assert out
    if not condition:
        print(f"rank {comm.rank}: {what}", flush=True)
        comm.Abort(1)


def content(params):
    return b"".join(param.data.tobytes() for param in params)
"""

LIVING = {  # while MPI is there; one job runs them all
    "in a thread": """
        params, opt = build()
        for _ in range(3):
            take_step(params, opt)
            threads = [threading.Thread(target=np.ndarray.fill, args=(p.data, 1)) for p in params]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        take_step(params, opt)
        require(len(set(comm.allgather(content(params)))) == 1, "ranks differ")
        require(0.2 < params[1].data[3] < 1, "the writes of the thread are gone")
        opt.close()
        print("still there", flush=True)
        print("still there", flush=True)
        """,
    "in a forked child": """
        params, opt = build()
        take_step(params, opt)
        trained = content(params)
        for number in range(3):
            pid = os.fork()
            if not pid:
                ok = content(params) == trained
                for param in params:
                    param.data[...] = 9
                    param.grad = None
                opt.core.params.find_changes()
                opt.core.params.refresh()
                os._exit(0 if ok and (params[0].data == 9).all() else 1)
            require(os.waitpid(pid, 0)[1] == 0, "the child has seen other weights")
            require(content(params) == trained, "the child has changed the weights")
            take_step(params, opt)
            require(len(set(comm.allgather(content(params)))) == 1, "ranks differ")
            require(content(params) != trained, "the step has changed nothing")
            trained = content(params)
            for param in params:
                param.data *= 2  # is still found
            take_step(params, opt)
            require(len(set(comm.allgather(content(params)))) == 1, "ranks differ after a write")
            trained = content(params)
        opt.close()
        print("still there", flush=True)
        print("still there", flush=True)
        """,
    "in processes by fork and spawn": """
        from child import work

        params, opt = build()
        for method in ("fork", "spawn"):
            take_step(params, opt)
            trained, total = content(params), float(sum(param.data.sum() for param in params))
            context = multiprocessing.get_context(method)
            out = context.SimpleQueue()
            process = context.Process(target=work, args=([p.data for p in params], out))
            process.start()
            require(out.get() == total, f"{method}: the child has seen other weights")
            process.join()
            require(process.exitcode == 0, f"{method}: the child failed")
            require(content(params) == trained, f"{method}: the child changed the weights")
        take_step(params, opt)
        require(len(set(comm.allgather(content(params)))) == 1, "ranks differ")
        opt.close()
        print("still there", flush=True)
        print("still there", flush=True)
        """,
}

WORKERS = """
import torch
from shardopt.torch import NAdam as TorchNAdam


class Data(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model  # as collators that tokenise with a model do

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with torch.no_grad():
            value = self.model.weight.sum().item()
            self.model.weight.fill_(100)
        self.model.zero_grad()
        self.model.weight.square().sum().backward()
        return torch.full((4,), 1.0), value


torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
with TorchNAdam(model.parameters(), comm=comm, policy=ShardPolicy(timeout_s=20)) as opt:
    for epoch in range(2):
        before = model.weight.sum().item()
        opt.zero_grad()
        loader = torch.utils.data.DataLoader(
            Data(model), batch_size=8, num_workers=1, multiprocessing_context="fork"
        )
        for inputs, seen in loader:
            require(abs(float(seen[0]) - before) < 1e-6, "a worker saw other weights")
            require(not model.weight.grad.any(), "a worker wrote gradients")
            model(inputs).sum().backward()
            opt.step()
        require(float(model.weight.detach().max()) < 50, "a worker wrote the weights")
print("still there", flush=True)
print("still there", flush=True)
"""

ENDS = {
    "after close and Finalize, in atexit": """
        params, opt = build()
        take_step(params, opt)
        trained = content(params)
        held = params[1].data[10:20]
        opt.close()
        del opt
        require(content(params) == trained, "close() has changed the weights")
        params[0].data += comm.rank  # this rank's own
        expected = content(params)


        def check():
            ok = content(params) == expected and bool((held == params[1].data[10]).all())
            print("still there" if ok else "gone", flush=True)


        atexit.register(check)
        comm.Barrier()
        MPI.Finalize()
        check()
        """,
    "never closed, after Finalize": """
        params, opt = build()
        take_step(params, opt)
        params[1].data[:7] = comm.rank
        trained = content(params)
        MPI.Finalize()
        params[1].data[7:9] = 4
        require(content(params)[:40] == trained[:40], "the weights have changed")
        print("still there", flush=True)
        print("still there", flush=True)
        """,
}


@pytest.mark.parametrize("end", ENDS)
def test_weights_stay_at_the_end(mpirun, tmp_path, end):
    done = run(mpirun, tmp_path, ENDS[end])
    assert done.returncode == 0, done.output
    assert done.stdout.count("still there") == 4, done.output


def test_weights_stay_while_others_have_them(mpirun, tmp_path):
    done = run(mpirun, tmp_path, "".join(map(textwrap.dedent, LIVING.values())))
    assert done.returncode == 0, done.output
    assert done.stdout.count("still there") == 4 * len(LIVING), done.output


@pytest.mark.any_mpi  # it forks, as the test above does with every MPI
@pytest.mark.skipif(not find_spec("torch"), reason="needs torch")
def test_weights_stay_while_the_workers_of_a_loader_have_them(mpirun, tmp_path):
    done = run(mpirun, tmp_path, WORKERS)
    assert done.returncode == 0, done.output
    assert done.stdout.count("still there") == 4, done.output


@pytest.mark.any_mpi
def test_weights_stay_without_asserts(mpirun, tmp_path):
    bodies = LIVING["in a forked child"], ENDS["never closed, after Finalize"]
    done = run(mpirun, tmp_path, "".join(map(textwrap.dedent, bodies)), "-O")
    assert done.returncode == 0, done.output
    assert done.stdout.count("still there") == 8, done.output


WRITES = """
from shardopt.comm.node_memory import writes

for way in os.environ["WAYS"].split():
    os.environ[writes.VARIABLE] = way
    writes._tracking_of.cache_clear()  # as it is where a process starts
    params, opt = build()
    for step in range(12):
        take_step(params, opt)
        for param in params:
            np.clip(param.data, 0.25, 1.0, out=param.data)
    take_step(params, opt)
    require(len(set(comm.allgather(content(params)))) == 1, "ranks differ")
    names = comm.allgather(writes.write_tracking().name)
    if comm.rank == 0:
        print(*names, content(params).hex(), flush=True)
    opt.close()
"""


@pytest.mark.any_mpi
def test_the_environment_chooses_how_writes_are_found(mpirun, tmp_path):
    """All ways end in the same bits."""
    ways = [way for way, why_not in writes._OBSTACLES.items() if not why_not()]
    done = run(mpirun, tmp_path, WRITES, env={"WAYS": " ".join(ways)})
    assert done.returncode == 0, done.output
    found = [line.split() for line in done.stdout.splitlines()]
    assert [names for *names, _ in found] == [[way, way] for way in ways]
    assert len({bits for *_, bits in found}) == 1
    assert "compare" in ways


CHILD = """
def work(arrays, out):
    total = float(sum(array.sum() for array in arrays))
    for array in arrays:
        array[...] = 7
    out.put(total)
"""


def run(mpirun, folder, body, *flags, **settings):
    """Run a job on two ranks.

    A process that is spawned imports the program, in which MPI must not start a second time.
    """
    (folder / "child.py").write_text(CHILD, encoding="utf-8")
    (folder / "body.py").write_text(HEAD + textwrap.dedent(body), encoding="utf-8")
    (folder / "job.py").write_text(
        'if __name__ == "__main__":\n    import body\n', encoding="utf-8"
    )
    env = {"PYTHONPATH": str(TESTS.parent), **settings.pop("env", {})}
    return mpirun(2, *flags, folder / "job.py", env=env, timeout_s=110)
