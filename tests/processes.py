"""Work on several gloo processes of this machine. They serve one test after another, since starting them costs most."""

import atexit
import os
import socket
import traceback
from multiprocessing.connection import wait

import torch
import torch.multiprocessing

_ranks = []  # of the processes that run: (process, the connection to it)


def on_ranks(world, work, *arguments):
    """What work(*arguments) returns on the first of `world` processes; numpy arrays where it has tensors.

    An exception on any rank is raised here with its traceback, and ends the processes, which may wait for each other.
    """
    if len(_ranks) != world:
        _end()
        _start(world)
    for _, connection in _ranks:
        connection.send((work, arguments))
    waiting = [connection for _, connection in _ranks]
    results = {}
    while waiting:
        ready = wait(waiting, timeout=300)
        for connection in ready:
            waiting.remove(connection)
            try:
                results[connection], error = connection.recv()
            except EOFError:
                error = "the process died"
            if error is not None:
                rank = [connection for _, connection in _ranks].index(connection)
                _end()
                raise AssertionError(f"rank {rank} of {world}: {error}")
        if not ready:
            _end()
            raise AssertionError(f"{len(waiting)} of {world} ranks have not answered for 300 s")
    return results[_ranks[0][1]]


def _start(world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    for rank in range(world):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world, port, there))
        process.start()
        there.close()  # so that the end of the process is the end of the connection
        _ranks.append((process, here))


@atexit.register
def _end():
    for process, connection in _ranks:
        process.kill()
        process.join()
        connection.close()
    _ranks.clear()


def _serve(rank, world, port, connection):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        try:
            work, arguments = connection.recv()
        except EOFError:  # the tests are over
            return
        try:
            found, error = work(*arguments), None
        except Exception:
            found, error = None, traceback.format_exc()
        connection.send((found if rank == 0 else None, error))
