"""What several ranks cannot do is refused on each before the first step; data of their own are counted once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import refused
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from camshaft.callbacks import Accumulate, Distributed
from camshaft.engine import Callback, ConfigurationError, DataError, Engine, Trainer

Style = Callable[[Any, list[Callback], int | None], Engine]


def net_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    return net, torch.optim.SGD(net.parameters(), 0.1)


def by_trainer(data: Any, callbacks: list[Callback], seed: int | None) -> Engine:
    engine = Trainer(*net_and_optimizer(), nn.MSELoss(), callbacks=callbacks, seed=seed)
    engine.fit(data, epochs=2)
    return engine


def by_function(data: Any, callbacks: list[Callback], seed: int | None) -> Engine:
    net, optimizer = net_and_optimizer()

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.mse_loss(net(batch[0]), batch[1])
        if engine.training:
            engine.update(loss)
        return loss

    engine = Engine(step, model=net, optimizer=optimizer, callbacks=callbacks, seed=seed)
    engine.fit(data, epochs=2)
    return engine


def by_script(data: Any, callbacks: list[Callback], seed: int | None) -> Engine:
    net, optimizer = net_and_optimizer()
    engine = Engine(model=net, optimizer=optimizer, callbacks=callbacks, seed=seed)
    for _ in engine.epochs(2):
        for inputs, target in engine.train(data):
            loss = nn.functional.mse_loss(net(inputs), target)
            engine.update(loss)
            engine.record(loss=loss)
    return engine


STYLES: list[Style] = [by_trainer, by_function, by_script]


def batch(num: int = 4, value: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.full((num, 2), value), torch.zeros(num, 1)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(2), torch.zeros(1))] * 8)


def generator() -> Iterator[Any]:
    yield batch()


UNDIVIDED: list[Callable[[], Any]] = [lambda: DataLoader(Stream(), 4), generator, lambda: generator]


def refusals_of_settings() -> None:
    for style in STYLES:
        with refused(ConfigurationError, "This is one of 2 processes"):
            style([batch()], [], 1)
        with refused(ConfigurationError, "Several ranks need a seed"):
            style([batch()], [Distributed()], None)
        with refused(ConfigurationError, "Distributed comes after Accumulate"):
            style([batch()], [Accumulate(batches=2), Distributed()], 1)


def refusals_of_data() -> list[int]:
    """Return how often the model was called."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = nn.modules.module.register_module_forward_hook(count)
    for style in STYLES:
        for data in UNDIVIDED:
            with refused(ConfigurationError, "cannot be divided among 2 ranks"):
                style(data(), [Distributed()], 1)
    hook.remove()
    return [calls]


def test_several_processes_that_know_nothing_of_each_other_are_refused() -> None:
    on_ranks(2, refusals_of_settings)


def test_data_that_cannot_be_divided_are_refused_before_the_first_step() -> None:
    assert on_ranks(2, refusals_of_data) == [[0], [0]]


LENGTHS = [3, 1]  # of the ranks' own data, in batches


def own_batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    return batch(2 + number % 2, 0.5 + rank + 0.1 * number)


def together(number: int) -> tuple[Tensor, Tensor]:
    """What all ranks read in one step."""
    inputs, targets = zip(*(own_batch(r, number) for r, num in enumerate(LENGTHS) if number < num), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def train(style: Style, data: Any, callbacks: list[Callback]) -> list[Any]:
    engine = style(data, callbacks, 1)
    evaluated = engine.evaluate(data) if engine.stepper is not None else {}
    return [engine.step, engine.history["train_loss"], evaluated, engine.parts["model"].weight.tolist()[0]]


def train_on_own_data(style: Style) -> list[Any]:
    rank = dist.get_rank()
    return train(style, lambda: (own_batch(rank, n) for n in range(LENGTHS[rank])), [Distributed(data="sharded")])


@pytest.mark.parametrize("style", STYLES)
def test_data_of_the_ranks_own_may_differ_in_length_and_count_each_sample_once(style: Style) -> None:
    steps, losses, evaluated, weights = train(style, [together(number) for number in range(max(LENGTHS))], [])
    for result in on_ranks(2, train_on_own_data, style):
        assert result[0] == steps == 6
        assert result[1] == pytest.approx(losses, rel=1e-6)
        assert result[2] == pytest.approx(evaluated, rel=1e-6)
        assert result[3] == pytest.approx(weights, rel=1e-6)


def differentiate_twice() -> str:
    """Return what is said of a step that differentiates two losses of one call of the model."""
    net, optimizer = net_and_optimizer()

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        output = net(batch[0])
        (output.mean() / 2).backward(retain_graph=True)
        engine.update(output.mean() / 2)

    engine = Engine(step, model=net, optimizer=optimizer, callbacks=[Distributed()], seed=0)
    before = nn.utils.parameters_to_vector(net.parameters()).tolist()
    with pytest.raises(DataError) as caught:
        engine.fit([batch()] * 2, epochs=1)
    assert nn.utils.parameters_to_vector(net.parameters()).tolist() == before
    return str(caught.value)


def test_a_second_backward_pass_through_one_call_of_the_model_is_refused() -> None:
    """Only the first would be added up over the ranks, and the weights of the ranks would part without a word."""
    for said in on_ranks(2, differentiate_twice):
        assert said.startswith("The loss of step 1 was differentiated more than once after one call of the model")
        assert said.endswith("Add the losses up and differentiate their sum, or call the model once for each.")


def leave_out_a_layer() -> str:
    """Return what is said of a step whose loss is not of all that was called."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        net(batch[0])
        engine.update(net.get_submodule("0")(batch[0]).mean())

    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine = Engine(step, model=net, optimizer=optimizer, callbacks=[Distributed()], seed=0)
    with pytest.raises(DataError) as caught:
        engine.fit([batch()], epochs=1)
    return str(caught.value)


def test_a_loss_of_a_part_of_what_was_called_is_refused() -> None:
    """Torch would add up nothing of it, and say so at the next call of the model, if there is one."""
    for said in on_ranks(2, leave_out_a_layer):
        assert said.startswith("The gradients of step 1 were not added up over the ranks.")


def differentiate_in_windows() -> list[int]:
    """Return the updates of two passes of two calls each, with and without a window over several batches."""
    net, optimizer = net_and_optimizer()

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        net(batch[0]).mean().backward()
        engine.update(net(batch[0]).mean())

    done = []
    for callbacks in ([], [Accumulate(batches=2)]):
        engine = Engine(step, model=net, optimizer=optimizer, callbacks=[Distributed(), *callbacks], seed=0)
        engine.fit([batch()] * 4, epochs=1)
        done.append(engine.num_updates)
    return done


def test_several_calls_of_the_model_each_differentiated_once_are_added_up() -> None:
    assert on_ranks(2, differentiate_in_windows) == [[4, 2]] * 2


def train_what_is_no_part() -> None:
    net, optimizer = net_and_optimizer()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with refused(ConfigurationError, "The optimizer holds parameters of no part", "Pass the modules"):
        Engine(lambda engine, batch: None, model=net, optimizer=optimizer, callbacks=[Distributed()], seed=0)


def let_go() -> None:
    """An engine that was run and dropped is freed, with what torch has made for it."""
    net, optimizer = net_and_optimizer()
    engine = Engine(own_step, model=net, optimizer=optimizer, callbacks=[Distributed()], seed=0)
    engine.fit([batch()], epochs=1)
    alive = weakref.ref(net)
    del engine, net, optimizer
    gc.collect()
    assert alive() is None


def own_step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
    engine.update(engine.parts["model"](batch[0]).mean())


def test_an_engine_that_is_dropped_lets_go_of_its_model() -> None:
    on_ranks(2, let_go)


def test_an_optimizer_of_parameters_that_belong_to_no_part_is_refused() -> None:
    on_ranks(2, train_what_is_no_part)
