"""What one process trains, several ranks train, too: for each kind of data, model and update."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import on_ranks
from test_ranks import assert_alike, data, everything_on, fit, function_style, model, outcome, script_style
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from camshaft.callbacks import Accumulate, Compile, Distributed, FreezeUntil, MixedPrecision, RunCheckpoint
from camshaft.callbacks.distributed import _Replica
from camshaft.engine import Callback, ConfigurationError, DataError, Engine, StepEnd, Trainer, at, repeat

Settings = dict[str, Any]


def trained(
    train: Any,
    *callbacks: Callback,
    net: nn.Module | None = None,
    val: Any = None,
    distributed: Callable[[], Distributed] = Distributed,
    **settings: Any,
) -> dict[str, Any]:
    """Return the outcome of a fit, and what an evaluation and a prediction give after it."""
    net = model() if net is None else net
    val = data(37, shuffle=False, seed=1) if val is None else val
    trainer = Trainer(
        net,
        torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.3, momentum=0.9),
        nn.CrossEntropyLoss(),
        callbacks=[distributed(), *callbacks],
        seed=7,
    )
    trainer.fit(train, val, **({"epochs": 2} | settings))
    result = outcome(trainer, net)
    result["weights"] = torch.cat([result["weights"], trainer.predict(val).reshape(-1)])
    result["rows"] = [*result["rows"], *trainer.history.validations, trainer.evaluate(val)]
    return result


# Data -------------------------------------------------------------------------------------------------------


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Adds noise to its inputs."""

    def __init__(self, num: int) -> None:
        self.inputs, self.targets = data(num).dataset.tensors  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index] + 0.3 * torch.randn(5, dtype=torch.float64), self.targets[index]


def batches(*sizes: int) -> list[Any]:
    """Batches of these sizes as a list."""
    pairs = [data(size, batch_size=size, shuffle=False, seed=size).dataset.tensors for size in sizes]  # type: ignore[attr-defined]
    return [(inputs, target) for inputs, target in pairs]


def weighted() -> DataLoader[Any]:
    dataset = data(50).dataset
    return DataLoader(dataset, 8, sampler=WeightedRandomSampler([*range(1, 51)], 44))


DATA: dict[str, Callable[[], dict[str, Any]]] = {
    "last batch smaller than the world": lambda: trained(data(35, batch_size=16)),  # 16, 16, 3
    "last batch of one sample": lambda: trained(data(33, batch_size=16)),
    "batches smaller than the world": lambda: trained(data(20, batch_size=2)),
    "batches of one sample": lambda: trained(data(5, batch_size=1)),
    "validation smaller than the world": lambda: trained(data(35), val=data(1, shuffle=False, seed=1)),
    "a rank without any sample": lambda: trained(data(3, batch_size=8), val=data(2, shuffle=False, seed=1)),
    "a list of batches": lambda: trained(batches(5, 1, 8, 3), val=batches(3, 1)),
    "a weighted sampler": lambda: trained(weighted()),
    "augmentation": lambda: trained(DataLoader(Augmented(40), 8, shuffle=True)),
    "augmentation by workers": lambda: trained(DataLoader(Augmented(20), 8, shuffle=True, num_workers=2), epochs=1),
    "a short last window": lambda: trained(data(103), Accumulate(3)),
    "windows of samples": lambda: trained(data(103), Accumulate(samples=40)),
    "windows of short batches": lambda: trained(batches(3, 1, 5, 1, 2), Accumulate(2)),
    "a set epoch length": lambda: trained(repeat(data(40, batch_size=8)), epoch_length=3),
    "a number of steps": lambda: trained(data(103), epochs=None, max_steps=10),
    "validations in mid-epoch": lambda: trained(data(103), validate_every=3),
    "validations in open windows": lambda: trained(data(103), Accumulate(4), validate_every="3 steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_every_kind_of_data_gives_the_numbers_of_one_process(name: str) -> None:
    assert_as_alone(4, DATA[name])


def assert_as_alone(world: int, function: Callable[..., dict[str, Any]], *args: Any) -> None:
    """Compare what a function returns on several ranks with each other, and with one process."""
    results = on_ranks(world, function, *args)
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])
        assert result["rows"] == results[0]["rows"]
    assert_alike(results[0], function(*args))


def leaky(samples: list[Any]) -> Any:
    """Drops some samples."""
    return torch.utils.data.default_collate(samples[:-1] if len(samples) > 1 else samples)


def test_samples_that_are_dropped_after_they_were_counted_are_refused() -> None:
    def refused() -> str:
        with pytest.raises(DataError) as info:
            trained(DataLoader(data(32).dataset, 8, collate_fn=leaky))
        return str(info.value)

    assert (
        on_ranks(2, refused)
        == [
            "The batch of step 1 has 3 samples, but 4 were read for it. "
            "State what the loss is the mean of: engine.update(loss, num_samples)."
        ]
        * 2
    )


@pytest.mark.parametrize("style", [fit, function_style, script_style])
def test_early_stopping_ends_all_ranks_after_the_epoch_in_which_one_process_ends(style: Any) -> None:
    alone = long(style)
    assert alone["reason"].startswith("EarlyStopping: val_loss has not improved")
    assert_alike(on_ranks(2, long, style)[0], alone)


def long(style: Any) -> dict[str, Any]:
    result: dict[str, Any] = style(everything_on, epochs=40)
    return result


# Models -----------------------------------------------------------------------------------------------------


class WithSpare(nn.Module):
    """Uses one of two layers in turn, and never a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(5, 2) for _ in range(3)).double()
        self.num_calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.num_calls += self.training
        output: Tensor = self.layers[self.num_calls % 2](inputs)
        return output


def frozen() -> nn.Module:
    net = model()
    next(net.parameters()).requires_grad_(False)
    return net


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "frozen layers": lambda: trained(data(), net=frozen()),
    "layers that are set free": lambda: trained(data(), FreezeUntil(2, ["0.*"]), epochs=3),
    "unused layers": lambda: trained(
        data(), net=WithSpare(), distributed=lambda: Distributed(find_unused_parameters=True)
    ),
    "a compiled model": lambda: trained(data(), Compile("model", backend="eager")),
    "layers frozen in turn": lambda: trained(data(), FreezeInTurn()),
    "layers frozen in turn, step by step": lambda: trained(data(), FreezeEachStep()),
}


class FreezeInTurn(Callback):
    """Trains one layer in an epoch, and another that has as many parameters in the next."""

    def on_epoch_start(self, event: Any) -> None:
        layers = event.engine.parts["model"]
        layers[0].requires_grad_(event.engine.epoch % 2 == 1)
        layers[2].requires_grad_(event.engine.epoch % 2 == 0)


class FreezeEachStep(Callback):
    """Trains one layer in a step, and another in the next."""

    def on_batch_ready(self, event: Any) -> None:
        layers, is_odd = event.engine.parts["model"], event.engine.step % 2 == 1
        if event.engine.training:
            layers[0].requires_grad_(is_odd)
            layers[2].requires_grad_(not is_odd)


def num_replicas() -> int:
    with patch.object(_Replica, "_replicate", autospec=True, side_effect=_Replica._replicate) as made:
        trained(data(), FreezeEachStep())
    return made.call_count


def test_layers_that_learn_in_turn_are_prepared_once_each() -> None:
    assert on_ranks(2, num_replicas) == [2, 2]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_gives_the_numbers_of_one_process(name: str) -> None:
    assert_as_alone(2, MODELS[name])


def test_mixed_precision_gives_the_numbers_of_one_process_to_its_precision() -> None:
    def run() -> dict[str, Any]:
        return trained(
            to_float(data(64)), MixedPrecision("bf16"), net=model().float(), val=to_float(data(16)), epochs=1
        )

    alone, results = run(), on_ranks(2, run)
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    torch.testing.assert_close(results[0]["weights"], alone["weights"], rtol=0.02, atol=0.02)


def to_float(loader: DataLoader[Any]) -> DataLoader[Any]:
    inputs, target = loader.dataset.tensors  # type: ignore[attr-defined]
    return DataLoader(TensorDataset(inputs.float(), target), loader.batch_size)


def test_dropout_differs_between_ranks_and_their_weights_do_not() -> None:
    def run() -> dict[str, Any]:
        masks: list[Tensor] = []
        dropout = nn.Dropout(0.5)
        dropout.register_forward_hook(lambda module, inputs, output: masks.append(output.detach() != 0))
        net = nn.Sequential(model(), dropout)
        result = trained(data(32, batch_size=16), net=net, epochs=1)
        return result | {"mask": masks[0]}

    first, second = on_ranks(2, run)
    assert torch.equal(first["weights"], second["weights"])
    assert first["rows"] == second["rows"]
    assert not torch.equal(first["mask"], second["mask"])


# Batch normalisation ----------------------------------------------------------------------------------------


def normalised() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()


def test_batch_normalisation_over_the_samples_of_a_rank_is_refused() -> None:
    def refused() -> str:
        with pytest.raises(ConfigurationError) as info:
            trained(data(), net=normalised())
        return str(info.value)

    assert (
        on_ranks(2, refused)
        == [
            "The part model has batch normalisation, which would see only a rank's own samples. Convert it by "
            'torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), or write Distributed(batch_norm="local").'
        ]
        * 2
    )


def test_local_batch_normalisation_ends_with_equal_buffers_on_all_ranks() -> None:
    def run(val: bool) -> dict[str, Any]:
        net = normalised()
        trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.1), nn.CrossEntropyLoss(),
                          callbacks=[Distributed(batch_norm="local")], seed=7)  # fmt: skip
        trainer.fit(data(64), data(37, shuffle=False) if val else None, epochs=2)
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        return {"state": state, "values": trainer.evaluate(data(37, shuffle=False))}

    for val in (False, True):
        first, second = on_ranks(2, run, val)
        assert first["values"] == second["values"]
        for name, tensor in first["state"].items():
            assert torch.equal(tensor, second["state"][name]), name


# Updates of one's own ---------------------------------------------------------------------------------------


def adversarial(
    every: int,
    distributed: Callable[[], Distributed] = Distributed,
    *,
    is_detached: bool = True,
    callbacks: Callable[[], list[Callback]] = list,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Train a small pair of networks, each with an optimizer of its own.

    Args:
        every: how many batches make an update.
        distributed: makes the handler of the ranks.
        is_detached: whether the critic's loss is cut off from the generator.
        callbacks: makes the others; with a RunCheckpoint among them the run goes on from what is there.
        stop_at: the step after which the run is interrupted.
    """
    torch.manual_seed(3)
    generator, critic = nn.Linear(5, 5).double(), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    judge = nn.functional.binary_cross_entropy_with_logits

    def step(engine: Engine, batch: Any) -> dict[str, Tensor]:
        inputs = batch[0]
        made = generator(inputs.flip(1))
        real, fake = critic(inputs), critic(made.detach() if is_detached else made)
        critic_loss = judge(real, torch.ones_like(real)) + judge(fake, torch.zeros_like(fake))
        if engine.training:
            engine.update(critic_loss, optimizer="d")
        fooled = critic(made)
        generator_loss = judge(fooled, torch.ones_like(fooled))
        if engine.training:
            engine.update(generator_loss, optimizer="g")
        return {"critic": critic_loss, "generator": generator_loss}

    engine = Engine(
        step,
        model=generator,
        critic=critic,
        g=torch.optim.SGD(generator.parameters(), 0.1, momentum=0.9),
        d=torch.optim.Adam(critic.parameters(), 1e-2),
        callbacks=[distributed(), *([Accumulate(every)] if every > 1 else []), *callbacks()],
        seed=7,
    )
    if stop_at is not None:
        engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(stop_at))
    resume = "auto" if any(isinstance(one, RunCheckpoint) for one in engine.listeners.callbacks) else None
    engine.fit(data(35, batch_size=8), data(5, shuffle=False), epochs=2, resume=resume)
    return outcome(engine, nn.ModuleList([generator, critic]))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_two_optimizers_give_the_numbers_of_one_process(world: int, every: int) -> None:
    assert_as_alone(world, adversarial, every)


def frozen_meanwhile(states: bool) -> dict[str, Any]:
    """Freeze the critic for the generator's loss, while its own has been computed and is not differentiated yet."""
    torch.manual_seed(3)
    generator, critic = nn.Linear(5, 5).double(), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def step(engine: Engine, batch: Any) -> None:
        inputs = batch[0]
        own = (critic(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        critic.requires_grad_(False)
        fooled = critic(generator(inputs)).square().mean()
        critic.requires_grad_(True)
        engine.update(fooled, optimizer="g")
        engine.update(own, len(inputs) if states else None, optimizer="d")

    engine = Engine(
        step,
        model=generator,
        critic=critic,
        g=torch.optim.SGD(generator.parameters(), 0.1),
        d=torch.optim.SGD(critic.parameters(), 0.1),
        callbacks=[Distributed()],
        seed=7,
    )
    engine.fit(data(35, batch_size=9), epochs=2)
    return outcome(engine, nn.ModuleList([generator, critic]))


@pytest.mark.parametrize("states", [False, True])
def test_a_network_may_be_frozen_between_its_loss_and_its_update(states: bool) -> None:
    assert_as_alone(2, frozen_meanwhile, states)


def trained_twice() -> dict[str, Any]:
    """Train by one engine, whose last batch does not divide evenly, by hand, and by another engine."""
    net = model()
    Trainer(net, torch.optim.SGD(net.parameters(), 0.3), nn.CrossEntropyLoss(), callbacks=[Distributed()], seed=7).fit(
        data(21, batch_size=7), epochs=1
    )
    alone = copy.deepcopy(net)
    inputs = torch.ones(2, 5, dtype=torch.float64)
    grads = [torch.autograd.grad(one(inputs).sum(), list(one.parameters())) for one in (net, alone)]
    net(inputs).sum().backward()
    assert [grad.tolist() for grad in grads[0]] == [grad.tolist() for grad in grads[1]]
    assert [p.grad is not None and p.grad.tolist() for p in net.parameters()] == [grad.tolist() for grad in grads[1]]
    return trained(data(21, batch_size=7), net=net)


def test_what_a_run_leaves_behind_weighs_no_later_gradients() -> None:
    assert_as_alone(2, trained_twice)


def masked(weighs_on_device: bool) -> dict[str, Any]:
    """Train on sequences of which only a part counts; each batch is the mean over what counts."""
    net = model()

    def step(engine: Engine, batch: Any) -> None:
        inputs, target = batch
        mask = inputs[:, 0] > -0.3
        losses = nn.functional.cross_entropy(net(inputs), target, reduction="none")
        count = mask.sum() if weighs_on_device else float(mask.sum())
        loss = (losses * mask).sum() / max(1, int(mask.sum()))
        if engine.training:
            engine.update(loss, num_samples=count)
        engine.record(loss=loss, weight=count)

    engine = Engine(step, model=net, optimizer=torch.optim.SGD(net.parameters(), 0.3), seed=7,
                    callbacks=[Distributed()])  # fmt: skip
    engine.fit(data(35, batch_size=6), data(5, shuffle=False), epochs=2)
    return outcome(engine, net)


@pytest.mark.parametrize("weighs_on_device", [False, True])
def test_means_over_a_mask_give_the_numbers_of_one_process(weighs_on_device: bool) -> None:
    assert_as_alone(4, masked, weighs_on_device)


def stated_and_read() -> dict[str, Any]:
    """Make two updates in each step: by the mean over what a mask leaves, perhaps nothing, and by the batch's."""
    net = model()

    def step(engine: Engine, batch: Any) -> None:
        inputs, target = batch
        mask = inputs[:, 0] > 0.6
        losses = nn.functional.cross_entropy(net(inputs[mask]), target[mask], reduction="none")
        engine.update(losses.sum() / mask.sum(), num_samples=int(mask.sum()))  # NaN where the mask leaves nothing
        engine.update(nn.functional.cross_entropy(net(inputs), target))

    engine = Engine(step, model=net, optimizer=torch.optim.SGD(net.parameters(), 0.3), seed=7,
                    callbacks=[Distributed()])  # fmt: skip
    engine.fit(data(32, batch_size=8), epochs=2)
    return outcome(engine, net)


@pytest.mark.parametrize("world", [2, 4])
def test_a_loss_that_says_what_it_is_the_mean_of_leaves_the_next_one_as_it_is(world: int) -> None:
    assert_as_alone(world, stated_and_read)


def asked_for_gradients() -> None:
    """The gradients that a step asks for are its own, also of a batch that does not divide evenly."""
    net, asked = model(), []

    def step(engine: Engine, batch: Any) -> None:
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        asked.append(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))
        own = copy.deepcopy(net)
        alone = torch.autograd.grad(nn.functional.cross_entropy(own(batch[0]), batch[1]), list(own.parameters()))
        assert [grad.tolist() for grad in asked[-1]] == [grad.tolist() for grad in alone]
        engine.update(loss)

    engine = Engine(step, model=net, optimizer=torch.optim.SGD(net.parameters(), 0.3), seed=7,
                    callbacks=[Distributed()])  # fmt: skip
    engine.fit(data(21, batch_size=7), epochs=1)
    assert len(asked) == 3


def test_gradients_that_are_only_asked_for_are_not_weighted() -> None:
    on_ranks(2, asked_for_gradients)
