"""BalancedPackingSampler: the examples of every step are a plain run's, every rank is equally busy, nothing is lost."""

import itertools
import random

import pytest
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from benchmarks.packs import lengths as real_lengths
from packattn import BalancedPackingSampler
from packattn.data import Cost
from packattn.data.balance import assign, micro_step_costs

RUNS = [
    # examples, ranks, global batch, options
    (100, 4, 16, {}),
    (103, 4, 16, {"micro_steps": 2}),
    (103, 4, 16, {"drop_last": True, "token_budget": 60}),
    (61, 2, 8, {"shuffle": False, "token_budget": 64, "cost": Cost(1.0, 0.01)}),
    (30, 8, 32, {"seed": 7, "micro_steps": 4}),
    (5, 8, 16, {"micro_steps": 2}),
    (50, 1, 50, {"token_budget": 50}),
]


def draw(n, seed=0, longest=50):
    generator = random.Random(seed)
    return [min(longest, 1 + int(generator.expovariate(1 / 12))) for _ in range(n)]


def samplers(n, ranks, global_batch, options):
    return [BalancedPackingSampler(draw(n), global_batch, num_replicas=ranks, rank=r, **options) for r in range(ranks)]


def plain_steps(n, ranks, global_batch, epoch, options):
    """The examples of each optimiser step of a run with torch's own DistributedSampler."""
    own = {name: options[name] for name in ("shuffle", "seed", "drop_last") if name in options}
    mine = []
    for rank in range(ranks):
        sampler = DistributedSampler(range(n), ranks, rank, **own)
        sampler.set_epoch(epoch)
        mine.append(list(sampler))
    each = global_batch // ranks
    count = -(-len(mine[0]) // each)
    return [sorted(itertools.chain(*(m[s * each : (s + 1) * each] for m in mine))) for s in range(count)]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_step_has_the_examples_of_a_plain_run(run):
    for epoch in (0, 3):
        mine = samplers(*run)
        for sampler in mine:
            sampler.set_epoch(epoch)
        grouped = [list(sampler.by_step(iter(sampler))) for sampler in mine]
        steps = [sorted(itertools.chain(*itertools.chain(*step))) for step in zip(*grouped, strict=True)]
        assert steps == plain_steps(run[0], run[1], run[2], epoch, run[3])


def test_every_step_has_the_examples_of_a_run_with_accelerate():
    from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
    from torch.utils.data import BatchSampler

    drawn = []
    for rank in range(4):
        sampler = SeedableRandomSampler(range(96), data_seed=5)
        sampler.set_epoch(2)
        drawn.append(list(BatchSamplerShard(BatchSampler(sampler, 2, False), 4, rank)))
    steps = [sorted(itertools.chain(*(b for r in drawn for b in r[s : s + 3]))) for s in range(0, len(drawn[0]), 3)]
    mine = BalancedPackingSampler(draw(96), 24, num_replicas=4, rank="all", seed=5, micro_steps=3)
    mine.set_epoch(2)
    assert [sorted(itertools.chain(*itertools.chain(*mine.assignment(s)))) for s in range(mine.num_steps)] == steps


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_rank_has_as_many_micro_steps_within_the_budget_none_empty(run):
    n, ranks, _, options = run
    lengths, mine = draw(n), samplers(*run)
    batches = [list(sampler) for sampler in mine]
    assert len({len(found) for found in batches}) == 1
    assert len(batches[0]) == len(mine[0])
    for batch in itertools.chain(*batches):
        assert batch
        assert sum(lengths[i] for i in batch) <= options.get("token_budget", 10**9)
    in_turn = list(BalancedPackingSampler(lengths, run[2], num_replicas=ranks, rank="all", **options))
    assert in_turn == list(itertools.chain(*zip(*batches, strict=True)))


@pytest.mark.parametrize("cost", [Cost(), Cost(1.0, 2e-5)], ids=["tokens", "tokens and attention"])
@pytest.mark.parametrize("longest", [None, 4096])
@pytest.mark.parametrize("global_batch", [64, 256, 1024])
def test_the_slowest_of_8_ranks_is_within_5_percent_of_the_least_possible(global_batch, longest, cost):
    lengths = real_lengths("short tasks", longest)
    sampler = BalancedPackingSampler(lengths, global_batch, num_replicas=8, rank=0, cost=cost)
    for step in range(sampler.num_steps - 1):
        costs = micro_step_costs(lengths, cost, sampler.assignment(step))
        examples = [cost.of_length(lengths[i]) for i in sampler.global_batch_of(step)]
        slowest = max(map(sum, zip(*costs, strict=True)))
        assert sum(map(sum, costs)) == pytest.approx(sum(examples))
        assert slowest <= 1.05 * max(sum(examples) / 8, max(examples))


def test_a_huge_example_does_not_leave_other_ranks_idle_in_its_micro_step():
    lengths = [1000, *[10] * 299]
    costs = micro_step_costs(lengths, Cost(), assign(lengths, Cost(), 4, 3, None))
    # 3,990 tokens over 4 ranks; the huge example is a micro-step of its own, and the others do as much beside it.
    assert sum(max(ranks) for ranks in costs) <= 1.05 * 1000


def test_tight_budgets_are_met_where_balance_alone_would_not():
    lengths = [50] * 16
    found = assign(lengths, Cost(), 2, 8, 50)
    assert found is not None
    assert all(len(items) == 1 for ranks in found for items in ranks)
    assert assign([50] * 17, Cost(), 2, 8, 50) is None


@pytest.mark.parametrize("options", [{}, {"micro_steps": 3}, {"token_budget": 50}, {"token_budget": 50, "rank": "all"}])
def test_an_epoch_goes_on_anywhere(options):
    def make():
        return BalancedPackingSampler(draw(90), 18, num_replicas=2, **{"rank": 1, **options})

    whole = make()
    whole.set_epoch(4)
    expected = list(whole)
    rounds = 2 if options.get("rank") == "all" else 1
    for stop in range(0, len(expected) + 1, rounds):
        first = make()
        first.set_epoch(4)
        taken = list(itertools.islice(first, stop))
        second = make()
        second.load_state_dict(first.state_dict())
        second.set_epoch(4)
        left = list(second) if rounds == 2 else list(itertools.chain(*second.by_step(second)))
        assert taken + left == expected
        second.set_epoch(5)
        second.set_epoch(4)
        assert list(itertools.islice(second, 3)) == expected[:3]


def test_the_number_of_ranks_may_change_between_steps_and_not_within_one():
    first = BalancedPackingSampler(draw(96), 24, num_replicas=4, rank=0, token_budget=50)
    steps = list(itertools.islice(first.by_step(first), 2))
    assert len(steps[0]) > 1
    more = BalancedPackingSampler(draw(96), 24, num_replicas=8, rank="all", token_budget=80)
    more.load_state_dict(first.state_dict(step=2))
    left = list(more)
    planned = [more.assignment(step) for step in (2, 3)]
    assert left == list(itertools.chain(*itertools.chain(*planned)))
    found = [sorted(itertools.chain(*itertools.chain(*step))) for step in planned]
    assert found == plain_steps(96, 4, 24, 0, {})[2:]

    inside = BalancedPackingSampler(draw(96), 24, num_replicas=4, rank=0, token_budget=50)
    next(iter(inside))
    with pytest.raises(ValueError, match=r"in the middle of step 0 with num_replicas=4, this sampler has 8"):
        more.load_state_dict(inside.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed=0, this sampler has 1"),
        ({"global_batch": 12}, "global_batch=24, this sampler has 12"),
        ({"shuffle": False}, "shuffle=True, this sampler has False"),
        ({"lengths": draw(95)}, "fingerprint=.*the same data in its order"),
    ],
)
def test_a_state_of_another_run_is_refused(options, message):
    state = BalancedPackingSampler(draw(96), 24, num_replicas=4, rank=0).state_dict()
    arguments = {"lengths": draw(96), "global_batch": 24, "num_replicas": 4, "rank": 0, **options}
    with pytest.raises(ValueError, match=message):
        BalancedPackingSampler(**arguments).load_state_dict(state)


BAD_STATES = [
    (None, TypeError, "must be what state_dict returned, got NoneType"),
    ({"step": ...}, ValueError, "the state has no step; give what state_dict"),
    ({"steps": 3}, ValueError, "the state has steps; give what state_dict"),
    ({"step": 5}, ValueError, "step of the state must be an int from 0 to 4, got 5"),
    ({"step": -1}, ValueError, "step of the state must be an int of at least 0, got -1"),
    ({"step": 2.0}, TypeError, "step of the state must be an int, got 2.0"),
    ({"step": "2"}, TypeError, "step of the state must be an int, got '2'"),
    ({"step": True}, TypeError, "step of the state must be an int, got True"),
    ({"step": 4, "micro_step": 1}, ValueError, "step of the state must be an int from 0 to 3, got 4"),
    ({"micro_step": 9}, ValueError, "micro_step of the state must be an int from 0 to 2, got 9"),
    ({"micro_step": None}, TypeError, "micro_step of the state must be an int, got None"),
    ({"epoch": -1}, ValueError, "epoch of the state must be an int of at least 0, got -1"),
    ({"epoch": 1.5}, TypeError, "epoch of the state must be an int, got 1.5"),
    ({"num_replicas": 0}, ValueError, "num_replicas of the state must be an int of at least 1, got 0"),
    ({"num_replicas": None}, TypeError, "num_replicas of the state must be an int, got None"),
    ({"token_budget": 0}, ValueError, "token_budget of the state must be an int of at least 1, got 0"),
    ({"micro_steps": "2"}, TypeError, "micro_steps of the state must be an int, got '2'"),
    ({"cost": [1.0]}, ValueError, "cost of the state must be Cost"),
    ({"cost": [float("nan"), 0.0]}, ValueError, "cost of the state must be Cost"),
    ({"fingerprint": None}, ValueError, "fingerprint=None"),
    ({"drop_last": None}, ValueError, "drop_last=None, this sampler has False"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_STATES)
def test_law_10_a_state_that_cannot_be_is_named_and_changes_nothing(change, error, message):
    sampler = BalancedPackingSampler(draw(96), 24, num_replicas=4, rank=0, token_budget=50)
    sampler.set_epoch(3)
    expected, state = list(sampler), None
    if change is not None:
        state = {name: value for name, value in (sampler.state_dict(step=2) | change).items() if value is not ...}
    with pytest.raises(error, match=message):
        sampler.load_state_dict(state)
    assert sampler.epoch == 3
    assert list(sampler) == expected


def test_law_10_an_epoch_or_a_step_that_cannot_be_is_named():
    sampler = BalancedPackingSampler(draw(96), 24, num_replicas=4, rank=0)
    with pytest.raises(ValueError, match="step must be an int from 0 to 4, got 5"):
        sampler.state_dict(step=5)
    for epoch in (1.0, None, True):
        with pytest.raises(TypeError, match="epoch must be an int"):
            sampler.set_epoch(epoch)


def test_a_finished_epoch_of_a_run_on_other_ranks_is_finished_here_too():
    one = BalancedPackingSampler(draw(97), 24, num_replicas=1, rank=0, drop_last=True)
    four = BalancedPackingSampler(draw(97), 24, num_replicas=4, rank=0, drop_last=True)
    assert (one.num_steps, four.num_steps) == (5, 4)
    four.load_state_dict(one.state_dict(step=5))
    assert list(four) == []


def test_set_epoch_does_not_lose_the_rest_of_an_epoch_that_was_loaded():
    sampler = BalancedPackingSampler(draw(96), 24, num_replicas=4, rank=0)
    sampler.set_epoch(1)
    state, whole = sampler.state_dict(step=2), list(sampler)
    resumed = BalancedPackingSampler(draw(96), 24, num_replicas=4, rank=0)
    resumed.load_state_dict(state)
    for epoch in (0, 2):
        with pytest.raises(
            ValueError, match=r"goes on in epoch 1 at step 2, and set_epoch\(. would lose|begin the loop"
        ):
            resumed.set_epoch(epoch)
    resumed.set_epoch(1)
    assert list(resumed) == whole[2:]
    resumed.set_epoch(2)
    resumed.load_state_dict(sampler.state_dict(step=4))
    resumed.set_epoch(2)  # nothing was left


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_within_by_step_is_that_of_the_step_whatever_was_read_ahead(workers):
    def make():
        return BalancedPackingSampler(draw(90), 18, num_replicas=2, rank=1, token_budget=50)

    def loader(sampler):
        return DataLoader(list(range(90)), batch_sampler=sampler, collate_fn=list, num_workers=workers)

    sampler, done = make(), []
    for step, batches in enumerate(sampler.by_step(loader(sampler))):
        done.append(batches)
        if step == 1:
            state = sampler.state_dict()
            break
    assert (state["step"], state["micro_step"]) == (2, 0)
    assert sampler.state_dict() == state
    resumed = make()
    resumed.load_state_dict(state)
    assert done + list(resumed.by_step(loader(resumed))) == list(make().by_step(make()))


@pytest.mark.parametrize("workers", [0, 2])
def test_by_step_groups_what_a_resumed_stateful_data_loader_gives(workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make():
        sampler = BalancedPackingSampler(draw(90), 18, num_replicas=2, rank=1, token_budget=50)
        loader = StatefulDataLoader(list(range(90)), batch_sampler=sampler, collate_fn=list, num_workers=workers)
        return sampler, loader

    sampler, loader = make()
    done = []
    for batches in sampler.by_step(loader):
        done.append(batches)
        if len(done) == 2:
            state = loader.state_dict()
            break
    sampler, loader = make()
    loader.load_state_dict(state)
    assert done + list(sampler.by_step(loader)) == list(make()[0].by_step(make()[0]))


def test_by_step_refuses_a_loader_that_does_not_keep_the_order():
    sampler = BalancedPackingSampler(draw(20), 4, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match="in_order=False"):
        sampler.by_step(DataLoader(range(20), batch_sampler=sampler, in_order=False))


def test_an_epoch_that_accelerate_does_not_hand_on_is_not_taken_for_the_first():
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    def make():
        sampler = BalancedPackingSampler(draw(90), 18, num_replicas=2, rank="all", token_budget=50)
        loader = DataLoader(range(90), batch_sampler=sampler, collate_fn=list)
        return sampler, prepare_data_loader(loader, num_processes=2, process_index=1)

    _, loader = make()
    loader.set_epoch(1)
    whole = list(loader)
    sampler, loader = make()
    skipped = skip_first_batches(loader, 3)
    skipped.set_epoch(1)
    with pytest.raises(RuntimeError, match="the epoch did not reach this BalancedPackingSampler"):
        list(skipped)
    sampler.set_epoch(1)
    assert list(skipped) == whole[3:]
    skipped.set_epoch(1)
    assert list(itertools.chain(*sampler.by_step(skipped))) == whole[3:]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_resumes_it(workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = list(range(90))

    def make():
        sampler = BalancedPackingSampler(draw(90), 18, num_replicas=2, rank=1, token_budget=50)
        return StatefulDataLoader(data, batch_sampler=sampler, collate_fn=list, num_workers=workers)

    expected = list(make())
    for stop in (1, 4, 7):
        loader = make()
        iterator = iter(loader)
        taken = [next(iterator) for _ in range(stop)]
        state = loader.state_dict()
        del iterator
        resumed = make()
        resumed.load_state_dict(state)
        assert taken + list(resumed) == expected


def test_a_plain_data_loader_with_workers_resumes_by_finished_steps():
    data, make = list(range(90)), lambda: BalancedPackingSampler(draw(90), 18, num_replicas=2, rank=1, token_budget=50)
    sampler = make()
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=list, num_workers=2)
    grouped = sampler.by_step(loader)
    done = [next(grouped) for _ in range(2)]
    resumed = make()
    resumed.load_state_dict(sampler.state_dict(step=2))
    left = list(resumed.by_step(DataLoader(data, batch_sampler=resumed, collate_fn=list, num_workers=2)))
    assert done + left == list(make().by_step(make()))
    assert len({len(step) for step in done + left}) > 1


def test_accelerate_refuses_to_deal_out_what_was_dealt_out():
    from accelerate.data_loader import prepare_data_loader

    mine = BalancedPackingSampler(draw(20), 4, num_replicas=2, rank=0)
    with pytest.raises(TypeError, match='make it with rank="all"'):
        prepare_data_loader(DataLoader(range(20), batch_sampler=mine), num_processes=2, process_index=0)


def test_by_step_refuses_what_gives_the_batches_of_all_ranks_or_too_few():
    mine = BalancedPackingSampler(draw(20), 4, num_replicas=2, rank="all")
    for given in (mine, DataLoader(range(20), batch_sampler=mine)):
        with pytest.raises(ValueError, match=r"give by_step the loader that Accelerator\.prepare returned"):
            mine.by_step(given)
    one = BalancedPackingSampler(draw(20), 4, num_replicas=2, rank=0, micro_steps=2)
    with pytest.raises(ValueError, match="batches ended in step 1 of 5, after 1 of 2 micro-batches"):
        list(one.by_step(iter(list(one)[:3])))


BAD = [
    ({"lengths": [3, 0]}, ValueError, "example 1 is empty"),
    ({"lengths": [3.0]}, TypeError, "lengths must be integers"),
    ({"global_batch": 3}, ValueError, "global_batch must be a multiple of the 2 ranks, got 3"),
    ({"global_batch": 0}, ValueError, "global_batch must be an int of at least 1, got 0"),
    ({"micro_steps": 3}, ValueError, "micro_steps must be an int from 1 to 2, got 3"),
    ({"token_budget": 8}, ValueError, r"example 2 has 9 tokens, more than the token_budget of 8 \(such are 1"),
    ({"num_replicas": 2, "rank": None}, ValueError, "rank must be given with num_replicas=2"),
    ({"rank": 2}, ValueError, "rank must be an int from 0 to 1, got 2"),
    ({"rank": "every"}, TypeError, 'rank must be an int or "all"'),
    ({"cost": (0.0, 1.0)}, ValueError, "cost must be Cost"),
    ({"lengths": [1], "drop_last": True}, ValueError, "1 example cannot be dealt to 2 ranks"),
    ({"seed": -1}, ValueError, "seed must be an int of at least 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_law_10_what_cannot_be_sampled_is_named(change, error, message):
    arguments = {"lengths": [1, 2, 9, 4], "global_batch": 4, "num_replicas": 2, "rank": 0, **change}
    with pytest.raises(error, match=message):
        BalancedPackingSampler(**arguments)


def test_a_step_that_does_not_fit_is_found_before_the_epoch_begins():
    lengths = [*[1] * 16, *[10] * 16]
    sampler = BalancedPackingSampler(
        lengths, 8, num_replicas=2, rank=0, micro_steps=2, token_budget=19, shuffle=False
    )  # fmt: skip
    with pytest.raises(ValueError, match="the 80 tokens of step 2 of epoch 0 do not fit into 2 micro-steps of 2 ranks"):
        next(iter(sampler))


def test_cost_of_a_configuration():
    from transformers import LlamaConfig

    config = LlamaConfig()  # 7B
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert Cost.of_model(config).per_square == pytest.approx(32 * 4096 / weights)
    assert Cost.of_model(config).of_length(1000) == pytest.approx(1000 + 1000**2 * 32 * 4096 / weights)
