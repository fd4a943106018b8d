"""Compiled modules: the same objects under the same names, and what cannot work is refused before step 1."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, linear, make_trainer, run_python
from torch import Tensor, nn

from camshaft.callbacks import BestCheckpoint, Compile, RunCheckpoint, WeightAverage
from camshaft.engine import ConfigurationError, Engine

TRAIN, VAL = class_batches(8, 8, 8, 3), class_batches(8, 5, seed=1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def weights(trainer: Engine) -> list[Tensor]:
    return list(trainer.parts["model"].state_dict().values())


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch.compiler.reset()


@pytest.mark.slow
def test_training_compiled_gives_what_training_gives(tmp_path: Path) -> None:
    """With torch's own compiler, an uneven last batch, and evaluations in between, to rounding."""
    compiled, plain = make_trainer(Compile(), model=net()), make_trainer(model=net())
    for trainer in (compiled, plain):
        trainer.fit(TRAIN, VAL, epochs=2)
    assert compiled.history["val_loss"] == pytest.approx(plain.history["val_loss"], rel=1e-4)
    for mine, other in zip(weights(compiled), weights(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_model_is_the_same_object_and_goes_through_the_compiler() -> None:
    """Seen by a backend of ours: it is handed the model's graph, in training and in evaluation."""
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph))
        return graph.forward

    model = net()
    trainer = make_trainer(Compile(backend=backend), model=model)
    assert trainer.parts["model"] is model
    trainer.fit(TRAIN, VAL, epochs=1)
    assert len(graphs) >= 2
    assert all("batch_norm" in graph or "BatchNorm" in graph for graph in graphs)  # traced through, or as a module


def counting(calls: list[int]) -> Any:
    """Return a backend that counts the calls of what it compiled."""

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append(1)
            return graph.forward(*arguments)

        return run

    return backend


@pytest.mark.parametrize("build", [linear, net, lambda: nn.Sequential(net())], ids=["Linear", "Sequential", "nested"])
def test_each_call_goes_through_the_compiler_also_after_one_that_failed(build: Callable[[], nn.Module]) -> None:
    """Also for modules of torch's own, which ``module.compile()`` leaves as they are before torch 2.14."""
    inputs, calls = TRAIN[0][0], list[int]()
    model = build().eval()
    expected = model(inputs)
    Engine(model=model, callbacks=[Compile(backend=counting(calls))])
    torch.testing.assert_close(model(inputs), expected)
    with pytest.raises(RuntimeError, match=r"mat1|reduction dim"):
        model(torch.zeros(2, 5))
    torch.testing.assert_close(model(inputs), expected)
    assert len(calls) == 2


def test_hooks_and_copies_of_a_compiled_module_work_as_before() -> None:
    """A hook that comes after the first call is heard, and a copy has weights of its own."""
    inputs, shapes, model = TRAIN[0][0], list[torch.Size](), linear()
    Engine(model=model, callbacks=[Compile(backend="eager")])
    model(inputs)
    model.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied.weight)
    nn.init.zeros_(copied.bias)
    assert not torch.equal(model(inputs), copied(inputs))
    assert not copied(inputs).any()
    assert shapes == [(8, 3)] * 3


def test_the_tenth_model_of_a_process_is_compiled_like_the_first() -> None:
    """Torch gives up on code that it has compiled 8 times; each model has its own."""
    calls = list[int]()
    for width in range(1, 11):
        model = nn.Sequential(nn.Linear(4, width))
        Engine(model=model, callbacks=[Compile(backend=counting(calls))])
        model(TRAIN[0][0])
        assert len(calls) == width


def test_checkpoints_hold_plain_names_and_load_with_and_without_it(tmp_path: Path) -> None:
    best = BestCheckpoint("val_loss", directory=tmp_path / "best")
    callbacks = [best, RunCheckpoint(tmp_path / "run")]
    make_trainer(Compile(backend="eager"), *callbacks, model=net()).fit(TRAIN, VAL, epochs=1)
    assert list(best.weights()) == list(net().state_dict())
    net().load_state_dict(best.weights())
    resumed = make_trainer(
        BestCheckpoint("val_loss", directory=tmp_path / "best"), RunCheckpoint(tmp_path / "run"), model=net()
    )
    resumed.fit(TRAIN, VAL, epochs=2, resume="auto")
    through = make_trainer(model=net())
    through.fit(TRAIN, VAL, epochs=2)
    for mine, other in zip(weights(resumed), weights(through), strict=True):
        assert torch.equal(mine, other)


def test_evaluations_use_the_average_of_the_weights() -> None:
    """Compiled code reads the weights again, also where they were exchanged."""
    values = []
    for callbacks in ([Compile(backend="eager")], []):
        trainer = make_trainer(*callbacks, WeightAverage("ema", decay=0.9), model=net())
        trainer.fit(TRAIN, VAL, epochs=2)
        values.append((trainer.history["val_loss"], trainer.evaluate(VAL)))
    assert values[0] == values[1]


def test_parts_may_be_named() -> None:
    generator, critic = linear(), linear()
    Engine(generator=generator, critic=critic, callbacks=[Compile("critic", backend="eager")])
    assert critic._compiled_call_impl is not None
    assert generator._compiled_call_impl is None


def test_what_is_no_module_of_the_run_is_refused_with_a_guess() -> None:
    with pytest.raises(
        ConfigurationError, match=r'compile "modle", but .* are: model, loss_fn\. Did you mean "model"'
    ):
        make_trainer(Compile("modle"))
    with pytest.raises(ConfigurationError, match=r"the modules are: none\."):
        Engine(callbacks=[Compile()])


def test_a_model_that_is_wrapped_already_is_refused() -> None:
    model: Any = torch.compile(net(), backend="eager")
    with pytest.raises(ConfigurationError, match=r'"model" was compiled by torch\.compile\(model\)\. Leave one'):
        make_trainer(Compile(backend="eager"), model=model)


def test_a_second_trainer_may_compile_the_same_model() -> None:
    """A notebook's cell runs twice; a refused handler has compiled nothing."""
    model = net()
    with pytest.raises(ConfigurationError, match='compile "modle"'):
        make_trainer(Compile("model", "modle", backend="eager"), model=model)
    assert model._compiled_call_impl is None
    for _ in range(2):
        make_trainer(Compile(backend="eager"), model=model).fit(TRAIN, epochs=1)


def test_a_module_in_place_of_a_name_and_two_of_one_part_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"takes names of parts, and got an object of type Linear\. Write Compile"
    ):
        Compile(linear())  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ConfigurationError, match=r'has a Compile of "model" already\. Attach one'):
        make_trainer(Compile(backend="eager"), Compile(backend="eager"))


@pytest.mark.parametrize("options", [{"backend": "inductr"}, {"speed": "high"}, {"mode": "fastest"}])
def test_an_option_that_torch_does_not_know_is_refused(options: dict[str, Any]) -> None:
    """Before step 1, wherever torch itself looks at it."""
    trainer = make_trainer(model=net())
    with pytest.raises(ConfigurationError, match='"model" cannot be compiled: '):
        trainer.attach(Compile(**options))


NO_COMPILER = """
import os, sys
os.environ["PATH"] = ""
os.environ.pop("CXX", None)
sys.path.insert(0, sys.argv[1])
from helpers import class_batches, make_trainer
from camshaft.callbacks import Compile
trainer = make_trainer(Compile())
try:
    trainer.fit(class_batches(8), epochs=1)
finally:
    print(trainer.step)
"""


def test_a_machine_without_a_compiler_is_told_before_step_1() -> None:
    assert shutil.which("g++")  # there is one here: the path is what hides it
    run = run_python(NO_COMPILER, Path(__file__).parent)
    assert run.stdout == "0\n"
    assert "Compile cannot work here: there is no C++ compiler g++. Install g++" in run.stderr


@pytest.mark.gpu
def test_training_compiled_on_cuda_gives_what_training_gives() -> None:
    compiled, plain = (make_trainer(*extra, model=net().cuda()) for extra in ([Compile()], []))
    data = [(x.cuda(), y.cuda()) for x, y in TRAIN]
    for trainer in (compiled, plain):
        trainer.fit(data, epochs=2)
    for mine, other in zip(weights(compiled), weights(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
