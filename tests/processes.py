"""Work on several gloo processes of this machine."""

import os
import socket

import torch
import torch.multiprocessing


def on_ranks(world, work, *arguments):
    """What work(*arguments) returns on the first of `world` processes; numpy arrays in the place of tensors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_on_rank, args=(rank, world, port, work, arguments, queue)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = queue.get(timeout=300)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return found


def _on_rank(rank, world, port, work, arguments, queue):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    try:
        found = work(*arguments)
        if rank == 0:
            queue.put(found)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
